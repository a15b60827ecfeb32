cimport numpy as cnp

cdef bint taps_weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims, options) except -1
