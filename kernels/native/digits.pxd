from fastconv.kernels.native.blocking cimport Conv, View
from fastconv.kernels.native.machine cimport fc_spread, fc_ukernels

# What the tile multiplies: the next is tried where numbers don't have the form of one.
cdef enum:
    NUMBERS
    PIECES
    DIGITS

# The images of one call in fixed point: a scale, and a spread, of each image, group and channel block.
cdef class Scales:
    cdef object memory
    cdef float *scale
    cdef fc_spread *spread


cdef const fc_ukernels *digit_tile(const Conv *c, str precision, Py_ssize_t summed)
cdef Scales measure(const Conv *c, const View *x, Py_ssize_t channels, Py_ssize_t width, Py_ssize_t summed,
                    unsigned char *refused)
cdef int products(const fc_spread *image, const fc_spread *weights, Py_ssize_t summed) noexcept nogil
