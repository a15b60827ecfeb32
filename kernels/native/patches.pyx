"""What ``im2col`` multiplies: patches, what the taps of each pixel see, gathered a few channels and pixels at a time.

                   pixels of a plane
                  +-----------------+
       channel 0  | tap 0           |     A row is what one tap of one channel shows to all pixels: pieces of image rows,
                  | tap 1           |     and zeros where it looks into the padding. Where each pixel sees one cell, and
                  | ...             |     none in the padding, patches are the image itself.
       channel 1  | tap 0           |
                  | ...             |
                  +-----------------+
"""

from libc.string cimport memset

from fastconv.kernels.native.blocking cimport Block, Conv, View


cdef void join_rows(Conv *c) noexcept nogil:
    """Make one row of all rows where a pixel sees just the cell that has its place, and rows continue one another."""
    cdef int axis
    for axis in range(1, 3):
        if c.kernel[axis] != 1 or c.stride[axis] != 1 or c.x.size[2 + axis] != c.out[axis]:
            return
    if c.x.stride[3] == c.out[2] * c.x.stride[4] and c.y.stride[3] == c.out[2] * c.y.stride[4]:
        c.x.size[4] = c.y.size[4] = c.out[2] = c.out[1] * c.out[2]
        c.x.size[3] = c.y.size[3] = c.out[1] = 1


cdef bint sees_one_cell(const Conv *c) noexcept nogil:
    """Whether a pixel sees one cell, never in the padding: then the patches are the image as the caller has it."""
    cdef int axis
    for axis in range(3):
        if c.kernel[axis] != 1 or c.pad[axis] != 0 or (c.out[axis] - 1) * c.stride[axis] >= c.x.size[2 + axis]:
            return False
    return True


cdef const char *first_cell(const Conv *c, const Block *block, Py_ssize_t channel) noexcept nogil:
    """Return where the first pixel of a block looks, without padding."""
    cdef const View *x = &c.x
    return x.data + (
        block.image * x.stride[0] + channel * x.stride[1] + block.depth * c.stride[0] * x.stride[2]
        + block.top * c.stride[1] * x.stride[3] + block.left * c.stride[2] * x.stride[4]
    ) * c.item


cdef void gather(const Conv *c, const Block *block, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t first_pixel,
                 Py_ssize_t pixels, Py_ssize_t pitch, char *out) noexcept nogil:
    """Gather what some channels' taps show to some pixels of a plane, [channel][tap][pixel], run by run along image rows."""
    cdef Py_ssize_t run, row, column, d, h, w, done = 0
    cdef char *target
    while done < pixels:
        row = (first_pixel + done) // c.out[2]
        column = (first_pixel + done) % c.out[2]
        run = min(pixels - done, c.out[2] - column)
        target = out + done * c.item
        for d in range(c.kernel[0]):
            for h in range(c.kernel[1]):
                for w in range(c.kernel[2]):
                    _gather_run(c, block, channel, channels, d, row * c.stride[1] - c.pad[1] + h * c.dilation[1],
                                column * c.stride[2] - c.pad[2] + w * c.dilation[2], run, c.taps * pitch, target)
                    target += pitch * c.item
        done += run


cdef void _gather_run(const Conv *c, const Block *block, Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t d, Py_ssize_t y,
                      Py_ssize_t left, Py_ssize_t run, Py_ssize_t pitch, char *out) noexcept nogil:
    """Gather one tap's cells for a run of pixels, zeros in the padding, to rows that are ``pitch`` apart."""
    cdef const View *x = &c.x
    cdef Py_ssize_t step = c.stride[2], z = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0], i
    cdef Py_ssize_t start = 0, stop = 0  # the pixels of the run that see a cell inside the image
    if 0 <= z < x.size[2] and 0 <= y < x.size[3] and left < x.size[4]:
        start = 0 if left >= 0 else min((step - 1 - left) // step, run)
        stop = max(start, run if left + (run - 1) * step < x.size[4] else (x.size[4] - 1 - left) // step + 1)
    if stop - start < run:
        for i in range(channels):
            memset(out + i * pitch * c.item, 0, <size_t>(run * c.item))
    if stop > start:
        c.kernels.transpose(
            x.data + (
                block.image * x.stride[0] + channel * x.stride[1] + z * x.stride[2] + y * x.stride[3]
                + (left + start * step) * x.stride[4]
            ) * c.item,
            step * x.stride[4], x.stride[1], stop - start, channels, out + start * c.item, pitch,
        )
