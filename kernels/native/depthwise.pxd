from fastconv.kernels.native.blocking cimport Conv

cdef bint loads_once(const Conv *c) noexcept nogil
cdef bint rows_in_place(const Conv *c) noexcept nogil
