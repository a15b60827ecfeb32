/* AMX, fixed point: a number is a scale times an integer of three digits of 8 bits, x = (d0 2^16 + d1 2^8 + d2) / scale. The
 * tile multiplies digits, 64 at a time where it multiplies 32 pieces, and adds up the products exactly, in int32.
 *
 *    products                            of digits that are dropped    time
 *    6: 00 | 01 10 | 02 11 20            12 21 22                      half of x6's (amx.c)
 *    7: 00 | 01 10 | 02 11 20 | 12       21 22                         0.6 of it
 *    8: 00 | 01 10 | 02 11 20 | 12 21    22                            two thirds
 *
 * Image and weights have a scale for each of their channel blocks, the weights for each filter, too; the largest number of a block
 * takes up the first digit. The further it is above the others, the fewer digits these have: ``digits.pyx`` says how far it may be.
 * A scale has 12 bits, or 4 where the largest number has few, so that small integers stay what they are.
 *
 * H. Ootomo, K. Ozaki, R. Yokota, "DGEMM on Integer Matrix Multiplication Unit", arXiv 2306.11975.
 *
 *                      B: 7         A tile register is 16 rows of 64 bytes. Registers 0 to 3 hold 16 x 16 sums: of products whose
 *                    +------+       digits' numbers add up to 0, 1, 2 and 3. 4 to 6 hold 16 rows x 64 channels of each digit of
 *        A:  4 5 6   | 0..3 |       the image, 7 holds 64 channels x 16 filters of a digit of the weights.
 *                    +------+
 *                                   Packed image    [cell][block of 64 channels][digit][64]
 *                                   Packed weights  [tap][block of 64 channels][vector][digit][16][16][4], fc_scales
 *
 * Within a block of 64, the four bytes of a word are channels 16 apart: so they come out of four vectors.
 */
#include "amx_tile.h"

enum { CHANNELS = 64, DIGITS = MAX_PIECES, FIRST = 16, BYTE = 8 };

typedef int32_t integers __attribute__((vector_size(64), may_alias));

/* ------------------------------------------------------------------------------------------------ batch-reduce GEMM */

/* y / x, correctly rounded, given 1 / x: in three instructions where a division takes sixteen cycles. */
INLINE floats quotient(floats y, floats x, floats inverse)
{
#ifdef __AVX512F__
    const __m512 q = (__m512)(y * inverse);
    return (floats)_mm512_fmadd_ps(_mm512_fnmadd_ps(q, (__m512)x, (__m512)y), (__m512)inverse, q);
#else
    (void)inverse;
    return y / x;
#endif
}

/* c (+)= sums / (unit of the column times scale of the row); the sums of digits that are dropped were not made. */
INLINE void finish(const fc_reduction *r, integers sums[4][ROWS], ptrdiff_t n_rows, const int products, floats unit,
                   const float *scale, float *c, int accumulate)
{
    const float digit = 1.0F / (1 << BYTE);
    floats scaled = unit * *scale, inverse = 1 / scaled;
    for (int m = 0; m < ROWS && m < n_rows; m++, c += r->c_step) {
        floats y = __builtin_convertvector(sums[2][m], floats);
        if (products > 6)
            y += __builtin_convertvector(sums[3][m], floats) * digit;
        y = y * digit + __builtin_convertvector(sums[1][m], floats);
        if (r->scale_step) {
            scaled = unit * scale[m * r->scale_step];
            inverse = 1 / scaled;
        }
        y = quotient(y * digit + __builtin_convertvector(sums[0][m], floats), scaled, inverse);
        if (accumulate)
            y += *(const floats *)c;
        *(floats *)c = y;
    }
}

#define LOAD_DIGIT(reg, d)                                             \
    do {                                                               \
        if (rows->evenly) {                                            \
            _tile_loadd(reg, image + (d) * ROW_BYTES, spacing);        \
        } else {                                                       \
            gather(image + (d) * ROW_BYTES, rows->offset, copies[d]);  \
            _tile_loadd(reg, copies[d], ROW_BYTES);                    \
        }                                                              \
    } while (0)

/* 16 rows by 16 filters, whose blocks, digits and lines are so far apart; `products` is a constant where this is inlined. */
INLINE void tile(const fc_reduction *r, const char *a, const tile_rows *rows, ptrdiff_t n_rows, const char *b,
                 ptrdiff_t block_bytes, const ptrdiff_t digit_bytes, const ptrdiff_t line_bytes, const int products,
                 floats unit, const float *scale, float *c, int accumulate)
{
    char copies[DIGITS][TILE_BYTES] __attribute__((aligned(64)));
    integers sums[4][ROWS];
    const ptrdiff_t spacing = rows->offset[1], blocks = r->depth / CHANNELS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (ptrdiff_t t = 0; t < r->n_taps; t++) {
        const char *weights = b + (r->b_taps ? r->b_taps[t] : t * r->b_tap) * DIGITS;
        const char *image = a + r->taps[t] * DIGITS + rows->first;
        for (ptrdiff_t block = 0; block < blocks; block++, image += DIGITS * ROW_BYTES, weights += block_bytes) {
            LOAD_DIGIT(4, 0);
            _tile_loadd(7, weights, line_bytes);
            _tile_dpbssd(0, 4, 7);
            LOAD_DIGIT(5, 1);
            _tile_dpbssd(1, 5, 7);
            LOAD_DIGIT(6, 2);
            _tile_dpbssd(2, 6, 7);
            _tile_loadd(7, weights + digit_bytes, line_bytes);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 7);
            if (products == 8)
                _tile_dpbssd(3, 6, 7);
            _tile_loadd(7, weights + 2 * digit_bytes, line_bytes);
            _tile_dpbssd(2, 4, 7);
            if (products > 6)
                _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], ROW_BYTES);
    _tile_stored(1, sums[1], ROW_BYTES);
    _tile_stored(2, sums[2], ROW_BYTES);
    if (products > 6)
        _tile_stored(3, sums[3], ROW_BYTES);
    STORES_DONE;
    finish(r, sums, n_rows, products, unit, scale, c, accumulate);
}

static void fc_f32_brgemm_digits__amx(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows,
                                      const void *b, int vectors, void *c, int accumulate)
{
    const ptrdiff_t block_bytes = vectors * DIGITS * TILE_BYTES;
    for (int v = 0; v < vectors; v++) {
        const char *weights = (const char *)b + v * DIGITS * TILE_BYTES;
        const floats unit = *(const floats *)&r->scales->scale[v * LANES] * 0x1p-32F;
        float *sums = (float *)c + v * LANES;
        for (ptrdiff_t m = 0; m < n_rows; m += ROWS, sums += ROWS * r->c_step) {
            const float *scale = r->scale + m * r->scale_step;
            tile_rows placed;
            place(&placed, rows + m, n_rows - m, DIGITS);
            STORES_DONE;
            if (r->products == 8)
                tile(r, a, &placed, n_rows - m, weights, block_bytes, TILE_BYTES, ROW_BYTES, 8, unit, scale, sums, accumulate);
            else if (r->products == 7)
                tile(r, a, &placed, n_rows - m, weights, block_bytes, TILE_BYTES, ROW_BYTES, 7, unit, scale, sums, accumulate);
            else
                tile(r, a, &placed, n_rows - m, weights, block_bytes, TILE_BYTES, ROW_BYTES, 6, unit, scale, sums, accumulate);
        }
    }
}

static void fc_f32_brgemm_cells__amx(const fc_reduction *r, const void *a, const void *b, ptrdiff_t block_bytes, void *c,
                                     int accumulate)
{
    const tile_rows rows = {.offset = {0, r->a_step * DIGITS}, .evenly = 1};
    const floats unit = *(const floats *)r->scales->scale * 0x1p-32F;
    const ptrdiff_t line = DIGITS * ROW_BYTES;
    if (r->products == 8)
        tile(r, a, &rows, ROWS, b, block_bytes, ROW_BYTES, line, 8, unit, r->scale, c, accumulate);
    else if (r->products == 7)
        tile(r, a, &rows, ROWS, b, block_bytes, ROW_BYTES, line, 7, unit, r->scale, c, accumulate);
    else
        tile(r, a, &rows, ROWS, b, block_bytes, ROW_BYTES, line, 6, unit, r->scale, c, accumulate);
}

static ptrdiff_t fc_f32_saturate_digits__amx(ptrdiff_t rounds, void *sums)
{
    SATURATE(_tile_dpbssd, rounds, sums);
    return rounds * 4 * ROWS * LANES * CHANNELS * 2;
}

/* ----------------------------------------------------------------------------------------------------------- digits */

/* Four vectors of integers to a line of each digit, a digit of all four in each word. Digits are -128 to 127: added 128 are bytes. */
INLINE void store_digits(const words x[4], char *out, ptrdiff_t line)
{
    const words even = 0x00ff00ff + (words){0}, low = 0x0000ffff + (words){0}, sign = 0x80808080 + (words){0};
    const words a02 = (x[0] & even) | (x[1] << BYTE & ~even), a13 = (x[0] >> BYTE & even) | (x[1] & ~even);
    const words b02 = (x[2] & even) | (x[3] << BYTE & ~even), b13 = (x[2] >> BYTE & even) | (x[3] & ~even);
    *(words *)(out + 2 * line) = ((a02 & low) | b02 << 2 * BYTE) ^ sign;
    *(words *)(out + line) = ((a13 & low) | b13 << 2 * BYTE) ^ sign;
    *(words *)out = (a02 >> 2 * BYTE | (b02 & ~low)) ^ sign;
}

/* The nearest integers, of 24 bits, and 128 for each digit. */
INLINE words rounded(floats x)
{
#ifdef __AVX512BW__
    return (words)_mm512_cvtps_epi32((__m512)x) + 0x808080;
#else
    const floats half = (floats)(((words)x & 0x80000000) | 0x3f000000);
    return (words)__builtin_convertvector(x + half, integers) + 0x808080;
#endif
}

static void fc_f32_digits_rows__amx(const void *image, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n, float scale, void *out)
{
    const float *in = image;
    char *line = out;
    for (; rows > 0; rows--, in += step)
        for (ptrdiff_t i = 0; i < n; i += CHANNELS, line += DIGITS * ROW_BYTES) {
            words numbers[4];
            UNROLL for (int v = 0; v < 4; v++) {
                floats x;
                load(in + i + v * LANES, n - i - v * LANES, &x);
                numbers[v] = rounded(x * scale);
            }
            store_digits(numbers, line, ROW_BYTES);
        }
}

INLINE void count(floats x, words *largest, floats *sum, floats *squares)
{
    const words magnitude = (words)x & 0x7fffffff;
    keep_larger(largest, magnitude);
    *sum += (floats)magnitude;
    *squares += x * x;
}

/* A run of whole lines, in order, each digit a plane. */
static void fc_f32_digits_run__amx(const void *image, ptrdiff_t n, float scale, void *out, ptrdiff_t plane)
{
    char line[DIGITS * ROW_BYTES] __attribute__((aligned(64)));
    char *planes = out;
    for (ptrdiff_t i = 0; i < n; i += CHANNELS) {
        fc_f32_digits_rows__amx((const float *)image + i, 1, 0, CHANNELS, scale, line);
        UNROLL for (int d = 0; d < DIGITS; d++) {
            char turned[ROW_BYTES];
            turn_line(line + d * ROW_BYTES, 1, turned);
            memcpy(planes + d * plane + i, turned, ROW_BYTES);
        }
    }
}

static void fc_f32_lay_patches_digits__amx(const fc_patches *patches, const void *cells, const ptrdiff_t *pixels,
                                           ptrdiff_t n_pixels, int pieces, void *out)
{
    (void)pieces;
    lay_patches(patches, cells, pixels, n_pixels, DIGITS, 1, out);
}

/* Four sums of each, for an addition takes four cycles. */
static void fc_f32_tally__amx(const void *numbers, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n, fc_tally *tally)
{
    const float *in = numbers;
    words largest[4] = {*(const words *)tally->largest};
    floats sum[4] = {*(const floats *)tally->sum}, squares[4] = {*(const floats *)tally->squares};
    for (; n == LANES && rows >= 4; rows -= 4, in += 4 * step)
        UNROLL for (int v = 0; v < 4; v++) {
            __builtin_prefetch(in + (v + 12) * step);
            count(*(const floats *)(in + v * step), &largest[v], &sum[v], &squares[v]);
        }
    for (; rows > 0; rows--, in += step) {
        ptrdiff_t i = 0;
        for (; i + 4 * LANES <= n; i += 4 * LANES)
            UNROLL for (int v = 0; v < 4; v++) {
                __builtin_prefetch(in + 2 * step + i + v * LANES); /* as split_rows does */
                count(*(const floats *)(in + i + v * LANES), &largest[v], &sum[v], &squares[v]);
            }
        for (; i < n; i += LANES) {
            floats x;
            load(in + i, n - i, &x);
            count(x, &largest[0], &sum[0], &squares[0]);
        }
    }
    UNROLL for (int v = 1; v < 4; v++)
        keep_larger(&largest[0], largest[v]);
    *(words *)tally->largest = largest[0];
    *(floats *)tally->sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    *(floats *)tally->squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

/* The scale for the largest of some numbers; 1 if all are zeros, 0 if it is so large or so small that products of scales might
 * overflow, inf or NaN. */
INLINE float scale_of(float largest)
{
    enum { LOWER = 0xfff, BITS_4 = ~0xfffffU, BITS_12 = ~LOWER };
    float scale;
    uint32_t bits, largest_bits;
    if (largest == 0)
        return 1;
    if (!(largest >= 0x1p-40F && largest <= 0x1p40F))
        return 0;
    scale = 127 * (float)(1 << FIRST) / largest; /* carries take the rest of the first digit */
    memcpy(&bits, &scale, sizeof bits);
    memcpy(&largest_bits, &largest, sizeof largest_bits);
    bits &= largest_bits & LOWER ? BITS_12 : BITS_4; /* products of scales are exact */
    memcpy(&scale, &bits, sizeof bits);
    return scale;
}

/* What a number of a spread is: the largest of n, their sum and that of their squares. */
INLINE float keep_spread(float largest, float sum, float squares, float n, fc_spread *spread)
{
    const float scale = scale_of(largest), half_pi = 1.5707963F;
    if (largest > 0 && scale > 0) {
        const float reach = 127 * (float)(1 << FIRST) / scale; /* what fills all digits */
        const float peak = reach * reach * n / squares, density = half_pi * sum * sum / (n * squares);
        spread->peak = peak > spread->peak ? peak : spread->peak;
        spread->density = density < spread->density ? density : spread->density;
    }
    return scale;
}

/* Sums of lanes: the halves of a vector, and so on. */
INLINE float total(floats x)
{
    UNROLL for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
}

INLINE float largest_of(words x)
{
    float largest;
    UNROLL for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
    memcpy(&largest, &x, sizeof largest);
    return largest;
}

static float fc_f32_spread__amx(const fc_tally *tally, ptrdiff_t n, fc_spread *spread)
{
    return keep_spread(largest_of(*(const words *)tally->largest), total(*(const floats *)tally->sum),
                       total(*(const floats *)tally->squares), (float)n, spread);
}

static int fc_f32_spread_lanes__amx(const fc_tally *tally, ptrdiff_t n, float *scale, fc_spread *spread)
{
    int usable = 1;
    for (int i = 0; i < LANES; i++) {
        scale[i] = keep_spread(tally->largest[i], tally->sum[i], tally->squares[i], (float)n, spread);
        usable &= scale[i] > 0;
    }
    return usable;
}

static int fc_f32_spread_weights__amx(const void *weights, ptrdiff_t n, ptrdiff_t step, int vectors, fc_scales *scales)
{
    int usable = 1;
    scales->spread = (fc_spread){0, 1};
    for (int v = 0; v < vectors; v++) {
        fc_tally tally = {{0}, {0}, {0}};
        fc_f32_tally__amx((const float *)weights + v * LANES, n, step, LANES, &tally);
        usable &= fc_f32_spread_lanes__amx(&tally, n, &scales->scale[v * LANES], &scales->spread);
    }
    return usable;
}

/* 64 channels of a tap, `step` apart, or so many, for 16 filters. */
INLINE void digits_of_block(const float *in, ptrdiff_t step, const ptrdiff_t channels, floats scale, char *out)
{
    for (int row = 0; row < ROWS; row++, in += step, out += ROW_BYTES) {
        words numbers[4];
        UNROLL for (int i = 0; i < 4; i++) {
            floats x = {0};
            if (row + i * ROWS < channels)
                x = *(const floats *)(in + i * ROWS * step) * scale;
            numbers[i] = rounded(x);
        }
        store_digits(numbers, out, TILE_BYTES);
    }
}

static void fc_f32_digits_weights__amx(const void *weights, ptrdiff_t step, ptrdiff_t channels, ptrdiff_t taps, int vectors,
                                       const fc_scales *scales, void *out)
{
    char *panel = out;
    for (ptrdiff_t t = 0; t < taps; t++)
        for (ptrdiff_t first = 0; first < channels; first += CHANNELS)
            for (int v = 0; v < vectors; v++, panel += DIGITS * TILE_BYTES) {
                const float *in = (const float *)weights + first * step + (t * vectors + v) * LANES;
                const floats scale = *(const floats *)&scales->scale[v * LANES];
                if (channels - first >= CHANNELS)
                    digits_of_block(in, step, CHANNELS, scale, panel);
                else
                    digits_of_block(in, step, channels - first, scale, panel);
            }
}

/* Lines of digits of cells, of 16 channels: word r is cells r, r + 16, r + 32 and r + 48, for each r, so that a tile begins at any
 * cell, or for those with which it would begin at each 64th. A cell becomes an integer once, and so do pairs of them, digits 0 and
 * 2, and digit 1, of cells r and r + 16: two rings of some lines of L1. */
static void fc_f32_digits_cells__amx(const void *cells, ptrdiff_t n, float scale, int anywhere, void *out)
{
    enum { RING = 64, APART = CHANNELS / 4 };
    words numbers[RING], pairs[RING][2];
    const words even = 0x00ff00ff + (words){0}, low = 0x0000ffff + (words){0};
    const float *in = cells;
    char *line = out;
    for (ptrdiff_t i = 0; i < n + 3 * APART; i++) {
        words x = 0x808080 + (words){0};
        if (i < n)
            x = rounded(*(const floats *)(in + i * LANES) * scale);
        numbers[i % RING] = x ^= 0x808080 + (words){0};
        if (i < APART)
            continue;
        const words before = numbers[(i - APART) % RING];
        const words b02 = (before & even) | (x << BYTE & ~even), b13 = (before >> BYTE & even) | (x & ~even);
        pairs[(i - APART) % RING][0] = b02;
        pairs[(i - APART) % RING][1] = b13;
        if (i < 3 * APART || (!anywhere && (i - 3 * APART) % CHANNELS >= APART))
            continue;
        const words a02 = pairs[(i - 3 * APART) % RING][0], a13 = pairs[(i - 3 * APART) % RING][1];
        *(words *)line = a02 >> 2 * BYTE | (b02 & ~low);
        *(words *)(line + ROW_BYTES) = (a13 & low) | b13 << 2 * BYTE;
        *(words *)(line + 2 * ROW_BYTES) = (a02 & low) | b02 << 2 * BYTE;
        line += DIGITS * ROW_BYTES;
    }
}

/* ------------------------------------------------------------------------------------------------------------- table */

void fc_fill_digits(fc_ukernels *table)
{
    table->tile_rows = ROWS;
    table->depth_step = CHANNELS;
    table->pieces = DIGITS;
    table->packed = DIGITS;
    table->digits = 1;
    table->brgemm = fc_f32_brgemm_digits__amx;
    table->brgemm_pairs = NULL;
    table->saturate = fc_f32_saturate_digits__amx;
    table->split_rows = NULL;
    table->split_runs = NULL;
    table->split_pairs = NULL;
    table->lay_patches = fc_f32_lay_patches_digits__amx;
    table->split_weights = NULL;
    table->spread_lanes = fc_f32_spread_lanes__amx;
    table->spread_weights = fc_f32_spread_weights__amx;
    table->digits_weights = fc_f32_digits_weights__amx;
    table->digits_rows = fc_f32_digits_rows__amx;
    table->digits_run = fc_f32_digits_run__amx;
    table->digits_cells = fc_f32_digits_cells__amx;
    table->brgemm_cells = fc_f32_brgemm_cells__amx;
    table->tally = fc_f32_tally__amx;
    table->spread = fc_f32_spread__amx;
}
