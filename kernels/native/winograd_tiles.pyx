"""Where the tiles of Winograd's convolution are: slices of the filters, periods of dilated tiles, blocks of periods.

How many outputs a tile has is the choice of ``kernels/winograd.py``. Filters of more taps than a tile's sides have are cut
into slices, whose products are summed like those of channels. With dilation 2 the outputs of a tile are 2 apart, and
2x2 tiles together make a period of neighbouring outputs:

      taps of a 5x5 filter      outputs of four 2x2 tiles
      in slices a, b, c, d      a, b, c, d: one period
          a a a b b                   a b a b
          a a a b b                   c d c d
          a a a b b                   a b a b
          c c c d d                   c d c d
          c c c d d
"""

from fastconv.kernels.native.blocking cimport Block, Blocks, Conv, ceil_div, round_up
from fastconv.kernels.native.machine cimport fc_tiles


cdef void cut_taps(const Conv *c, tile, Geometry *g):
    """Cut the taps into slices for a tile."""
    cdef int axis, point, tap_point
    g.rows, g.columns, g.points, g.run = tile.rows.outputs, tile.columns.outputs, tile.points, tile.run
    g.taps[0], g.taps[1], g.taps[2] = 1, tile.rows.taps, tile.columns.taps
    g.sides[0], g.sides[1] = tile.rows.code, tile.columns.code
    for point, tap_point in enumerate(tile.tap_points):
        g.tap_point[point] = tap_point
    g.tap_points = g.tap_point[g.points - 1] + 1
    for axis in range(3):
        g.slices[axis] = ceil_div(c.kernel[axis], g.taps[axis])
    g.count = g.slices[0] * g.slices[1] * g.slices[2]
    g.down = g.rows * c.dilation[1]
    g.across = g.columns * c.dilation[2]


cdef fc_tiles tiles_at(const Geometry *g, const Py_ssize_t *at, Py_ssize_t count, Py_ssize_t row_step,
                       Py_ssize_t cell_step) noexcept nogil:
    """Return tiles whose cells are so far apart; ``winograd.h`` has no others than with the greater side across."""
    cdef fc_tiles tiles
    if g.sides[0] > g.sides[1]:
        row_step, cell_step = cell_step, row_step
    tiles.rows, tiles.columns = min(g.sides[0], g.sides[1]), max(g.sides[0], g.sides[1])
    tiles.high, tiles.wide = <int>g.taps[1], <int>g.taps[2]
    tiles.count = count
    tiles.at = at
    tiles.row_step, tiles.cell_step = row_step, cell_step
    return tiles


cdef void place_tiles(const Conv *c, const Geometry *g, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t row_step,
                      Py_ssize_t cell_step, Py_ssize_t *at) noexcept nogil:
    """Write where each tile of so many outputs, in whole periods, starts; the cells of outputs are so far apart."""
    cdef Py_ssize_t row, column, r, q, p = 0
    for row from 0 <= row < rows by g.down:
        for r in range(c.dilation[1]):
            for column from 0 <= column < columns by g.across:
                for q in range(c.dilation[2]):
                    at[p] = (row + r) * row_step + (column + q) * cell_step
                    p += 1


cdef Block whole_periods(const Conv *c, const Geometry *g, const Block *block) noexcept nogil:
    """Return a block with whole periods of tiles, and with all inputs that these see."""
    cdef Block whole = block[0]
    whole.rows = round_up(block.rows, g.down)
    whole.columns = round_up(block.columns, g.across)
    whole.high = (whole.rows - 1) * c.stride[1] + (g.slices[1] * g.taps[1] - 1) * c.dilation[1] + 1
    whole.wide = (whole.columns - 1) * c.stride[2] + (g.slices[2] * g.taps[2] - 1) * c.dilation[2] + 1
    return whole


cdef void cut_tiles(const Conv *c, const Geometry *g, Py_ssize_t tiles, Blocks *blocks) noexcept nogil:
    """Choose blocks of about so many tiles: whole rows of periods, or parts of one."""
    cdef Py_ssize_t across = ceil_div(c.out[2], g.across), down = ceil_div(c.out[1], g.down)
    cdef Py_ssize_t period = c.dilation[1] * c.dilation[2], most = max(1, tiles // period), least = -1, d, rows
    across = ceil_div(across, ceil_div(across, most))
    for d in range(1, min(down, max(1, most // across)) + 1):  # tiles fill the rows of brgemm's
        rows = down // d * round_up(d * across * period, c.kernels.tile_rows)
        rows += round_up(down % d * across * period, c.kernels.tile_rows)
        if least < 0 or rows <= least:
            least = rows
            blocks.rows = g.down * d
    blocks.columns = g.across * across
    blocks.down = ceil_div(c.out[1], blocks.rows)
    blocks.across = ceil_div(c.out[2], blocks.columns)
    blocks.count = c.out[0] * blocks.down * blocks.across
