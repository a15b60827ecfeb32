cimport numpy as cnp

cdef int digits_weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims,
                            options) except -1
