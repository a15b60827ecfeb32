from fastconv.kernels.native.blocking cimport Block, Conv

cdef void join_rows(Conv *c) noexcept nogil
cdef bint sees_one_cell(const Conv *c) noexcept nogil
cdef const char *first_cell(const Conv *c, const Block *block, Py_ssize_t channel) noexcept nogil
cdef void gather(const Conv *c, const Block *block, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t first_pixel,
                 Py_ssize_t pixels, Py_ssize_t pitch, char *out) noexcept nogil
