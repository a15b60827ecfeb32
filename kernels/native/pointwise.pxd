from fastconv.kernels.native.blocking cimport Conv

cdef bint suits_rows(const Conv *c) noexcept nogil
cdef void convolve_rows(const Conv *c, bias, bint relu) except *
