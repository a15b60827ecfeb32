from fastconv.kernels.native.pooling cimport Pool


cdef bint pools_in_planes(const Pool *p) noexcept nogil
cdef void pool_in_planes(Pool *p) except *
cdef bint gathers_in_planes(const Pool *p) noexcept nogil
cdef void gather_in_planes(Pool *p) except *
