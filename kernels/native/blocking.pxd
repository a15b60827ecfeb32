cimport numpy as cnp

from fastconv.kernels.native.machine cimport fc_ukernels

cdef enum:
    DIRECT_BYTES = 1 << 20      # packed part of the image: mostly in L2, far below the promised 8 MB
    DEPTHWISE_BYTES = 1 << 17   # read once for each tap: well inside L2
    CHANNELS = 16               # channel block of depthwise convolution and of the weight gradient

# A 5-D array of the contract: address and element strides.
ctypedef struct View:
    char *data
    Py_ssize_t size[5]
    Py_ssize_t stride[5]

# One convolution, unpacked from its dims. `x` is the image that is padded, `y` the (gradient of the) output.
ctypedef struct Conv:
    const fc_ukernels *kernels
    Py_ssize_t item           # bytes in an element
    Py_ssize_t packed         # bytes of an element as the tile reads it: all its pieces, where it is split
    View x, w, y
    Py_ssize_t batch, groups
    Py_ssize_t channels       # input channels of one group
    Py_ssize_t depth          # the same as the tile reads them: rounded up to its step
    Py_ssize_t filters        # output channels of one group
    Py_ssize_t taps
    Py_ssize_t reduction      # depth * taps
    Py_ssize_t kernel[3]
    Py_ssize_t stride[3]
    Py_ssize_t pad[3]
    Py_ssize_t dilation[3]
    Py_ssize_t out[3]
    Py_ssize_t panel          # filters in a full panel: two vectors
    Py_ssize_t panels         # panels of one group
    bint folded               # weights are packed [tap][channel], not [channel][tap]; a row of taps joins the channels
    Py_ssize_t chunk          # pixels whose accumulators stay in L1: a multiple of the tile's rows
    Py_ssize_t threads

# The blocks that the output of one image is cut into: `rows` x `columns` pixels of one depth.
ctypedef struct Blocks:
    Py_ssize_t rows, columns
    Py_ssize_t down, across   # blocks along height and width
    Py_ssize_t count          # blocks of one image

# One block: which output pixels, and the part of the image that they see.
ctypedef struct Block:
    Py_ssize_t image, depth, top, left
    Py_ssize_t rows, columns
    Py_ssize_t high, wide     # rows and columns of the packed part of the image

# One task of a plan, whatever the plan is; returns 1 if there is no memory for it.
ctypedef int (*TaskFunction)(const void *plan, Py_ssize_t number) noexcept nogil

cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t round_up(Py_ssize_t a, Py_ssize_t step) noexcept nogil:
    return ceil_div(a, step) * step


cdef inline const char *bias_at(const char *bias, Py_ssize_t offset) noexcept nogil:
    """Where a run of channels has its bias; no bias stays none."""
    if bias == NULL:
        return bias
    return bias + offset


cdef void make_view(View *view, cnp.ndarray array)
cdef void make_conv(Conv *c, cnp.ndarray x, cnp.ndarray w, cnp.ndarray y, dims, options)
cdef void choose_threads(Conv *c, threads)
cdef void use_tile(Conv *c, const fc_ukernels *kernels) noexcept nogil
cdef void split_numbers(Conv *c, str precision)
cdef const fc_ukernels *piece_tile(const Conv *c, str precision, Py_ssize_t summed=*)
cdef Py_ssize_t piece_products(const fc_ukernels *kernels) noexcept nogil
cdef bint split_pays(const fc_ukernels *kernels, double padded)
cdef Py_ssize_t share_out(Py_ssize_t tasks, Py_ssize_t parts, Py_ssize_t packing, int threads) noexcept nogil
cdef void run_tasks(TaskFunction task, const void *plan, Py_ssize_t tasks, int threads) except *
cdef Py_ssize_t do_tasks(TaskFunction task, const void *plan, Py_ssize_t tasks, int threads) noexcept nogil
cdef Py_ssize_t packed_weight_size(const Conv *c) noexcept nogil
cdef int panel_vectors(const Conv *c, Py_ssize_t panel) noexcept nogil
cdef bint taps_continue(const Conv *c) noexcept nogil
cdef cnp.ndarray turn_weights(cnp.ndarray weight, dims)
cdef void pack_panel(const Conv *c, Py_ssize_t group, Py_ssize_t panel, Py_ssize_t channel, Py_ssize_t channels,
                     char *out) noexcept nogil
cdef char *pack_bias(const Conv *c, bias, char *out)
cdef bint start_sums(const Conv *c, const char *bias, Py_ssize_t filters, Py_ssize_t width, char *sums,
                     Py_ssize_t step) noexcept nogil
cdef void cut(const Conv *c, Py_ssize_t cell_bytes, Py_ssize_t block_bytes, Py_ssize_t column_limit,
              Blocks *blocks) noexcept nogil
cdef void divide(const Conv *c, Py_ssize_t rows, Py_ssize_t columns, Blocks *blocks) noexcept nogil
cdef void locate(const Conv *c, const Blocks *blocks, Py_ssize_t index, Block *block) noexcept nogil
cdef Py_ssize_t extent(const Conv *c, int axis, Py_ssize_t pixels) noexcept nogil
cdef Py_ssize_t part_cells(const Conv *c, Py_ssize_t rows, Py_ssize_t columns) noexcept nogil
cdef void pack_image(const Conv *c, const Block *block, Py_ssize_t first, Py_ssize_t count, Py_ssize_t width,
                     char *out) noexcept nogil
cdef void pack_rows(const Conv *c, const Block *block, Py_ssize_t d, Py_ssize_t first_row, Py_ssize_t high, Py_ssize_t first,
                    Py_ssize_t count, Py_ssize_t width, char *out) noexcept nogil
cdef const char *first_output(const Conv *c, const Block *block, Py_ssize_t channel) noexcept nogil
cdef void pack_pixels(const Conv *c, const Block *block, Py_ssize_t first, Py_ssize_t count, Py_ssize_t width,
                      Py_ssize_t first_pixel, Py_ssize_t pixels, char *out) noexcept nogil
cdef void tap_offsets(const Conv *c, const Block *block, Py_ssize_t width, Py_ssize_t *taps) noexcept nogil
cdef void place_taps(const Conv *c, Py_ssize_t slab, Py_ssize_t row, Py_ssize_t cell, Py_ssize_t *taps) noexcept nogil
cdef void place_pixels(const Conv *c, const Block *block, Py_ssize_t row, Py_ssize_t cell, Py_ssize_t *pixels) noexcept nogil
cdef void pixel_offsets(const Conv *c, const Block *block, Py_ssize_t width, Py_ssize_t *pixels) noexcept nogil
cdef Py_ssize_t output_run(const Conv *c, const Block *block, Py_ssize_t pixel, Py_ssize_t end, Py_ssize_t *at) noexcept nogil
cdef void store(const Conv *c, const Block *block, Py_ssize_t first_pixel, Py_ssize_t pixels, const char *accumulators,
                Py_ssize_t width, Py_ssize_t channel, Py_ssize_t channels, const char *bias,
                int relu) noexcept nogil
