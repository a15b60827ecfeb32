"""Planes of the image: rows that a block of pixels sees, padding included, phases of the stride side by side.

        [channel][kernel depth][row][phase][cell]

    image, stride 2          planes
       a b a b a             0 a a a . | b b 0 .         0: padding, .: filled up to whole vectors
       c d c d c      ->     0 c c c . | d d 0 .

What neighbouring pixels see through a tap are neighbouring cells.
"""

from libc.string cimport memset

from fastconv.kernels.native.blocking cimport View, ceil_div, extent, round_up


cdef void lay_out(Plan *plan) noexcept nogil:
    """Lay out planes, ``high`` rows for a block, with the phases of the stride side by side."""
    cdef Conv *c = &plan.c
    cdef fc_padding *padding = &plan.padding
    plan.columns = round_up(plan.blocks.columns, c.kernels.lanes)
    padding.row_step = c.x.stride[3]
    padding.cell_step = c.x.stride[4]
    padding.image_step = c.x.stride[1]
    padding.phases = c.stride[2]
    padding.wide = round_up(ceil_div(extent(c, 2, plan.blocks.columns), c.stride[2]), c.kernels.lanes)
    plan.plane = c.kernel[0] * plan.high * padding.phases * padding.wide
    plan.plane = (plan.plane // c.kernels.lanes | 1) * c.kernels.lanes  # planes a power of two apart would share few sets of L1
    padding.plane_step = plan.plane
    plan.planes.tap_row = c.dilation[1] * padding.phases * padding.wide
    plan.planes.cell_row = c.stride[1] * padding.phases * padding.wide


cdef Py_ssize_t tap_cell(const Plan *plan, Py_ssize_t channel, Py_ssize_t d, Py_ssize_t w) noexcept nogil:
    """Where the cell that a tap of the first row sees is in the planes."""
    cdef Py_ssize_t column = w * plan.c.dilation[2], line = plan.padding.phases * plan.padding.wide
    return (
        channel * plan.plane + d * plan.high * line
        + column % plan.padding.phases * plan.padding.wide + column // plan.padding.phases
    )


cdef void write_taps(const Plan *plan, Py_ssize_t *taps) noexcept nogil:
    """Write where the taps of some channels are in their planes."""
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t channel, d, h, w
    for channel in range(plan.together):
        for d in range(c.kernel[0]):
            for h in range(c.kernel[1]):
                for w in range(c.kernel[2]):
                    taps[0] = tap_cell(plan, channel, d, w) + h * plan.planes.tap_row
                    taps += 1


cdef void pad_planes(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t count, char *out) noexcept nogil:
    """Copy what a block sees of ``count`` channels, from ``first`` on."""
    cdef const Conv *c = &plan.c
    cdef const View *x = &c.x
    cdef Py_ssize_t left = block.left * c.stride[2] - c.pad[2], top = block.top * c.stride[1] - c.pad[1]
    cdef Py_ssize_t row = min(max(0, top), x.size[3]), cell = min(max(0, left), x.size[4]), i, d, z
    cdef Py_ssize_t part = plan.high * plan.padding.phases * plan.padding.wide * c.item
    cdef const char *base = x.data + (
        block.image * x.stride[0] + first * x.stride[1] + row * x.stride[3] + cell * x.stride[4]
    ) * c.item
    cdef fc_padding padding = plan.padding
    padding.above = min(max(0, -top), plan.high)
    padding.rows = max(0, min(x.size[3], top + plan.high) - row)
    padding.below = plan.high - padding.above - padding.rows
    padding.before = min(max(0, -left), block.wide)
    padding.cells = max(0, min(x.size[4], left + block.wide) - cell)
    for d in range(c.kernel[0]):
        z = block.depth * c.stride[0] - c.pad[0] + d * c.dilation[0]
        if 0 <= z < x.size[2]:
            c.kernels.pad(&padding, count, base + z * x.stride[2] * c.item, out + d * part)
        else:
            for i in range(count):
                memset(out + d * part + i * plan.plane * c.item, 0, <size_t>part)


cdef void fill_gaps(const Plan *plan, Py_ssize_t count, char *cells) noexcept nogil:
    """Write zeros behind each of ``count`` planes: whole vectors are read there, and multiplied, if for nothing.

    What was there before would be no less right, but for pieces; if it is subnormal, a product takes a hundred cycles.
    """
    cdef const Conv *c = &plan.c
    cdef Py_ssize_t cells_seen = c.kernel[0] * plan.high * plan.padding.phases * plan.padding.wide, i
    for i in range(count):
        memset(cells + (i * plan.plane + cells_seen) * c.item, 0, <size_t>((plan.plane - cells_seen) * c.item))
    memset(cells + count * plan.plane * c.item, 0, <size_t>(4 * c.kernels.lanes * c.item))
