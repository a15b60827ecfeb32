from fastconv.kernels.native.pooling cimport Pool

cdef void gather_along_rows(Pool *p) noexcept
