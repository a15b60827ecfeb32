from fastconv.kernels.native.pooling cimport Pool


cdef void pool_by_rows(Pool *p) except *
cdef void number_rows(Pool *p) noexcept nogil
cdef Py_ssize_t cells_bytes(const Pool *p) noexcept nogil
cdef void pool_rows(const Pool *p, Py_ssize_t index, Py_ssize_t end, char *memory) noexcept nogil
