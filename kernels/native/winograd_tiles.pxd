from fastconv.kernels.native.blocking cimport Block, Blocks, Conv
from fastconv.kernels.native.machine cimport fc_tiles

cdef enum:
    MOST_POINTS = 64      # of a tile
    LINE_BYTES = 64       # between the points of an array, lest all of them fall into the same set of L1

# A tile, and how the taps are cut into slices for it. A block is cut into whole tiles, and with dilation into whole periods.
ctypedef struct Geometry:
    int rows, columns           # outputs of a tile
    int sides[2]                # down and across: see fc_tiles
    int run                     # products that may be summed in a row
    Py_ssize_t points
    Py_ssize_t tap_points       # of a filter: fewer where points share them
    int tap_point[MOST_POINTS]  # of each point
    Py_ssize_t slices[3]        # along depth, height and width
    Py_ssize_t taps[3]          # of a slice
    Py_ssize_t count            # of all slices
    Py_ssize_t down, across     # outputs of a period

cdef void cut_taps(const Conv *c, tile, Geometry *g)
cdef fc_tiles tiles_at(const Geometry *g, const Py_ssize_t *at, Py_ssize_t count, Py_ssize_t row_step,
                       Py_ssize_t cell_step) noexcept nogil
cdef void place_tiles(const Conv *c, const Geometry *g, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t row_step,
                      Py_ssize_t cell_step, Py_ssize_t *at) noexcept nogil
cdef Block whole_periods(const Conv *c, const Geometry *g, const Block *block) noexcept nogil
cdef void cut_tiles(const Conv *c, const Geometry *g, Py_ssize_t tiles, Blocks *blocks) noexcept nogil
