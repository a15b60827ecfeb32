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

enum { ROWS = 16, ROW_BYTES = 64, TILE_BYTES = ROWS * ROW_BYTES, LANES = 16 };

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
