cdef extern from "ukernels.h" nogil:
    ctypedef struct fc_spread:
        float peak, density

    ctypedef struct fc_scales:
        float scale[32]
        fc_spread spread

    ctypedef struct fc_tally:
        float largest[16]
        float sum[16]
        float squares[16]

    ctypedef struct fc_epilogue:
        const void *bias
        int relu
        Py_ssize_t pixel_stride, channel_stride

    ctypedef struct fc_reduction:
        const Py_ssize_t *taps
        const Py_ssize_t *b_taps
        Py_ssize_t n_taps, depth, a_step, b_tap, b_step, c_step
        Py_ssize_t ahead
        const fc_scales *scales
        const float *scale
        Py_ssize_t scale_step
        int products
        const fc_epilogue *finish
        int apart

    fc_reduction fc_reduction_over(const Py_ssize_t *taps, Py_ssize_t n_taps, Py_ssize_t depth)

    ctypedef struct fc_runs:
        void *data
        Py_ssize_t run, step
        int item, stream

    ctypedef struct fc_cells:
        Py_ssize_t count
        const Py_ssize_t *offsets
        const int *numbers

    ctypedef struct fc_columns:
        Py_ssize_t count, first, step
        int number, number_step

    enum:
        FC_CLASSES

    ctypedef struct fc_classes:
        int count
        Py_ssize_t step

    enum:
        FC_PATCH

    ctypedef struct fc_patches:
        const Py_ssize_t *rows
        Py_ssize_t n_rows, run, plane, depth

    ctypedef struct fc_padding:
        Py_ssize_t row_step, cell_step, above, rows, below, before, cells, phases, wide, image_step, plane_step

    ctypedef struct fc_planes:
        const Py_ssize_t *taps
        Py_ssize_t n_taps, high, tap_row
        const Py_ssize_t *weight_taps
        Py_ssize_t weight_row, rows, columns, cell_row, out_row, out_column, out_filter, weight_group, cell_group
        const void *bias
        int accumulate, relu
        void *laid
        Py_ssize_t laid_row, before, ahead

    ctypedef struct fc_depthwise:
        const Py_ssize_t *taps
        const Py_ssize_t *weights
        Py_ssize_t n_taps
        int wide
        Py_ssize_t channels, cell, out_step
        const void *bias
        int relu
        Py_ssize_t before, after

    ctypedef struct fc_window:
        Py_ssize_t wide, pixels, to
        Py_ssize_t before "from"
        Py_ssize_t channels, cell_step, grad_step

    ctypedef struct fc_phases:
        Py_ssize_t stride[3]
        Py_ssize_t before[3]
        Py_ssize_t pitch[3]
        Py_ssize_t phase

    ctypedef struct fc_rows:
        Py_ssize_t size[3]
        Py_ssize_t step[3]

    enum:
        FC_TURNS

    ctypedef struct fc_apart:
        Py_ssize_t cell, grad, winner

    ctypedef struct fc_scatter:
        const Py_ssize_t *offsets
        const int *places[3]
        const int *near_offsets
        const int *first
        const unsigned int *inside
        Py_ssize_t reach[3]
        Py_ssize_t image[3]
        Py_ssize_t windows[3]
        Py_ssize_t stride[3]
        Py_ssize_t pad[3]
        Py_ssize_t cell_step[3]
        Py_ssize_t grad_step[3]
        Py_ssize_t winner_step[3]
        fc_apart lane, turn
        Py_ssize_t lane_stride
        int winner_item

    ctypedef struct fc_tiles:
        int rows, columns, high, wide
        Py_ssize_t count
        const Py_ssize_t *at
        Py_ssize_t row_step, cell_step

    ctypedef struct fc_ukernels:
        int lanes, tile_rows, even_rows, depth_step, fused
        void (*brgemm)(const fc_reduction *, const void *, const Py_ssize_t *, Py_ssize_t, const void *, int, void *,
                       int) noexcept nogil
        Py_ssize_t (*saturate)(Py_ssize_t, void *) noexcept nogil
        void (*epilogue)(const fc_epilogue *, const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, void *) noexcept nogil
        void (*weave)(const fc_epilogue *, const void *const *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                      void *) noexcept nogil
        void (*transpose)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, void *, Py_ssize_t) noexcept nogil
        void (*depthwise)(const fc_depthwise *, const void *, const Py_ssize_t *, Py_ssize_t, const void *, void *) noexcept nogil
        void (*depthwise_weight)(const Py_ssize_t *, Py_ssize_t, const void *, Py_ssize_t, const void *, Py_ssize_t,
                                 Py_ssize_t, Py_ssize_t, void *) noexcept nogil
        void (*depthwise_weight_rows)(const fc_window *, const Py_ssize_t *, Py_ssize_t, const void *, const void *, void *) noexcept nogil
        void (*pad)(const fc_padding *, Py_ssize_t, const void *, void *) noexcept nogil
        int planar_filters, planar_rows
        void (*planar)(const fc_planes *, const void *, Py_ssize_t, const void *, void *) noexcept nogil
        void (*pointwise)(const fc_planes *, const void *, Py_ssize_t, const void *, void *) noexcept nogil
        void (*planar_weight)(const fc_planes *, Py_ssize_t, const void *, const void *, void *) noexcept nogil
        void (*sum_lanes)(const void *, Py_ssize_t, void *) noexcept nogil
        void (*planar_one)(const fc_planes *, Py_ssize_t, const void *, const void *, void *) noexcept nogil
        void (*zip)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, void *, Py_ssize_t) noexcept nogil
        void (*max_pool)(const fc_cells *, Py_ssize_t, Py_ssize_t, const fc_runs *, const fc_runs *,
                         const fc_runs *) noexcept nogil
        void (*max_pool_finite)(const fc_cells *, Py_ssize_t, const void *, void *, unsigned char *, const void *,
                                Py_ssize_t) noexcept nogil
        int (*to_phases)(const fc_phases *, const fc_rows *, Py_ssize_t, const void *, void *) noexcept nogil
        void (*max_pool_won)(const fc_cells *, Py_ssize_t, Py_ssize_t, const fc_columns *, const fc_rows *, const Py_ssize_t *, Py_ssize_t,
                             const void *, const unsigned char *, void *) noexcept nogil
        void (*copy_rows)(const fc_rows *, const Py_ssize_t *, Py_ssize_t, const void *, void *) noexcept nogil
        void (*max_pool_grad)(const fc_cells *, const fc_classes *, Py_ssize_t, Py_ssize_t, const fc_runs *,
                              const fc_runs *, const fc_runs *) noexcept nogil
        void (*max_pool_scatter)(const fc_scatter *, Py_ssize_t, Py_ssize_t, const void *, const void *, void *) noexcept nogil
        void (*winograd_transform)(int, const fc_tiles *, const void *, Py_ssize_t, void *, Py_ssize_t) noexcept nogil
        void (*winograd_gather)(int, const fc_tiles *, const void *, Py_ssize_t, Py_ssize_t, void *) noexcept nogil
        void (*add)(void *, const void *, Py_ssize_t) noexcept nogil
        void (*add_apart)(void *, Py_ssize_t, const void *, Py_ssize_t) noexcept nogil
        int (*all_below)(const void *, Py_ssize_t, double) noexcept nogil
        void (*relu_grad)(const void *, const void *, Py_ssize_t, void *) noexcept nogil
        int pieces
        int packed
        int (*split_rows)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, int, void *) noexcept nogil
        int (*split_runs)(const void *, Py_ssize_t, Py_ssize_t, int, void *) noexcept nogil
        int (*split_weights)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, int, int, void *) noexcept nogil
        int (*planar_split)(const fc_planes *, const void *, Py_ssize_t, const void *, void *) noexcept nogil
        int (*split_pairs)(const void *, Py_ssize_t, int, void *, void *, Py_ssize_t) noexcept nogil
        void (*brgemm_pairs)(const fc_reduction *, const void *, const Py_ssize_t *, Py_ssize_t, const void *, Py_ssize_t, int,
                             void *, int) noexcept nogil
        void (*lay_patches)(const fc_patches *, const void *, const Py_ssize_t *, Py_ssize_t, int, void *) noexcept nogil
        int digits
        void (*tally)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, fc_tally *) noexcept nogil
        float (*spread)(const fc_tally *, Py_ssize_t, fc_spread *) noexcept nogil
        int (*spread_lanes)(const fc_tally *, Py_ssize_t, float *, fc_spread *) noexcept nogil
        int (*spread_weights)(const void *, Py_ssize_t, Py_ssize_t, int, fc_scales *) noexcept nogil
        void (*digits_weights)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, int, const fc_scales *, void *) noexcept nogil
        void (*digits_rows)(const void *, Py_ssize_t, Py_ssize_t, Py_ssize_t, float, void *) noexcept nogil
        void (*digits_run)(const void *, Py_ssize_t, float, void *, Py_ssize_t) noexcept nogil
        void (*digits_cells)(const void *, Py_ssize_t, float, int, void *) noexcept nogil
        void (*brgemm_cells)(const fc_reduction *, const void *, const void *, Py_ssize_t, void *, int) noexcept nogil
        void (*enter)() noexcept nogil
        void (*leave)() noexcept nogil

    void fc_fetch(const void *, Py_ssize_t) noexcept nogil
    const double FC_SUM_LIMIT
    Py_ssize_t FC_LAID_BYTES(Py_ssize_t, Py_ssize_t) noexcept nogil
    enum: FC_TINY, FC_ORDINARY, FC_HUGE
    enum: FC_INPUTS, FC_TAPS, FC_OUTPUTS

    ctypedef struct fc_isa:
        const char *name
        const fc_ukernels *f32
        const fc_ukernels *f64
        const fc_ukernels *split[3]
        const fc_ukernels *digits

    enum: FC_DEPTHWISE_PIXELS, FC_FLAT_ROWS, FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_BEYOND


# One copy of the C library in the process: the other modules reach it through these.
cdef const fc_ukernels *ukernels(Py_ssize_t item_size) noexcept nogil
cdef const fc_ukernels *split_ukernels(Py_ssize_t item_size, int pieces) noexcept nogil
cdef const fc_ukernels *digit_ukernels(Py_ssize_t item_size) noexcept nogil
cdef char *arena(int slot, Py_ssize_t bytes) noexcept nogil
cdef int usable_threads(int wanted) noexcept nogil
cdef void fence() noexcept nogil

# Weights that a driver keeps for the next call, and whether it found numbers among them that it can't use.
cdef class Memory:
    cdef char *data
    cdef bint refused
