from fastconv.kernels.native.blocking cimport Conv

cdef bint suits_in_place(const Conv *c) noexcept nogil
