from fastconv.kernels.native.pooling cimport Pool

cdef void scatter(Pool *p) except *
