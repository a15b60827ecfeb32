/* AMX: float32 products out of bf16 ones. Each number is split into pieces of 8 bits, x = x0 + x1 + x2; the tile multiplies
 * the pieces and adds up the products in float32.
 *
 *    pieces   products                  a product's error, at most     PyTorch's word
 *    3        20 10 11 01 02 00  (x6)   2^-26: float32 has 2^-24       "highest"
 *    2        10 00 01           (x3)   2^-16                          "high"
 *    1        00                 (x1)   2^-8                           "medium"
 *
 * G. Henry, P. T. P. Tang, A. Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
 * Computations", arXiv 1904.06376.
 *
 *                       B: 6 | 7          A tile register is 16 rows of 64 bytes. 4 hold 32 x 32 sums, 2 hold 32 rows x 32
 *                      +----+----+        channels of a piece of the image, 2 hold 32 channels x 32 filters of a piece of
 *              A:  4   | 0  | 1  |        the weights, [pair of channels][filter][2].
 *                      +----+----+
 *                  5   | 2  | 3  |        Packed image    [cell][block of 32 channels][piece][32]
 *                      +----+----+        Packed weights  [tap][block of 32 channels][vector][piece][16][16][2]
 *
 * In the gradient of the weights pixels take the place of channels, filters that of pixels and channels that of filters: the gradient
 * of the output is packed to [filter][block of 32 pixels][piece][32], the image to [vector][piece][pair of pixels][16][2].
 *
 * Every tile row is one cache line, if the packed arrays are 64-byte aligned. The tile treats subnormal numbers as zero,
 * pieces and products among them.
 */
#include "amx_tile.h"

enum { CHANNELS = 32 };

#ifdef FC_AMX_MODEL
_Thread_local fc_amx_registers fc_model;
#endif

/* ------------------------------------------------------------------------------------------------ batch-reduce GEMM */

/* Which pieces of image and weights are multiplied, in an order in which each product needs one new load at most. */
static const struct {
    int n;
    signed char image[6], weight[6];
} PRODUCTS[MAX_PIECES + 1] = {
    [1] = {1, {0}, {0}},
    [2] = {3, {1, 0, 0}, {0, 0, 1}},
    [3] = {6, {2, 1, 1, 0, 0, 0}, {0, 0, 1, 1, 2, 0}},
};

/* A register's number is part of the instruction: these must be macros. */
#define LOAD_IMAGE(reg, n, p)                                                 \
    do {                                                                      \
        if (evenly[n]) {                                                      \
            _tile_loadd(reg, image[n] + (p) * ROW_BYTES, spacing[n]);         \
        } else {                                                              \
            gather(image[n] + (p) * ROW_BYTES, rows[n].offset, copies[n][p]); \
            _tile_loadd(reg, copies[n][p], ROW_BYTES);                        \
        }                                                                     \
    } while (0)

#define FOR_SUMS(DO)                        \
    do {                                    \
        DO(0, c, c_bytes);                  \
        if (wide)                           \
            DO(1, c + LANES, c_bytes);      \
        if (high)                           \
            DO(2, lower, c_bytes);          \
        if (high && wide)                   \
            DO(3, lower + LANES, c_bytes);  \
    } while (0)
#define ZERO(reg, at, stride) _tile_zero(reg)

/* All products of a step's pieces, of one or (high) two registers of rows by one or (wide) two of columns, and something BESIDE. */
#define MULTIPLY_PIECES(LOAD_ROWS, LOAD_COLUMNS, BESIDE)                              \
    UNROLL for (int i = 0; i < PRODUCTS[pieces].n; i++) {                             \
        const int p = PRODUCTS[pieces].image[i], q = PRODUCTS[pieces].weight[i];      \
        if (i == 0 || p != PRODUCTS[pieces].image[i - 1]) {                           \
            LOAD_ROWS(4, 0, p);                                                       \
            if (high)                                                                 \
                LOAD_ROWS(5, 1, p);                                                   \
        }                                                                             \
        if (i == 0 || q != PRODUCTS[pieces].weight[i - 1]) {                          \
            LOAD_COLUMNS(6, 0, q);                                                    \
            if (wide)                                                                 \
                LOAD_COLUMNS(7, 1, q);                                                \
        }                                                                             \
        _tile_dpbf16ps(0, 4, 6);                                                      \
        if (wide)                                                                     \
            _tile_dpbf16ps(1, 4, 7);                                                  \
        if (high)                                                                     \
            _tile_dpbf16ps(2, 5, 6);                                                  \
        if (high && wide)                                                             \
            _tile_dpbf16ps(3, 5, 7);                                                  \
        BESIDE                                                                        \
    }

/* A tile store that comes some 600 ns or more after the last one takes 250 ns longer (docs/performance.md). What it stores in
 * between is nobody's. */
enum { PRODUCTS_BETWEEN_STORES = 96 };
#define KEEP_STORING(reg, scratch)                                                           \
    do {                                                                                     \
        if ((unstored += 4 * PRODUCTS[pieces].n) >= PRODUCTS_BETWEEN_STORES) {               \
            _tile_stored(reg, scratch, ROW_BYTES);                                           \
            unstored = 0;                                                                    \
        }                                                                                    \
    } while (0)

/* 16 or (high) 32 rows by 16 or (wide) 32 filters; high, wide and pieces are constants where this is inlined, and so is whether
 * pieces of the weights are a plane each, or (0) follow one another. */
INLINE void tile(const fc_reduction *r, const char *a, const tile_rows rows[2], const int high, const char *b,
                 const ptrdiff_t plane, const int wide, const int pieces, float *c, int accumulate)
{
    char copies[2][MAX_PIECES][TILE_BYTES] __attribute__((aligned(64)));
    char scratch[TILE_BYTES] __attribute__((aligned(64)));
    const int evenly[2] = {rows[0].evenly, high && rows[1].evenly};
    const ptrdiff_t spacing[2] = {rows[0].offset[1], high ? rows[1].offset[1] : 0};
    const ptrdiff_t scale = 2 * pieces, blocks = r->depth / CHANNELS, c_bytes = r->c_step * (ptrdiff_t)sizeof(float);
    float *const lower = c + ROWS * r->c_step;
    int unstored = 0;
    if (accumulate)
        FOR_SUMS(_tile_loadd);
    else
        FOR_SUMS(ZERO);

    const ptrdiff_t weight_piece = plane ? 2 * plane : TILE_BYTES;
    for (ptrdiff_t t = 0; t < r->n_taps; t++) {
        const char *weights = b + (r->b_taps ? r->b_taps[t] : t * r->b_tap) * (plane ? 2 : scale);
        const char *image[2] = {a + r->taps[t] * scale + rows[0].first, a + r->taps[t] * scale};
        if (high)
            image[1] += rows[1].first;
        for (ptrdiff_t block = 0; block < blocks; block++) {
#define LOAD_COLUMNS(reg, n, q) _tile_loadd(reg, weights + ((n) * pieces + (q)) * weight_piece, ROW_BYTES)
            MULTIPLY_PIECES(LOAD_IMAGE, LOAD_COLUMNS, {});
#undef LOAD_COLUMNS
            KEEP_STORING(4, scratch);
            image[0] += pieces * ROW_BYTES;
            image[1] += pieces * ROW_BYTES;
            weights += plane ? TILE_BYTES : (wide + 1) * pieces * TILE_BYTES;
        }
    }
    FOR_SUMS(_tile_stored);
}

INLINE void brgemm(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows, const void *b,
                   const ptrdiff_t plane, int vectors, const int pieces, void *sums, int accumulate)
{
    tile_rows placed[2];
    for (float *c = sums; n_rows > 0; n_rows -= 2 * ROWS, rows += 2 * ROWS, c += 2 * ROWS * r->c_step) {
        place(&placed[0], rows, n_rows, 2 * pieces);
        STORES_DONE;
        if (n_rows > ROWS) {
            place(&placed[1], rows + ROWS, n_rows - ROWS, 2 * pieces);
            if (vectors == 2)
                tile(r, a, placed, 1, b, plane, 1, pieces, c, accumulate);
            else
                tile(r, a, placed, 1, b, plane, 0, pieces, c, accumulate);
        } else if (vectors == 2) {
            tile(r, a, placed, 0, b, plane, 1, pieces, c, accumulate);
        } else {
            tile(r, a, placed, 0, b, plane, 0, pieces, c, accumulate);
        }
    }
}

static void fc_f32_brgemm_x1__amx(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows,
                                  const void *b, int vectors, void *c, int accumulate)
{
    brgemm(r, a, rows, n_rows, b, 0, vectors, 1, c, accumulate);
}

static void fc_f32_brgemm_x3__amx(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows,
                                  const void *b, int vectors, void *c, int accumulate)
{
    brgemm(r, a, rows, n_rows, b, 0, vectors, 2, c, accumulate);
}

static void fc_f32_brgemm_x6__amx(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows,
                                  const void *b, int vectors, void *c, int accumulate)
{
    brgemm(r, a, rows, n_rows, b, 0, vectors, 3, c, accumulate);
}

static void fc_f32_brgemm_pairs_x1__amx(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows,
                                        const void *b, ptrdiff_t plane, int vectors, void *c, int accumulate)
{
    brgemm(r, a, rows, n_rows, b, plane, vectors, 1, c, accumulate);
}

static void fc_f32_brgemm_pairs_x3__amx(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows,
                                        const void *b, ptrdiff_t plane, int vectors, void *c, int accumulate)
{
    brgemm(r, a, rows, n_rows, b, plane, vectors, 2, c, accumulate);
}

static void fc_f32_brgemm_pairs_x6__amx(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows,
                                        const void *b, ptrdiff_t plane, int vectors, void *c, int accumulate)
{
    brgemm(r, a, rows, n_rows, b, plane, vectors, 3, c, accumulate);
}

static ptrdiff_t fc_f32_saturate__amx(ptrdiff_t rounds, void *sums)
{
    SATURATE(_tile_dpbf16ps, rounds, sums);
    return rounds * 4 * ROWS * LANES * CHANNELS * 2;
}

/* -------------------------------------------------------------------------------------------------------- splitting */

typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

#ifdef __AVX512BW__ /* GCC finds two and three instructions for these */
INLINE halves upper_halves(words x)
{
    const words odd = {0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d};
    return (halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)odd, (__m512i)x));
}

INLINE void store_upper_halves(words x, words y, uint16_t *out)
{
    const words odd = {0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d,
                       0x230021, 0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035, 0x3b0039, 0x3f003d};
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16((__m512i)x, (__m512i)odd, (__m512i)y));
}

INLINE words pair_upper_halves(words low, words high)
{
    const words pairs = {0x210001, 0x230003, 0x250005, 0x270007, 0x290009, 0x2b000b, 0x2d000d, 0x2f000f,
                         0x310011, 0x330013, 0x350015, 0x370017, 0x390019, 0x3b001b, 0x3d001d, 0x3f001f};
    return (words)_mm512_permutex2var_epi16((__m512i)low, (__m512i)pairs, (__m512i)high);
}
#else
INLINE words pair_upper_halves(words low, words high) { return low >> 16 | (high & 0xffff0000); }
INLINE halves upper_halves(words x) { return __builtin_convertvector(x >> 16, halves); }

INLINE void store_upper_halves(words x, words y, uint16_t *out)
{
    *(halves *)out = upper_halves(x);
    *(halves *)(out + LANES) = upper_halves(y);
}
#endif

/* The pieces of 16 numbers, each the upper half of a word. What is left for the next piece is exact, and one bit shorter if a
 * piece is rounded to nearest: away from zero where two are, which is faster; but to even if it is the only one. No more than 8 bits
 * are left for the third. Words of magnitudes are ordered as the magnitudes are, inf and NaN above all numbers. */
INLINE void split(floats x, const int pieces, words out[MAX_PIECES], words *largest)
{
    keep_larger(largest, (words)x & 0x7fffffff);
    UNROLL for (int p = 0; p < pieces; p++) {
        const words bits = (words)x;
        if (p + 1 < pieces) {
            out[p] = (bits + 0x8000) & 0xffff0000;
            x -= (floats)out[p];
        } else if (pieces == MAX_PIECES) {
            out[p] = bits;
        } else {
            out[p] = bits + (pieces == 1 ? 0x7fff + (bits >> 16 & 1) : (words){0} + 0x8000);
        }
    }
}

INLINE int size(words largest)
{
    enum { FLOOR = (127 - 90) << 23, LIMIT = (127 + 48) << 23 }; /* 2^-90; FC_SUM_LIMIT */
    uint32_t most = 0;
    for (int i = 0; i < LANES; i++)
        most = largest[i] > most ? largest[i] : most;
    return most >= LIMIT ? FC_HUGE : most >= FLOOR ? FC_ORDINARY : most > 0 ? FC_TINY : 0;
}

/* Two vectors, neighbours in the line of each piece. */
INLINE void split_two(floats low, floats high, const int pieces, uint16_t *out, ptrdiff_t line, words *largest)
{
    words parts[2][MAX_PIECES];
    split(low, pieces, parts[0], largest);
    split(high, pieces, parts[1], largest);
    UNROLL for (int p = 0; p < pieces; p++)
        store_upper_halves(parts[0][p], parts[1][p], out + p * line);
}

/* Rows of n numbers, filled up with zeros, to [n / 32][piece][32]. */
INLINE int split_rows(const float *in, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n, const int pieces, uint16_t *out)
{
    const ptrdiff_t whole = n / CHANNELS * CHANNELS;
    words largest = {0};
    for (; rows > 0; rows--, in += step) {
        for (const float *at = in; at < in + whole; at += CHANNELS, out += pieces * CHANNELS) {
            __builtin_prefetch(at + 2 * step); /* a row is too short for the hardware to see where it leads */
            __builtin_prefetch(at + 2 * step + LANES);
            split_two(*(const floats *)at, *(const floats *)(at + LANES), pieces, out, CHANNELS, &largest);
        }
        if (whole < n) {
            floats low, high;
            load(in + whole, n - whole, &low);
            load(in + whole + LANES, n - whole - LANES, &high);
            split_two(low, high, pieces, out, CHANNELS, &largest);
            out += pieces * CHANNELS;
        }
    }
    return size(largest);
}

/* A row of n numbers to [n / run][piece][run]; a run may be an odd number of vectors. */
INLINE int split_runs(const float *in, ptrdiff_t n, ptrdiff_t run, const int pieces, uint16_t *out)
{
    words largest = {0};
    for (const float *end = in + n; in < end; out += (pieces - 1) * run) {
        const float *const last = in + run;
        for (; last - in >= 2 * LANES; in += 2 * LANES, out += 2 * LANES)
            split_two(*(const floats *)in, *(const floats *)(in + LANES), pieces, out, run, &largest);
        if (in < last) {
            words parts[MAX_PIECES];
            split(*(const floats *)in, pieces, parts, &largest);
            UNROLL for (int p = 0; p < pieces; p++)
                *(halves *)(out + p * run) = upper_halves(parts[p]);
            in += LANES, out += LANES;
        }
    }
    return size(largest);
}

/* A pair of channels, one row of a tile for each piece. */
INLINE void split_pair(floats even, floats odd, const int pieces, char *row, words *largest)
{
    words low[MAX_PIECES], high[MAX_PIECES];
    split(even, pieces, low, largest);
    split(odd, pieces, high, largest);
    UNROLL for (int p = 0; p < pieces; p++)
        *(words *)(row + p * TILE_BYTES) = pair_upper_halves(low[p], high[p]);
}

INLINE int split_weights(const float *weights, ptrdiff_t step, ptrdiff_t channels, ptrdiff_t taps, int vectors,
                         const int pieces, void *out)
{
    const ptrdiff_t width = vectors * LANES;
    char *panel = out;
    words largest = {0};
    for (ptrdiff_t t = 0; t < taps; t++)
        for (ptrdiff_t first = 0; first < channels; first += CHANNELS)
            for (int v = 0; v < vectors; v++, panel += pieces * TILE_BYTES) {
                const float *in = weights + first * step + t * width + v * LANES;
                const ptrdiff_t pairs = (channels - first < CHANNELS ? channels - first : CHANNELS) / 2;
                char *row = panel, *const whole = panel + pairs * ROW_BYTES;
                for (; row < whole; row += ROW_BYTES, in += 2 * step) {
                    __builtin_prefetch(in + width); /* the next panel, if rows of an image are split where they are */
                    __builtin_prefetch(in + step + width);
                    split_pair(*(const floats *)in, *(const floats *)(in + step), pieces, row, &largest);
                }
                for (; row < panel + TILE_BYTES; row += ROW_BYTES) { /* half a pair, and none */
                    const int half = row == whole && channels % 2 && pairs < CHANNELS / 2;
                    split_pair(half ? *(const floats *)in : (floats){0}, (floats){0}, pieces, row, &largest);
                }
            }
    return size(largest);
}

/* Cells of 16 channels to pairs that begin at even cells, and (both) at odd ones, from the cell before on. */
INLINE int split_pairs(const float *in, ptrdiff_t n, const int pieces, char *even, char *odd, const int both, ptrdiff_t plane)
{
    words largest = {0}, before[MAX_PIECES], low[MAX_PIECES], high[MAX_PIECES];
    if (both)
        split(*(const floats *)(in - LANES), pieces, before, &largest);
    for (ptrdiff_t i = 0; i < n; i += 2, in += 2 * LANES, even += ROW_BYTES, odd += ROW_BYTES) {
        split(*(const floats *)in, pieces, low, &largest);
        split(*(const floats *)(in + LANES), pieces, high, &largest);
        UNROLL for (int p = 0; p < pieces; p++) {
            *(words *)(even + p * plane) = pair_upper_halves(low[p], high[p]);
            if (both)
                *(words *)(odd + p * plane) = pair_upper_halves(before[p], low[p]);
            before[p] = high[p];
        }
    }
    return size(largest);
}

INLINE int split_either(const float *in, ptrdiff_t n, const int pieces, char *even, char *odd, ptrdiff_t plane)
{
    return odd ? split_pairs(in, n, pieces, even, odd, 1, plane) : split_pairs(in, n, pieces, even, even, 0, plane);
}

static int fc_f32_split_pairs__amx(const void *cells, ptrdiff_t n, int pieces, void *even, void *odd, ptrdiff_t plane)
{
    return pieces == 3   ? split_either(cells, n, 3, even, odd, 2 * plane)
           : pieces == 2 ? split_either(cells, n, 2, even, odd, 2 * plane)
                         : split_either(cells, n, 1, even, odd, 2 * plane);
}

static int fc_f32_split_rows__amx(const void *image, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n, int pieces, void *out)
{
    return pieces == 3   ? split_rows(image, rows, step, n, 3, out)
           : pieces == 2 ? split_rows(image, rows, step, n, 2, out)
                         : split_rows(image, rows, step, n, 1, out);
}

static int fc_f32_split_runs__amx(const void *image, ptrdiff_t n, ptrdiff_t run, int pieces, void *out)
{
    return pieces == 3   ? split_runs(image, n, run, 3, out)
           : pieces == 2 ? split_runs(image, n, run, 2, out)
                         : split_runs(image, n, run, 1, out);
}

static int fc_f32_split_weights__amx(const void *weights, ptrdiff_t step, ptrdiff_t channels, ptrdiff_t taps, int vectors,
                                     int pieces, void *out)
{
    return pieces == 3   ? split_weights(weights, step, channels, taps, vectors, 3, out)
           : pieces == 2 ? split_weights(weights, step, channels, taps, vectors, 2, out)
                         : split_weights(weights, step, channels, taps, vectors, 1, out);
}

/* --------------------------------------------------------------------------------------------------------- patches */

static void fc_f32_lay_patches__amx(const fc_patches *patches, const void *cells, const ptrdiff_t *pixels, ptrdiff_t n_pixels,
                                    int pieces, void *out)
{
    if (pieces == 3)
        lay_patches(patches, cells, pixels, n_pixels, 3, 2, out);
    else if (pieces == 2)
        lay_patches(patches, cells, pixels, n_pixels, 2, 2, out);
    else
        lay_patches(patches, cells, pixels, n_pixels, 1, 2, out);
}

/* ---------------------------------------------------------------------------------------------------------- planes */

#include "amx_planes.h"

/* ------------------------------------------------------------------------------------------------------ tile registers */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} configuration;

static void fc_enter__amx(void)
{
    static const configuration all = {
        .palette = 1,
        .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    _tile_loadconfig(&all);
}

static void fc_leave__amx(void) { _tile_release(); }

/* ------------------------------------------------------------------------------------------------------------- table */

/* Whether a small product comes out as plain C has it: integers of more bits than one piece holds, whose sums are exact. */
static int works(const fc_ukernels *kernels)
{
    enum { M = 2 * ROWS, N = 2 * LANES, DEPTH = 2 * CHANNELS };
    static float image[M][DEPTH], weights[DEPTH][N], sums[M][N];
    static char a[sizeof image / 2 * MAX_PIECES] __attribute__((aligned(64)));
    static char b[sizeof weights / 2 * MAX_PIECES] __attribute__((aligned(64)));
    static fc_scales scales;
    const float scale = 0x1p13F; /* of numbers below 2^10 */
    ptrdiff_t rows[M], tap = 0;
    const fc_reduction reduction = {.taps = &tap, .n_taps = 1, .depth = DEPTH, .a_step = 1, .b_step = N, .c_step = N,
                                    .scales = &scales, .scale = &scale, .products = 8};
    for (int m = 0; m < M; m++) {
        rows[m] = (m < ROWS ? m : M + ROWS - 1 - m) * DEPTH;
        for (int k = 0; k < DEPTH; k++) {
            image[m][k] = (float)((7 * m + 311 * k) % 1021 - 510);
            weights[k][m] = (float)((293 * m + 5 * k) % 1019 - 509);
        }
    }
    if (kernels->digits) {
        kernels->digits_rows(image, 1, 0, M * DEPTH, scale, a);
        kernels->spread_weights(weights, DEPTH, N, 2, &scales);
        kernels->digits_weights(weights, N, DEPTH, 1, 2, &scales, b);
    } else {
        kernels->split_rows(image, 1, 0, M * DEPTH, kernels->pieces, a);
        kernels->split_weights(weights, N, DEPTH, 1, 2, kernels->pieces, b);
    }
    kernels->enter();
    kernels->brgemm(&reduction, a, rows, M, b, 2, sums, 0);
    kernels->leave();
    int equal = 1;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int k = 0; k < DEPTH; k++)
                sum += image[rows[m] / DEPTH][k] * weights[k][n];
            equal &= sum == sums[m][n];
        }
    return equal;
}

const fc_isa *fc_start_amx(const fc_isa *below)
{
    static fc_ukernels tables[MAX_PIECES], digits;
    static fc_isa isa = {.name = "amx", .split = {&tables[0], &tables[1], &tables[2]}, .digits = &digits};
    static enum { UNKNOWN, BROKEN, WORKING } state; /* asked by one thread at a time: it holds the GIL */
    if (state == UNKNOWN) {
        for (int p = 0; p < MAX_PIECES; p++) { /* what isn't said here is as it is below */
            tables[p] = *below->f32;
            tables[p].lanes = LANES;
            tables[p].tile_rows = 2 * ROWS;
            tables[p].depth_step = CHANNELS;
            tables[p].fused = 0; /* pieces are rounded, each on its own */
            tables[p].pieces = p + 1;
            tables[p].packed = 2 * (p + 1);
            tables[p].saturate = fc_f32_saturate__amx;
            tables[p].split_rows = fc_f32_split_rows__amx;
            tables[p].split_runs = fc_f32_split_runs__amx;
            tables[p].split_weights = fc_f32_split_weights__amx;
            tables[p].split_pairs = fc_f32_split_pairs__amx;
            tables[p].lay_patches = fc_f32_lay_patches__amx;
            tables[p].enter = fc_enter__amx;
            tables[p].leave = fc_leave__amx;
        }
        tables[0].brgemm = fc_f32_brgemm_x1__amx;
        tables[0].brgemm_pairs = fc_f32_brgemm_pairs_x1__amx;
        tables[0].planar_split = fc_f32_planar_split_x1__amx;
        tables[1].brgemm = fc_f32_brgemm_x3__amx;
        tables[1].brgemm_pairs = fc_f32_brgemm_pairs_x3__amx;
        tables[1].planar_split = fc_f32_planar_split_x3__amx;
        tables[2].brgemm = fc_f32_brgemm_x6__amx;
        tables[2].brgemm_pairs = fc_f32_brgemm_pairs_x6__amx;
        tables[2].planar_split = fc_f32_planar_split_x6__amx;
        digits = tables[2];
        fc_fill_digits(&digits);
        isa.f32 = below->f32;
        isa.f64 = below->f64;
        state = works(&tables[2]) && works(&digits) ? WORKING : BROKEN;
    }
    return state == WORKING ? &isa : NULL;
}
