from fastconv.kernels.native.pooling cimport Pool

cdef void gather_along_channels(Pool *p) except *
