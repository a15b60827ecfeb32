/* What both tiles of AMX share, that of pieces (amx.c) and that of digits (amx_digits.c): rows of the image, and vectors. */
#include <string.h>

#include "ukernels.h"

#ifdef FC_AMX_MODEL
#include "amx_model.h"
#else
#include <immintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))
#define STORES_DONE __asm__ volatile("" ::: "memory") /* GCC doesn't know that a tile load reads memory */

enum { ROWS = 16, ROW_BYTES = 64, TILE_BYTES = ROWS * ROW_BYTES, LANES = 16, MAX_PIECES = 3 };

/* The 16 rows of one tile of the image, in bytes: where the first is, and the others from there. */
typedef struct {
    ptrdiff_t first, offset[ROWS];
    int evenly; /* spaced, by offset[1]: one tile load reads them */
} tile_rows;

/* Whether 16 rows are `step` apart. */
INLINE int spaced(const ptrdiff_t *rows, ptrdiff_t step)
{
    typedef ptrdiff_t offsets __attribute__((vector_size(64), aligned(8), may_alias));
    const offsets number = {0, 1, 2, 3, 4, 5, 6, 7}, there = rows[0] + number * step;
    const offsets differ = (*(const offsets *)rows - there) | (*(const offsets *)(rows + 8) - (there + 8 * step));
    ptrdiff_t any = 0;
    UNROLL for (int m = 0; m < 8; m++)
        any |= differ[m];
    return any == 0;
}

/* Rows that the tile lacks are where they would be if it went on evenly, or its last one again. */
static void place(tile_rows *tile, const ptrdiff_t *rows, ptrdiff_t n_rows, ptrdiff_t scale)
{
    const ptrdiff_t n = n_rows < ROWS ? n_rows : ROWS, first = rows[0], step = n > 1 ? rows[1] - first : 0;
    const ptrdiff_t beyond = (ROWS - n) * step * scale;
    ptrdiff_t uneven = beyond < 0 || beyond > FC_BEYOND; /* rows of nobody's are read no further than that */
    if (n == ROWS)
        uneven |= !spaced(rows, step);
    for (ptrdiff_t m = 2; m < n && n < ROWS; m++)
        uneven |= rows[m] - first - m * step;
    tile->first = first * scale;
    tile->offset[1] = step * scale;
    tile->evenly = uneven == 0;
    for (ptrdiff_t m = 0; m < ROWS && uneven; m++)
        tile->offset[m] = (rows[m < n ? m : n - 1] - first) * scale;
}

static __attribute__((noinline)) void gather(const char *first, const ptrdiff_t *offset, char *copy)
{
    UNROLL for (int m = 0; m < ROWS; m++)
        memcpy(copy + m * ROW_BYTES, first + offset[m], ROW_BYTES);
    STORES_DONE;
}

/* Four products at a time, nothing loaded: an instruction can't be an argument of a function. */
#define SATURATE(product, rounds, sums)                      \
    do {                                                     \
        _tile_zero(0);                                       \
        _tile_zero(1);                                       \
        _tile_zero(2);                                       \
        _tile_zero(3);                                       \
        _tile_loadd(4, sums, ROW_BYTES);                     \
        _tile_loadd(5, sums, ROW_BYTES);                     \
        for (ptrdiff_t round = 0; round < (rounds); round++) { \
            product(0, 4, 5);                                \
            product(1, 4, 5);                                \
            product(2, 4, 5);                                \
            product(3, 4, 5);                                \
        }                                                    \
        _tile_stored(0, sums, ROW_BYTES);                    \
    } while (0)

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));

/* Words of magnitudes are ordered as the magnitudes are, inf and NaN above all numbers. */
#ifdef __AVX512BW__ /* GCC finds two instructions for it */
INLINE void keep_larger(words *x, words y) { *x = (words)_mm512_max_epu32((__m512i)*x, (__m512i)y); }

INLINE void load(const float *in, ptrdiff_t n, floats *x)
{
    *x = (floats)_mm512_maskz_loadu_ps(n < LANES ? (1u << (n < 0 ? 0 : n)) - 1 : 0xffff, in);
}
#else
INLINE void keep_larger(words *x, words y)
{
    const words greater = (words)(*x > y);
    *x = (*x & greater) | (y & ~greater);
}

INLINE void load(const float *in, ptrdiff_t n, floats *x) /* n numbers, zeros for lanes beyond */
{
    *x = (floats){0};
    if (n > 0)
        memcpy(x, in, (size_t)(n < LANES ? n : LANES) * sizeof(float));
}
#endif

/* A row of all pieces, 64 bytes at a time; what is too much is overwritten by the next row. */
INLINE void lay_row(const char *cells, ptrdiff_t plane, const ptrdiff_t run, const int pieces, char *line, ptrdiff_t pitch)
{
    UNROLL for (int p = 0; p < pieces; p++, cells += plane, line += pitch) {
        memcpy(line, cells, ROW_BYTES);
        UNROLL for (ptrdiff_t i = ROW_BYTES; i < run; i += ROW_BYTES) {
            memcpy(line + i, cells + i, ROW_BYTES);
            STORES_DONE; /* or GCC makes a call of memcpy of the loop */
        }
    }
}

/* Bytes of a line of digits in their order to words of four that are 16 apart, or back. */
INLINE void turn_line(const char *in, const int back, char *out)
{
#ifdef __AVX512BW__ /* squares of words, and of bytes: each is its own inverse */
    const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i line = _mm512_loadu_si512(in);
    if (back)
        _mm512_storeu_si512(out, _mm512_permutexvar_epi32(fours, _mm512_shuffle_epi8(line, bytes)));
    else
        _mm512_storeu_si512(out, _mm512_shuffle_epi8(_mm512_permutexvar_epi32(fours, line), bytes));
#else
    for (int i = 0; i < ROW_BYTES; i++) {
        const int there = i % LANES * 4 + i / LANES;
        out[back ? i : there] = in[back ? there : i];
    }
#endif
}

/* Two lines take turns: a load that spans several stores which are still under way waits for them. What fills up a patch is what
 * was there before, finite as all else. Cells are `item` bytes, 2 of a piece, 1 of a digit. */
INLINE void lay_patches(const fc_patches *f, const void *all, const ptrdiff_t *pixels, ptrdiff_t n, const int pieces,
                        const int item, void *patches)
{
    enum { LINE = 2 * FC_PATCH + 2 * ROW_BYTES };
    char lines[2][MAX_PIECES * LINE] __attribute__((aligned(64)));
    const char *const cells = all;
    char *out = patches;
    const ptrdiff_t *const rows = f->rows, n_rows = f->n_rows, run = f->run * item, plane = f->plane * item;
    memset(lines, 0, sizeof lines);
    for (ptrdiff_t pixel = 0; pixel <= n; pixel++) {
        char *line = lines[pixel % 2];
        const char *cut = lines[(pixel + 1) % 2];
        if (pixel < n && run <= ROW_BYTES) /* constants: no loop within a row */
            for (ptrdiff_t r = 0; r < n_rows; r++, line += run)
                lay_row(cells + (pixels[pixel] + rows[r]) * item, plane, ROW_BYTES, pieces, line, LINE);
        else if (pixel < n && run <= 2 * ROW_BYTES)
            for (ptrdiff_t r = 0; r < n_rows; r++, line += run)
                lay_row(cells + (pixels[pixel] + rows[r]) * item, plane, 2 * ROW_BYTES, pieces, line, LINE);
        else if (pixel < n)
            for (ptrdiff_t r = 0; r < n_rows; r++, line += run)
                lay_row(cells + (pixels[pixel] + rows[r]) * item, plane, run, pieces, line, LINE);
        for (ptrdiff_t i = 0; i < f->depth * item && pixel > 0; i += ROW_BYTES, cut += ROW_BYTES)
            UNROLL for (int p = 0; p < pieces; p++, out += ROW_BYTES) {
                if (item == 1)
                    turn_line(cut + p * LINE, 0, out);
                else
                    memcpy(out, cut + p * LINE, ROW_BYTES);
            }
    }
}
