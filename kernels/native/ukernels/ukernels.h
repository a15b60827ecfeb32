/* The microkernels: plain C, single-threaded, no malloc, no Python. One table of function pointers per instruction set and
 * element type; a driver knows nothing else of the machine.
 *
 * Every array is a pointer to elements of the table's type; every offset, step and stride counts elements. No pointer
 * needs an alignment beyond that of its element, unless it is said.
 */
#ifndef FASTCONV_UKERNELS_H
#define FASTCONV_UKERNELS_H

#include <stddef.h>
#include <stdint.h>

/* How far the largest of some numbers is above the others (a tile of digits; digits.pyx says what for): squared, over the mean
 * square; and the square of the mean magnitude over the mean square, which is the less the more of them are zeros. 1 where
 * there is nothing else. Scales of a panel's weights, and the worst spread among its filters. */
typedef struct {
    float peak, density;
} fc_spread;
typedef struct {
    float scale[32];
    fc_spread spread;
    float unused[14]; /* whole lines */
} fc_scales;

/* Magnitudes, counted in as many sums as there are lanes. */
typedef struct {
    float largest[16], sum[16], squares[16];
} fc_tally;

/* Where the elements of a finished tile go, and what happens to them on the way. */
typedef struct {
    const void *bias; /* one value for each of `channels`, or NULL */
    int relu;
    ptrdiff_t pixel_stride, channel_stride;
} fc_epilogue;

/* The reduction of one tile: C[m][n] (+)= sum over taps t, k < depth of
 *     a[rows[m] + taps[t] + k * a_step] * b[b_taps[t] + k * b_step + n],   b_taps[t] = t * b_tap where b_taps is NULL
 *
 *            n ->                      a: packed image (or patches), reached through offsets: a tile may span image rows
 *        +---------+  b panel          b: packed panel, `width` = 1, 2 or 4 vectors of contiguous elements for each (t, k)
 *        |         |  (taps * depth    c: rows x width, scratch or the output itself
 *   k|   +---------+   rows)
 *    v   +---------+
 *  a --->|  m x n  |  c, in registers
 *        +---------+
 */
typedef struct {
    const ptrdiff_t *taps, *b_taps;
    ptrdiff_t n_taps, depth, a_step, b_tap, b_step;
    ptrdiff_t c_step; /* between rows of c */
    ptrdiff_t ahead;  /* 0, or how far on the b is that is needed next, and had better be fetched; a tile of pieces doesn't */
    const fc_scales *scales; /* a tile of digits: of b; ... */
    const float *scale;      /* ... of rows of a, ... */
    ptrdiff_t scale_step;    /* ... so far apart; and how many products ... */
    int products;            /* ... of two digits are made for a product, 6, 7 or 8 */
    const fc_epilogue *finish; /* NULL, or what sums get before they are stored: bias and activation; not by a tile of pieces */
    int apart; /* so many taps are summed by themselves and then added to c, for sums of sums have smaller errors; 0: all are */
} fc_reduction;

/* One with nothing but taps, whose numbers of a are neighbours. */
static inline fc_reduction fc_reduction_over(const ptrdiff_t *taps, ptrdiff_t n_taps, ptrdiff_t depth)
{
    const fc_reduction over = {.taps = taps, .n_taps = n_taps, .depth = depth, .a_step = 1};
    return over;
}

enum { FC_FLAT_ROWS = 3 };

/* Runs of elements in a strided array: element i of run r is data[r * run + i * step]. */
typedef struct {
    void *data;
    ptrdiff_t run, step;
    int item;   /* bytes in an element of winners; 0: nobody wants them */
    int stream; /* whether what is stored had better pass by the caches; then fc_fence comes before others may see it */
} fc_runs;

/* The cells that a window sees, or the windows that see a cell: where they are, and the cells' numbers in the window. */
typedef struct {
    ptrdiff_t count;
    const ptrdiff_t *offsets;
    const int32_t *numbers;
} fc_cells;

/* What a cell sees of a line of windows: so many, from `first` on, `step` apart, and its numbers in them, from `number` on. */
typedef struct {
    ptrdiff_t count, first, step;
    int32_t number, number_step;
} fc_columns;

/* Classes of cells: so many, that far apart. */
enum { FC_CLASSES = 4 };
typedef struct {
    int count;
    ptrdiff_t step;
} fc_classes;

/* What pixels see: rows of `run` neighbouring cells, so far from a pixel's first cell. The pieces of a cell are `plane` apart. A
 * patch, all rows one after another, is filled up to `depth` cells, FC_PATCH at most, with whatever is finite. */
enum { FC_PATCH = 1024 };
typedef struct {
    const ptrdiff_t *rows;
    ptrdiff_t n_rows, run, plane, depth;
} fc_patches;

/* How rows of an image become rows of cells, padding included: with more than one phase, cell i of a row goes to the
 * row's part number i % phases, so that cells a stride apart become neighbours. */
typedef struct {
    ptrdiff_t row_step, cell_step; /* of the image */
    ptrdiff_t above, rows, below;  /* rows of zeros, of the image, of zeros */
    ptrdiff_t before, cells;       /* zeros in front of a row, and its cells */
    ptrdiff_t phases, wide;        /* parts of a row, each filled up with zeros to `wide`, a multiple of lanes */
    ptrdiff_t image_step, plane_step; /* from plane to plane */
} fc_padding;

/* What pixels see of a depthwise convolution whose channels are neighbours. Pixels whose windows reach beyond an image's edge are at least
 * FC_DEPTHWISE_PIXELS neighbours, and so are the taps of a row. */
enum { FC_DEPTHWISE_PIXELS = 7 };
typedef struct {
    const ptrdiff_t *taps, *weights; /* from a pixel's first cell, from the first weights */
    ptrdiff_t n_taps;
    int wide;                        /* taps come in rows of so many, all alike; 0: they don't */
    ptrdiff_t channels, cell;        /* cells that are neighbours are so far apart */
    ptrdiff_t out_step;
    const void *bias;                /* of each channel, or NULL */
    int relu;
    ptrdiff_t before, after;         /* how far the first window reaches beyond the image, and the last one */
} fc_depthwise;

/* A row of a depthwise convolution's pixels, `wide` neighbouring taps of each, and the cells that they see from the first pixel's first tap
 * on: of these, from `from` and before `to` are in the image. Pixels are `wide` at least, and all but the first `wide` cells and those beyond
 * the pixels are there. */
typedef struct {
    ptrdiff_t wide, pixels, from, to;
    ptrdiff_t channels, cell_step, grad_step;
} fc_window;

/* Windows of max pooling, [z][y][x], and their cells: where they are from a window's first one, in memory and along each axis. `lanes` of
 * them are found at once, neighbours or the same one in neighbouring channels, in each of some turns. Steps are in elements. */
enum { FC_TURNS = 16 };
typedef struct {
    ptrdiff_t cell, grad, winner;
} fc_apart;
typedef struct {
    const ptrdiff_t *offsets;
    const int32_t *places[3];
    const int32_t *near_offsets; /* the same offsets; or NULL, if there are more than 32, a cell is too far away for them, or lanes are apart */
    const int32_t *first;        /* of all windows of a plane, which follow upon each other: where the first cell is, ... */
    const uint32_t *inside;      /* ... and which cells are in the image, a bit each; or NULL, and windows are found row by row */
    ptrdiff_t reach[3];          /* the place of the last cell */
    ptrdiff_t image[3], windows[3], stride[3], pad[3];
    ptrdiff_t cell_step[3];      /* from a cell of the image to the next */
    ptrdiff_t grad_step[3], winner_step[3];
    fc_apart lane, turn;
    ptrdiff_t lane_stride;       /* 0, or how many cells of a row neighbouring windows are apart */
    int winner_item;             /* bytes */
} fc_scatter;

/* Rows of an image, [plane][slab][row]: how many, and how far apart. */
typedef struct {
    ptrdiff_t size[3], step[3];
} fc_rows;

/* The phases of a stride: cells a stride apart are neighbours. [z % stride[0]][y % stride[1]][x % stride[2]], each `phase` elements
 * from the one before, has rows that are pitch[] apart, from plane to plane, slab to slab, row to row. The first cell of the image
 * is the cell before[] of them. */
typedef struct {
    ptrdiff_t stride[3], before[3], pitch[3];
    ptrdiff_t phase;
} fc_phases;

/* Rows of pixels, and what they see of padded planes. */
typedef struct {
    const ptrdiff_t *taps;       /* from the first cell that a pixel sees */
    ptrdiff_t n_taps;
    ptrdiff_t high, tap_row;     /* of one filter: a tap is a column of so many, that far apart; where the columns' weights */
    const ptrdiff_t *weight_taps; /* are, from the first, and how far apart those of a column */
    ptrdiff_t weight_row;
    ptrdiff_t rows, columns;
    ptrdiff_t cell_row, out_row; /* from a row of pixels to the next, in the planes and in the output */
    ptrdiff_t out_column, out_filter; /* pixels are neighbours, or, where nothing is accumulated, 2 apart */
    ptrdiff_t weight_group, cell_group; /* from one group of one filter to the next */
    const void *bias;            /* of each filter, or NULL */
    int accumulate, relu;        /* whether sums are added to the output; the activation comes last */
    void *laid;                  /* NULL, or where the first filters lay the cells, rows laid_row apart, and the others read them */
    ptrdiff_t laid_row;
    ptrdiff_t before;            /* pixels of the first vector that are not wanted */
    ptrdiff_t ahead;             /* how far on the cells are that are needed next, and had better be fetched */
} fc_planes;

/* What planar_split takes of `laid`, for so many pairs of taps, of all rows that are seen, and filters. */
#define FC_LAID_BYTES(pairs, filters) (((pairs) + 16) * 6 * 64 + ((filters) + 31) / 32 * 32 * 128)

/* Tiles of Winograd's convolution. A side is a number of three digits, its stride, outputs and taps: 143 is F(4, 3). A tile
 * whose rows have the greater one has its axes exchanged. */
typedef struct {
    int rows, columns;              /* sides */
    int high, wide;                 /* of kind FC_TAPS: the taps that there are; others are zero */
    ptrdiff_t count;
    const ptrdiff_t *at;            /* the first cell of each */
    ptrdiff_t row_step, cell_step;  /* from cell to cell */
} fc_tiles;

enum { FC_INPUTS, FC_TAPS, FC_OUTPUTS };

typedef struct {
    int lanes;      /* elements in a vector */
    int tile_rows;  /* of a tile that is 1 or 2 vectors wide; with up to FC_FLAT_ROWS rows it may be 4 wide, with one 8 */
    int even_rows;  /* of one, of numbers, whose rows are evenly spaced in a: brgemm finds those */
    int depth_step; /* the depth of a reduction is a multiple of it */
    int fused;      /* whether a product is not rounded before it is added */

    /* Tiles of all rows; the sums are added to c if `accumulate`. A tile of pieces may overwrite rows of c beyond n_rows, up to
     * a multiple of half its rows, and read as many beyond evenly spaced rows of a, whatever is there: FC_BEYOND bytes at most. */
    void (*brgemm)(const fc_reduction *reduction, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows, const void *b,
                   int vectors, void *c, int accumulate);

    /* What limits brgemm: `rounds` of multiply-adds on numbers in registers, nothing loaded. Reads and writes 1 KiB at
     * `sums`, 64-byte aligned; returns how many multiplications and additions, of pieces where the tile multiplies pieces. */
    ptrdiff_t (*saturate)(ptrdiff_t rounds, void *sums);

    /* out[i * channel_stride + p * pixel_stride] = activation(c[p][i] + bias[i]); rows of c are `c_stride` apart. */
    void (*epilogue)(const fc_epilogue *epilogue, const void *c, ptrdiff_t c_stride, ptrdiff_t pixels,
                     ptrdiff_t channels, void *out);

    /* out[i * channel_stride + p] = activation(c[p % tiles][p / tiles][i] + bias[i]): neighbours from one tile after another. */
    void (*weave)(const fc_epilogue *epilogue, const void *const *c, ptrdiff_t tiles, ptrdiff_t c_stride, ptrdiff_t pixels,
                  ptrdiff_t channels, void *out);

    /* out[j * out_stride + i] = in[i * i_stride + j * j_stride] for i < ni, j < nj: every packing is made of this. */
    void (*transpose)(const void *in, ptrdiff_t i_stride, ptrdiff_t j_stride, ptrdiff_t ni, ptrdiff_t nj, void *out,
                      ptrdiff_t out_stride);

    /* c[p * out_step + i] = bias[i] + sum over taps of a[pixels[p] + taps[t] + i] * b[weights[t] + i] for i < channels, `lanes` at
     * least. */
    void (*depthwise)(const fc_depthwise *depthwise, const void *a, const ptrdiff_t *pixels, ptrdiff_t n_pixels, const void *b,
                      void *c);

    /* c[t][i] += sum over pixels p of a[p * a_step + taps[t] + i] * b[p * b_step + i] for i < block. */
    void (*depthwise_weight)(const ptrdiff_t *taps, ptrdiff_t n_taps, const void *a, ptrdiff_t a_step, const void *b,
                             ptrdiff_t b_step, ptrdiff_t n_pixels, ptrdiff_t block, void *c);

    /* The same for rows of taps, whose first ones are at `starts`: c[row * wide + t][i]. */
    void (*depthwise_weight_rows)(const fc_window *window, const ptrdiff_t *starts, ptrdiff_t n_rows, const void *a, const void *b, void *c);

    /* Planes as they are read below: [row][phase][wide]. */
    void (*pad)(const fc_padding *padding, ptrdiff_t planes, const void *image, void *out);

    /* out[f][r][x] (+)= sum over taps t of weight[t][f] * cells[r * cell_row + taps[t] + x], neighbouring pixels as lanes; up to
     * lanes - 1 cells beyond the last are read. Weights are packed in tiles, [filter / planar_filters][tap][planar_filters]; the last tile
     * is as narrow as there are filters. */
    int planar_filters;
    void (*planar)(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out);

    /* out[f][x] (+)= sum over channels i of weight[i][f] * cells[i * tap_row + x]: planar of 1x1 filters and a single row of pixels, of which
     * no cell is read that isn't wanted. All tiles of weights are as wide as the first, but a last one of half the filters or less. */
    void (*pointwise)(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out);

    /* sums[f][t][lane] += sum over rows r, and pixels x that are in this lane, of grad[f * out_filter + r * out_row + x]
     * * cells[taps[t] + r * cell_row + x]; nothing is read beyond the last pixel. And the lanes of n such sums, added up. */
    void (*planar_weight)(const fc_planes *planes, ptrdiff_t filters, const void *grad, const void *cells, void *sums);
    void (*sum_lanes)(const void *vectors, ptrdiff_t n, void *sums);

    /* planar for groups of one filter, whose weights are read where they are. What the next rows of pixels see is read, too, up to a
     * multiple of planar_rows. */
    int planar_rows;
    void (*planar_one)(const fc_planes *planes, ptrdiff_t groups, const void *weight, const void *cells, void *out);

    /* out[r * out_row + p] = in[p % tiles][r * in_row + p / tiles]: rows whose n neighbours come from one tile after another. */
    void (*zip)(const void *in, ptrdiff_t tiles, ptrdiff_t tile_step, ptrdiff_t rows, ptrdiff_t in_row, ptrdiff_t n, void *out,
                ptrdiff_t out_row);

    /* The maximum of each of runs * n windows that see the same cells, and its number unless winners->item is 0. A greater
     * cell wins, a NaN over everything; without any cell the maximum is -inf, the winner numbers[0].
     *     out[r][i] = max over t of in[r][i + offsets[t]] */
    void (*max_pool)(const fc_cells *cells, ptrdiff_t runs, ptrdiff_t n, const fc_runs *in, const fc_runs *out,
                     const fc_runs *winners);

    /* The same for a single run of neighbours, n a multiple of `lanes`, of cells that are finite or, where there is none, a NaN.
     * winners may be NULL. So many bytes that are read next are fetched meanwhile. */
    void (*max_pool_finite)(const fc_cells *cells, ptrdiff_t n, const void *in, void *out, uint8_t *winners, const void *ahead,
                            ptrdiff_t bytes);

    /* Rows of n neighbouring cells to phases, 1 or 2 along a row; returns whether all are finite. A row of a phase is followed by NaNs
     * for a vector at most, unless the next one is there. */
    int (*to_phases)(const fc_phases *phases, const fc_rows *rows, ptrdiff_t n, const void *image, void *out);

    /* Rows of so many bytes, steps in bytes, too. */
    void (*copy_rows)(const fc_rows *rows, const ptrdiff_t *out_step, ptrdiff_t bytes, const void *in, void *out);

    /* What each cell of the input gets from the windows that it may have won, in their order. Each class of cells has its
     * own sources; grad and winners have step 1 and the same runs.
     *     out[r][i][x] = sum over t of grad[r][i + offsets[x][t]] where winners[r][i + offsets[x][t]] = numbers[x][t] */
    void (*max_pool_grad)(const fc_cells *sources, const fc_classes *classes, ptrdiff_t runs, ptrdiff_t n,
                          const fc_runs *grad, const fc_runs *winners, const fc_runs *out);

    /* The same for rows of n neighbouring cells, whose `wide` classes, 16 at most, take turns, as do the rows' `high` classes. They see
     * the lines of windows of the one, and in each the columns of the other; window numbers are sums of a line's and a column's. Rows of
     * windows are window_step[] apart from plane to plane, slab to slab, row to row; up to a vector of windows is read behind those that
     * a row sees. */
    void (*max_pool_won)(const fc_cells *lines, ptrdiff_t high, ptrdiff_t wide, const fc_columns *columns, const fc_rows *rows,
                         const ptrdiff_t *window_step, ptrdiff_t n, const void *grad, const uint8_t *winners, void *out);

    /* Zeroes the image and adds gradients to the cells that won, window after window, in so many turns; of so many channels at once or,
     * if `lanes` is 0, of neighbouring windows. */
    void (*max_pool_scatter)(const fc_scatter *scatter, ptrdiff_t turns, ptrdiff_t lanes, const void *grad, const void *winners,
                             void *cells);

    /* Winograd: cells of tiles to points, out[point][p][i] from in[at[p] + i + cells], i < block, a multiple of `lanes`; and
     * points to cells. Of inputs, taps and (gradients of) outputs in one direction, of outputs and taps in the other. */
    void (*winograd_transform)(int kind, const fc_tiles *tiles, const void *in, ptrdiff_t block, void *out,
                               ptrdiff_t point_stride);
    void (*winograd_gather)(int kind, const fc_tiles *tiles, const void *in, ptrdiff_t point_stride, ptrdiff_t block,
                            void *out);

    /* total[i] += more[i] for i < n, a multiple of `lanes`. */
    void (*add)(void *total, const void *more, ptrdiff_t n);

    /* total[i * step] += more[i] for i < n. */
    void (*add_apart)(void *total, ptrdiff_t step, const void *more, ptrdiff_t n);

    /* Whether all of x lies strictly between -limit and limit; a NaN does not. */
    int (*all_below)(const void *x, ptrdiff_t n, double limit);

    /* grad_input[i] = output[i] > 0 ? grad[i] : 0 for i < n. */
    void (*relu_grad)(const void *output, const void *grad, ptrdiff_t n, void *grad_input);

    /* A tile that multiplies `pieces` of numbers (0: the numbers themselves, and the rest of this is NULL). Its brgemm reads
     * what these write: an offset of e elements is 2 * pieces * e bytes, a and b are 64-byte aligned, a_step is 1,
     * b_step the width of the tile, b_tap the depth times that; brgemm and saturate are called between `enter` and `leave`,
     * which are for one thread. Those that split return the size of the largest number, 0 if all are zero.
     * rows:    rows of n numbers, `step` apart, each filled up with zeros, to [n / depth_step][piece][depth_step], as brgemm reads
     *          them
     * runs:    n numbers to [n / run][piece][run], run a multiple of lanes
     * weights: [channel][tap][vectors], channels `step` apart, to [tap][channel][vectors], channels padded with zeros to a
     * multiple of depth_step
     * pairs:   n cells of `lanes` channels, n even, to [piece][pair of cells][channel][2], pieces `plane` elements apart; to `odd`,
     *          unless that is NULL, pairs that begin at odd cells, the first of them the cell before
     * brgemm_pairs takes such b, [vector][piece], `plane` apart, from the pair on where the reduction begins; offsets of b are
     * in elements of 2 bytes.
     * planar_split is planar for columns of taps, `high` of them, tap_row apart, a whole number of which come to cell_row. Weights are
     * rows, [filter][high][tap], taps filled up to an even number. Returns the size of the largest number.
     * lay_patches writes the patch of each pixel, [depth / depth_step][piece][depth_step]; up to 2 * depth_step - 1 cells beyond
     * a row are read. */
    int pieces;
    int packed; /* bytes of all pieces of a number */
    int (*split_rows)(const void *image, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n, int pieces, void *out);
    int (*split_runs)(const void *image, ptrdiff_t n, ptrdiff_t run, int pieces, void *out);
    int (*split_weights)(const void *weights, ptrdiff_t step, ptrdiff_t channels, ptrdiff_t taps, int vectors, int pieces,
                         void *out);
    int (*planar_split)(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out);
    int (*split_pairs)(const void *cells, ptrdiff_t n, int pieces, void *even, void *odd, ptrdiff_t plane);
    void (*brgemm_pairs)(const fc_reduction *reduction, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows, const void *b,
                         ptrdiff_t plane, int vectors, void *c, int accumulate);
    void (*lay_patches)(const fc_patches *patches, const void *cells, const ptrdiff_t *pixels, ptrdiff_t n_pixels, int pieces,
                        void *out);

    /* A tile of digits multiplies fixed-point numbers; it stores no more rows than are wanted.
     * tally:   counts rows of n numbers
     * spread:  makes of the n that were counted the scale, 0 if they can't be scaled, and keeps the worse of two spreads
     * spread_lanes, spread_weights: the same for each lane, for each filter of a panel, n weights `step` apart; return 0 if some can't be scaled
     * digits_rows, digits_weights: as split_rows, for numbers of one scale, and split_weights
     * digits_run: whole steps of them in order, [digit][n], `plane` apart
     * digits_cells: n cells of `lanes` channels to a line for each, [cell][digit][64], so that a tile's b may begin anywhere, or for
     *               those of a tile in each depth_step
     * brgemm_cells: a tile of rows a_step apart and one vector of such b, whose blocks of depth_step are so far apart */
    int digits;
    void (*tally)(const void *numbers, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n, fc_tally *tally);
    float (*spread)(const fc_tally *tally, ptrdiff_t n, fc_spread *spread);
    int (*spread_lanes)(const fc_tally *tally, ptrdiff_t n, float *scale, fc_spread *spread);
    int (*spread_weights)(const void *weights, ptrdiff_t n, ptrdiff_t step, int vectors, fc_scales *scales);
    void (*digits_weights)(const void *weights, ptrdiff_t step, ptrdiff_t channels, ptrdiff_t taps, int vectors,
                           const fc_scales *scales, void *out);
    void (*digits_rows)(const void *image, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n, float scale, void *out);
    void (*digits_run)(const void *image, ptrdiff_t n, float scale, void *out, ptrdiff_t plane);
    void (*digits_cells)(const void *cells, ptrdiff_t n, float scale, int anywhere, void *out);
    void (*brgemm_cells)(const fc_reduction *reduction, const void *a, const void *b, ptrdiff_t block_bytes, void *c,
                         int accumulate);
    void (*enter)(void);
    void (*leave)(void);
} fc_ukernels;

/* Products of numbers below it can be summed without overflow. */
#define FC_SUM_LIMIT 0x1p48

/* Sizes of numbers. TINY: the lesser pieces may be subnormal, which a tile may take for zero. HUGE: FC_SUM_LIMIT and more, inf
 * and NaN; their pieces can't be summed. */
enum { FC_TINY = 1, FC_ORDINARY = 2, FC_HUGE = 4 };

/* One instruction set: both tables, and those of a tile that multiplies 1, 2 or 3 pieces of float32 numbers, or its digits, or
 * NULL. */
typedef struct {
    const char *name;
    const fc_ukernels *f32, *f64, *split[3], *digits;
} fc_isa;

extern const fc_isa fc_isa_scalar, fc_isa_avx2, fc_isa_avx512;

/* amx.c: the instruction set on top of `below`, from which empty slots are inherited, or NULL if a small product comes out
 * wrong. Only for a CPU that has it: all of amx.c is compiled for that. */
const fc_isa *fc_start_amx(const fc_isa *below);

/* amx_digits.c: make a table that has the rest a tile of digits. */
void fc_fill_digits(fc_ukernels *table);

/* dispatch.c: the instruction sets that this build has; that this build and this CPU have, best last; and the one to use under a
 * cap (empty: none). */
size_t fc_built_isas(const char *names[], size_t capacity);
size_t fc_available_isas(const fc_isa *isas[], size_t capacity);
const fc_isa *fc_select_isa(const char *cap);

/* arena.c: workspace of this thread, 64-byte aligned, kept from call to call; slots don't disturb one another. FC_BEYOND bytes more
 * than were asked for may be read. NULL: no memory. */
enum { FC_BEYOND = 1 << 17 };
enum { FC_ARENA_BLOCK, FC_ARENA_WEIGHTS, FC_ARENA_SLOTS };
void *fc_arena(int slot, size_t bytes);

/* threads.c: how many threads a parallel region may take; 1 in a child of fork(), which has none of its parent's threads.
 * fc_fence: all that this thread has stored comes before what it stores from now on. */
int fc_max_threads(void);
int fc_usable_threads(int wanted);
void fc_fence(void);

/* Ask for some neighbouring lines before they are needed. */
static inline void fc_fetch(const void *first, ptrdiff_t bytes)
{
    for (ptrdiff_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)first + i);
}

#endif
