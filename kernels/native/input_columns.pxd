cimport numpy as cnp

cdef void input_by_columns(cnp.ndarray grad_output, cnp.ndarray weight, bias, cnp.ndarray grad_input, dims, options)
