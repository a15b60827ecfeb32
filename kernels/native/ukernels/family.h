/* All microkernels of one instruction set and element type, written once with vector extensions.
 *
 * The including file defines T (the element type), T_BYTES (its size), T_INT (integers of that size), FC(name) (its name in this
 * family), VECTOR_BYTES and TILE_ROWS. Everything stays static, so that no code of one instruction set can be linked into another.
 */
#define LANES ((ptrdiff_t)(VECTOR_BYTES / sizeof(T)))
#define LINE ((ptrdiff_t)(64 / sizeof(T)))

typedef T FC(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
#define V FC(vector)

/* ------------------------------------------------------------------------------------------------ batch-reduce GEMM */

static inline V FC(rectified)(V value)
{
    return (V)((__typeof__(value < 0))value & ~(value < 0)); /* a NaN stays one */
}

/* Evenly spaced rows need few general registers: a base for every five of them, and two distances, which addresses have as they are,
 * twice or four times. The compiler is not to know where bases are, or it would have a pointer for each row after all. */
typedef struct {
    const char *base[EVEN_ROWS / 5 + 1];
    ptrdiff_t once, thrice;
} FC(even);

static inline __attribute__((always_inline)) const T *FC(even_row)(FC(even) *at, const int m)
{
    const char *base = at->base[m / 5];
    return (const T *)(m % 5 == 3 ? base + at->thrice : base + m % 5 * at->once);
}

static inline __attribute__((always_inline)) void FC(hide)(FC(even) *at, const int n_rows)
{
    UNROLL for (int i = 0; 5 * i < n_rows; i++)
        HIDDEN(at->base[i]);
    HIDDEN(at->once);
    HIDDEN(at->thrice);
}

/* Finish the sums of a tile, and store them. */
static inline __attribute__((always_inline)) void FC(put)(V acc[][8], const int n_rows, const int vectors, T *c, ptrdiff_t c_step,
                                                          int accumulate, const fc_epilogue *finish)
{
    const T *bias = finish ? finish->bias : NULL;
    if (accumulate)
        UNROLL for (int m = 0; m < n_rows; m++)
            UNROLL for (int v = 0; v < vectors; v++)
                acc[m][v] += *(const V *)(c + m * c_step + v * LANES);
    if (bias)
        UNROLL for (int v = 0; v < vectors; v++)
            UNROLL for (int m = 0; m < n_rows; m++)
                acc[m][v] += *(const V *)(bias + v * LANES);
    if (finish && finish->relu)
        UNROLL for (int m = 0; m < n_rows; m++)
            UNROLL for (int v = 0; v < vectors; v++)
                acc[m][v] = FC(rectified)(acc[m][v]);
    UNROLL for (int m = 0; m < n_rows; m++)
        UNROLL for (int v = 0; v < vectors; v++)
            *(V *)(c + m * c_step + v * LANES) = acc[m][v];
}

/* Add the products of one tap to a tile's sums. */
static inline __attribute__((always_inline)) void FC(tap)(const fc_reduction *r, const T *a, const ptrdiff_t *rows, const int n_rows,
                                                          const int evenly, const T *panel, const int vectors, V acc[][8],
                                                          ptrdiff_t ahead)
{
    const T *row[EVEN_ROWS];
    FC(even) at;
    UNROLL for (int m = 0; m < n_rows && !evenly; m++)
        row[m] = a + rows[m];
    if (evenly) {
        at.once = (rows[1] - rows[0]) * T_BYTES;
        at.thrice = 3 * at.once;
        UNROLL for (int i = 0; 5 * i < n_rows; i++)
            at.base[i] = (const char *)(a + rows[0]) + 5 * i * at.once;
    }
    ptrdiff_t step = 0;
    for (ptrdiff_t k = 0; k < r->depth; k++, step += r->a_step, panel += r->b_step) {
        V weight[8];
        UNROLL for (int v = 0; v < vectors; v++)
            weight[v] = *(const V *)(panel + v * LANES);
        if (vectors == 2 && ahead)
            UNROLL for (int v = 0; v < vectors; v++)
                __builtin_prefetch(panel + ahead + v * LANES);
        if (evenly)
            FC(hide)(&at, n_rows);
        UNROLL for (int m = 0; m < n_rows; m++) {
            const V cell = (evenly ? *FC(even_row)(&at, m) : row[m][step]) - (V){0};
            UNROLL for (int v = 0; v < vectors; v++)
                acc[m][v] += cell * weight[v];
            if (vectors > 1)
                NEEDED(cell);
        }
        if (evenly) {
            UNROLL for (int v = 0; v < vectors; v++)
                NEEDED(weight[v]);
            UNROLL for (int i = 0; 5 * i < n_rows; i++)
                at.base[i] += r->a_step * T_BYTES;
        }
    }
}

/* n_rows, whether they are evenly spaced, and vectors are constants where this is inlined: the accumulators live in registers. */
static inline __attribute__((always_inline)) void FC(tile)(const fc_reduction *r, const T *a, const ptrdiff_t *rows,
                                                           const int n_rows, const int evenly, const T *b, const int vectors, T *c,
                                                           int accumulate, ptrdiff_t ahead)
{
    const ptrdiff_t together = r->apart ? r->apart : r->n_taps;
    for (ptrdiff_t t = 0, end; t < r->n_taps; accumulate = 1) {
        V acc[EVEN_ROWS][8] = {{{0}}};
        for (end = t + together < r->n_taps ? t + together : r->n_taps; t < end; t++)
            FC(tap)(r, a + r->taps[t], rows, n_rows, evenly, b + (r->b_taps ? r->b_taps[t] : t * r->b_tap), vectors, acc, ahead);
        FC(put)(acc, n_rows, vectors, c, r->c_step, accumulate, end < r->n_taps ? NULL : r->finish);
    }
}

/* A tile taller than TILE_ROWS is never asked for; its case must compile all the same. */
#define TILE(n, vectors) FC(tile)(r, a, rows, n <= TILE_ROWS ? n : 1, 0, b, vectors, c, accumulate, ahead)
#define TILE_CASE(n)                                    \
    case n:                                             \
        if (n <= TILE_ROWS) {                           \
            if (n == 1 && vectors == 8)                 \
                TILE(n, 8);                             \
            else if (n <= FC_FLAT_ROWS && vectors == 4) \
                TILE(n, 4);                             \
            else if (vectors == 2)                      \
                TILE(n, 2);                             \
            else                                        \
                TILE(n, 1);                             \
        }                                               \
        break;

static inline __attribute__((always_inline)) void FC(one_tile)(const fc_reduction *r, const T *a, const ptrdiff_t *rows,
                                                               ptrdiff_t n_rows, const T *b, int vectors, T *c,
                                                               int accumulate, ptrdiff_t ahead)
{
    switch (n_rows) {
        TILE_CASE(1)
        TILE_CASE(2)
        TILE_CASE(3)
        TILE_CASE(4)
        TILE_CASE(5)
        TILE_CASE(6)
        TILE_CASE(7)
        TILE_CASE(8)
    }
}
#undef TILE_CASE
#undef TILE

#if EVEN_ROWS > TILE_ROWS
/* Each is a function of its own, so that nothing else wants a register. */
#define EVEN_TILE(n, vectors)                                                                                              \
    static __attribute__((noinline)) void FC(even_##n##_##vectors)(const fc_reduction *r, const T *a, const ptrdiff_t *rows, \
                                                                   const T *b, T *c, int accumulate)                       \
    {                                                                                                                      \
        FC(tile)(r, a, rows, n, 1, b, vectors, c, accumulate, 0);                                                          \
    }
#define EVEN_TILES(n) EVEN_TILE(n, 1) EVEN_TILE(n, 2)
EVEN_TILES(8)
EVEN_TILES(9)
EVEN_TILES(10)
EVEN_TILES(11)
EVEN_TILES(12)
EVEN_TILES(13)
EVEN_TILES(14)
#define EVEN_ENTRY(n) {FC(even_##n##_1), FC(even_##n##_2)}
static void (*const FC(even_tiles)[EVEN_ROWS - TILE_ROWS + 1][2])(const fc_reduction *r, const T *a, const ptrdiff_t *rows,
                                                                  const T *b, T *c, int accumulate) = {
    EVEN_ENTRY(8), EVEN_ENTRY(9), EVEN_ENTRY(10), EVEN_ENTRY(11), EVEN_ENTRY(12), EVEN_ENTRY(13), EVEN_ENTRY(14)};
#undef EVEN_ENTRY
#undef EVEN_TILES
#undef EVEN_TILE
#endif

/* How many rows, from the first on, are evenly spaced. */
static inline ptrdiff_t FC(even_run)(const ptrdiff_t *rows, ptrdiff_t n_rows)
{
    ptrdiff_t n = 1;
    for (; n + 8 <= n_rows; n += 8) {
        ptrdiff_t others = 0;
        for (int i = 0; i < 8; i++)
            others |= (rows[n + i] - rows[n + i - 1]) ^ (rows[1] - rows[0]);
        if (others)
            break;
    }
    while (n < n_rows && rows[n] - rows[n - 1] == rows[1] - rows[0])
        n++;
    return n;
}

/* The last two tiles are of about the same size: a low one waits for its sums. */
static inline ptrdiff_t FC(height)(ptrdiff_t left, ptrdiff_t most)
{
    return left >= 2 * most ? most : left > most ? (left + 1) / 2 : left;
}

static void FC(brgemm)(const fc_reduction *r, const void *a, const ptrdiff_t *rows, ptrdiff_t n_rows, const void *b,
                       int vectors, void *c, int accumulate)
{
#if EVEN_ROWS > TILE_ROWS
    ptrdiff_t end = 0;
#endif
    for (ptrdiff_t m = 0, n; m < n_rows; m += n) {
        const ptrdiff_t ahead = m ? 0 : r->ahead;
        T *sums = (T *)c + m * r->c_step;
#if EVEN_ROWS > TILE_ROWS
        if (m >= end) /* of rows that are evenly spaced */
            end = m + FC(even_run)(rows + m, n_rows - m);
        n = FC(height)(end - m, EVEN_ROWS);
        if (n >= TILE_ROWS && vectors <= 2 && !ahead) {
            FC(even_tiles)[n - TILE_ROWS][vectors - 1](r, a, rows + m, b, sums, accumulate);
            continue;
        }
#endif
        n = FC(height)(n_rows - m, TILE_ROWS);
        FC(one_tile)(r, a, rows + m, n, b, vectors, sums, accumulate, ahead);
    }
}

/* Each sum is a factor of its next product, or the compiler would take the product out of the loop. */
static ptrdiff_t FC(saturate)(ptrdiff_t rounds, void *sums)
{
    enum { CHAINS = 12 }; /* enough to hide the latency, few enough for 16 registers */
    V *memory = sums, acc[CHAINS];
    const V scale = memory[CHAINS], shift = memory[CHAINS + 1];
    UNROLL for (int i = 0; i < CHAINS; i++)
        acc[i] = memory[i];
    for (ptrdiff_t round = 0; round < rounds; round++)
        UNROLL for (int i = 0; i < CHAINS; i++)
            acc[i] = acc[i] * scale + shift;
    UNROLL for (int i = 0; i < CHAINS; i++)
        memory[i] = acc[i];
    return rounds * CHAINS * LANES * 2;
}

/* ---------------------------------------------------------------------------------------------- transpose, epilogue */

#define SIDE 4
#include "square.h"
#undef SIDE
#if VECTOR_BYTES / T_BYTES == 8
#define WIDE 8
#elif VECTOR_BYTES / T_BYTES == 16
#define WIDE 16
#endif
#ifdef WIDE
#define SIDE WIDE
#include "square.h"
#undef SIDE
#endif

/* `step` is a constant where this is inlined: loads and shuffles of whole vectors. */
static inline __attribute__((always_inline)) void FC(copy_every)(const T *in, const ptrdiff_t step, ptrdiff_t j_stride,
                                                                 ptrdiff_t ni, ptrdiff_t nj, T *out, ptrdiff_t out_stride)
{
    for (ptrdiff_t j = 0; j < nj; j++)
        for (ptrdiff_t i = 0; i < ni; i++)
            out[j * out_stride + i] = in[i * step + j * j_stride];
}

/* A short row, vector by vector; the last ones overlap. */
static inline __attribute__((always_inline)) void FC(copy_row)(const T *in, ptrdiff_t n, T *out)
{
    if (n >= LANES) {
        for (ptrdiff_t i = 0; i < n; i += LANES) {
            const ptrdiff_t at = i + LANES <= n ? i : n - LANES;
            *(V *)(out + at) = *(const V *)(in + at);
        }
        return;
    }
#ifdef MASKED_LOAD
    MASKED_STORE(out, (1u << n) - 1, MASKED_LOAD((1u << n) - 1, in));
#else
    const size_t bytes = (size_t)n * sizeof(T);
    if (bytes >= 16) {
        memcpy(out, in, 16);
        memcpy((char *)out + bytes - 16, (const char *)in + bytes - 16, 16);
    } else {
        for (ptrdiff_t i = 0; i < n; i++)
            out[i] = in[i];
    }
#endif
}

static void FC(transpose)(const void *input, ptrdiff_t i_stride, ptrdiff_t j_stride, ptrdiff_t ni, ptrdiff_t nj,
                          void *output, ptrdiff_t out_stride)
{
    const T *in = input;
    T *out = output;
    if (ni == 1 && out_stride == 1) { /* a column that becomes a row */
        ni = nj;
        nj = 1;
        i_stride = j_stride;
    }
    if (i_stride == 1) { /* rows are contiguous on both sides */
        if (j_stride == ni && out_stride == ni) { /* and continue one another */
            ni *= nj;
            nj = 1;
        }
        if (ni <= 16 * LANES) /* a call of memcpy takes as long as so short a row */
            for (ptrdiff_t j = 0; j < nj; j++)
                FC(copy_row)(in + j * j_stride, ni, out + j * out_stride);
        else
            for (ptrdiff_t j = 0; j < nj; j++)
                memcpy(out + j * out_stride, in + j * j_stride, (size_t)ni * sizeof(T));
        return;
    }
    if (j_stride < 0) { /* rotated filters: read forwards, write backwards */
        in += (nj - 1) * j_stride;
        out += (nj - 1) * out_stride;
        j_stride = -j_stride;
        out_stride = -out_stride;
    }
    const int side_by_side = j_stride == 1 && ni == 3 && out_stride == 3;
#ifdef WIDE
    if (j_stride == 1 && ni >= WIDE && nj >= WIDE) {
        SQUARES(transpose, WIDE)(in, i_stride, ni, nj, out, out_stride);
        return;
    }
    if (side_by_side && nj >= WIDE) {
        SQUARES(interleave_3, WIDE)(in, i_stride, nj, out);
        return;
    }
#endif
#if defined(WIDE) && defined(MASKED_LOAD)
    if (j_stride == 1 && ni > 4 && nj >= WIDE) {
        SQUARES(transpose_few, WIDE)(in, i_stride, ni, nj, out, out_stride);
        return;
    }
    if (ni >= WIDE && nj > 1 && j_stride > 0 && (nj - 1) * j_stride < WIDE && !(nj == 4 && j_stride == 1)) { /* 4x4 squares */
        SQUARES(transpose_short, WIDE)(in, i_stride, j_stride, ni, nj, out, out_stride);
        return;
    }
#endif
    if (side_by_side && nj >= 4) {
        SQUARES(interleave_3, 4)(in, i_stride, nj, out);
        return;
    }
    if (j_stride == 1 && ni >= 4 && nj >= 4) {
        SQUARES(transpose, 4)(in, i_stride, ni, nj, out, out_stride);
        return;
    }
#if defined(WIDE) && defined(MASKED_LOAD)
    if (i_stride == 2) {
        SQUARES(copy_second, WIDE)(in, j_stride, ni, nj, out, out_stride);
        return;
    }
#endif
    if (i_stride == 2)
        FC(copy_every)(in, 2, j_stride, ni, nj, out, out_stride);
    else if (i_stride == 4)
        FC(copy_every)(in, 4, j_stride, ni, nj, out, out_stride);
    else
        FC(copy_every)(in, i_stride, j_stride, ni, nj, out, out_stride);
}

static inline T FC(finish)(T value, const T *bias, ptrdiff_t channel, int relu)
{
    if (bias)
        value += bias[channel];
    return relu && value < 0 ? 0 : value; /* a NaN stays one */
}

static void FC(epilogue)(const fc_epilogue *e, const void *tile, ptrdiff_t c_stride, ptrdiff_t pixels,
                         ptrdiff_t channels, void *output)
{
    const T *c = tile;
    T *out = output;
    const ptrdiff_t ps = e->pixel_stride, cs = e->channel_stride;
    const ptrdiff_t most = cs == 1 || channels < pixels ? channels : pixels; /* side of a square */
#ifdef WIDE
    if (most >= WIDE) {
        SQUARES(epilogue, WIDE)(e, c, c_stride, pixels, channels, out);
        return;
    }
#endif
    if (most >= 4) {
        SQUARES(epilogue, 4)(e, c, c_stride, pixels, channels, out);
        return;
    }
    for (ptrdiff_t p = 0; p < pixels; p++)
        for (ptrdiff_t i = 0; i < channels; i++)
            out[i * cs + p * ps] = FC(finish)(c[p * c_stride + i], e->bias, i, e->relu);
}

static void FC(weave)(const fc_epilogue *e, const void *const *c, ptrdiff_t tiles, ptrdiff_t c_stride, ptrdiff_t pixels,
                      ptrdiff_t channels, void *output)
{
    T *out = output;
#ifdef MASKED_STORE
    const ptrdiff_t least = channels;
#else
    const ptrdiff_t least = channels < pixels ? channels : pixels;
#endif
#ifdef WIDE
    if (least >= WIDE) {
        SQUARES(weave, WIDE)(e, c, tiles, c_stride, pixels, channels, out);
        return;
    }
#endif
    if (least >= 4 && pixels >= 4) {
        SQUARES(weave, 4)(e, c, tiles, c_stride, pixels, channels, out);
        return;
    }
    for (ptrdiff_t p = 0; p < pixels; p++)
        for (ptrdiff_t i = 0; i < channels; i++)
            out[i * e->channel_stride + p] =
                FC(finish)(((const T *)c[p % tiles])[p / tiles * c_stride + i], e->bias, i, e->relu);
}

/* ------------------------------------------------------------------------------------------------------- depthwise */

enum { FC(pixels) = FC_DEPTHWISE_PIXELS + 1 }; /* whose sums are in registers, beside a row of 7 weights */

/* Sums of channel i on, finished. */
static inline __attribute__((always_inline)) V FC(finished)(const fc_depthwise *d, V sum, ptrdiff_t i)
{
    if (d->bias)
        sum += *(const V *)((const T *)d->bias + i);
    if (d->relu)
        sum = FC(rectified)(sum);
    return sum;
}

/* A single pixel, some vectors of channels at once: one would wait for each of its sums. */
static void FC(depthwise_one)(const fc_depthwise *d, const T *a, const T *b, T *c)
{
    enum { TOGETHER = 4 };
    const int vectors = d->channels >= TOGETHER * LANES ? TOGETHER : 1;
    for (ptrdiff_t next = 0; next < d->channels; next += vectors * LANES) {
        const ptrdiff_t i = next + vectors * LANES <= d->channels ? next : d->channels - vectors * LANES;
        V acc[TOGETHER] = {{0}};
        for (ptrdiff_t t = 0; t < d->n_taps; t++) {
            const V *x = (const V *)(a + d->taps[t] + i), *w = (const V *)(b + d->weights[t] + i);
            acc[0] += x[0] * w[0];
            if (vectors > 1)
                UNROLL for (int n = 1; n < TOGETHER; n++)
                    acc[n] += x[n] * w[n];
        }
        for (int n = 0; n < vectors; n++)
            *(V *)(c + i + n * LANES) = FC(finished)(d, acc[n], i + n * LANES);
    }
}

static void FC(depthwise_any)(const fc_depthwise *d, const T *a, const ptrdiff_t *pixels, ptrdiff_t n_pixels, const T *b, T *c)
{
    enum { PIXELS = 6 };
    if (n_pixels == 1) {
        FC(depthwise_one)(d, a + pixels[0], b, c);
        return;
    }
    for (ptrdiff_t p = 0; p < n_pixels; p += PIXELS) {
        const T *row[PIXELS];
        UNROLL for (int n = 0; n < PIXELS; n++)
            row[n] = a + pixels[p + n < n_pixels ? p + n : n_pixels - 1];
        for (ptrdiff_t next = 0; next < d->channels; next += LANES) { /* the last channels overlap those before them */
            const ptrdiff_t i = next + LANES <= d->channels ? next : d->channels - LANES;
            V acc[PIXELS] = {{0}};
            for (ptrdiff_t t = 0; t < d->n_taps; t++) {
                V w = *(const V *)(b + d->weights[t] + i);
                UNROLL for (int n = 0; n < PIXELS; n++)
                    acc[n] += *(const V *)(row[n] + d->taps[t] + i) * w;
            }
            for (int n = 0; n < PIXELS && p + n < n_pixels; n++)
                *(V *)(c + (p + n) * d->out_step + i) = FC(finished)(d, acc[n], i);
        }
    }
}

/* Some neighbouring pixels and rows of `wide` neighbouring taps (constants): a cell is loaded once for all taps of a row. At an edge there
 * are only those of a row's cells from `from` on and before `to`. */
static inline __attribute__((always_inline)) void FC(depthwise_run)(const fc_depthwise *d, const int some, const int wide, const int edge,
                                                                    ptrdiff_t from, ptrdiff_t to, const T *a, const T *b, T *c)
{
    const ptrdiff_t cell = d->cell, out_step = d->out_step, next_weight = d->weights[1] - d->weights[0];
    for (ptrdiff_t next = 0; next < d->channels; next += LANES) {
        const ptrdiff_t i = next + LANES <= d->channels ? next : d->channels - LANES;
        V acc[FC(pixels)] = {{0}};
        for (ptrdiff_t t = 0; t < d->n_taps; t += wide) {
            const T *cells = a + d->taps[t] + i;
            V w[7];
            UNROLL for (int n = 0; n < wide; n++)
                w[n] = *(const V *)(b + d->weights[t] + n * next_weight + i);
            UNROLL for (int j = 0; j < some + wide - 1; j++, cells += cell) {
                if (edge && (j < from || j >= to))
                    continue;
                V x = *(const V *)cells;
                HELD(x);
                UNROLL for (int n = 0; n < wide; n++)
                    if (j - n >= 0 && j - n < some)
                        acc[j - n] += x * w[n];
            }
        }
        UNROLL for (int n = 0; n < some; n++)
            *(V *)(c + n * out_step + i) = FC(finished)(d, acc[n], i);
    }
}

/* The same at pixel p of a row of them. */
#define RUN(some, wide)                                                                                                     \
    static void FC(depthwise_##some##_##wide)(const fc_depthwise *d, ptrdiff_t p, ptrdiff_t n_pixels, const T *a, const T *b, T *c) \
    {                                                                                                                       \
        const ptrdiff_t from = d->before - p, to = n_pixels - p + wide - 1 - d->after;                                      \
        if (from <= 0 && to >= some + wide - 1)                                                                             \
            FC(depthwise_run)(d, some, wide, 0, 0, 0, a, b, c);                                                             \
        else                                                                                                                \
            FC(depthwise_run)(d, some, wide, 1, from, to, a, b, c);                                                         \
    }
RUN(7, 3) RUN(7, 5) RUN(7, 7) RUN(8, 3) RUN(8, 5) RUN(8, 7)
#undef RUN
static void (*const FC(depthwise_runs)[2][3])(const fc_depthwise *d, ptrdiff_t p, ptrdiff_t n_pixels, const T *a, const T *b, T *c) = {
    {FC(depthwise_7_3), FC(depthwise_7_5), FC(depthwise_7_7)}, {FC(depthwise_8_3), FC(depthwise_8_5), FC(depthwise_8_7)}};

static void FC(depthwise)(const fc_depthwise *d, const void *image, const ptrdiff_t *pixels, ptrdiff_t n_pixels,
                          const void *weight, void *out)
{
    const T *a = image, *b = weight;
    T *c = out;
    const int wide = d->wide, known = d->n_taps > 0 && (wide == 3 || wide == 5 || wide == 7);
    const int neighbours = known && d->taps[1] - d->taps[0] == d->cell && n_pixels > 1 && pixels[1] - pixels[0] == d->cell;
    for (ptrdiff_t p = 0, run; p < n_pixels; p += run) {
        for (run = neighbours ? 1 : n_pixels; p + run < n_pixels && pixels[p + run] - pixels[p] == run * d->cell;)
            run++;
        const int some = run < FC(pixels) ? FC(pixels) - 1 : FC(pixels);
        if (!neighbours || run < some) {
            FC(depthwise_any)(d, a, pixels + p, run, b, c + p * d->out_step);
            continue;
        }
        for (ptrdiff_t next = 0; next < run; next += some) { /* the last pixels overlap those before them */
            const ptrdiff_t i = next + some <= run ? next : run - some;
            FC(depthwise_runs)[some == FC(pixels)][wide / 2 - 1](d, i, run, a + pixels[p + i], b, c + (p + i) * d->out_step);
        }
    }
}

enum { FC(summed_taps) = 9 }; /* at a time: of 3x3 filters all, as many as hide the latency */

/* Sums over a row of pixels, of as many taps as stay in registers: a gradient is loaded once for all of them. `count` is a constant where
 * this is inlined. */
static inline __attribute__((always_inline)) void FC(depthwise_taps)(const ptrdiff_t *taps, const int count, const T *image, ptrdiff_t a_step,
                                                                     const T *grad, ptrdiff_t b_step, ptrdiff_t n_pixels, ptrdiff_t block, T *out)
{
    for (ptrdiff_t i = 0; i < block; i += LANES) {
        const T *a = image + i, *b = grad + i;
        ptrdiff_t p = n_pixels;
        V acc[FC(summed_taps)], odd = {0};
        UNROLL for (int t = 0; t < count; t++)
            acc[t] = (V){0};
        if (count == 1) { /* each sum would wait for the one before */
            for (; p > 1; p -= 2, a += 2 * a_step, b += 2 * b_step) {
                acc[0] += *(const V *)(a + taps[0]) * *(const V *)b;
                odd += *(const V *)(a + a_step + taps[0]) * *(const V *)(b + b_step);
            }
            acc[0] += odd;
        }
        for (; p > 0; p--, a += a_step, b += b_step) {
            const V factor = *(const V *)b;
            UNROLL for (int t = 0; t < count; t++)
                acc[t] += *(const V *)(a + taps[t]) * factor;
        }
        UNROLL for (int t = 0; t < count; t++)
            *(V *)(out + t * block + i) += acc[t];
    }
}

#define TAPS_CASE(n) case n: FC(depthwise_taps)(taps, n, image, a_step, grad, b_step, n_pixels, block, sums); break;

static void FC(depthwise_weight)(const ptrdiff_t *taps, ptrdiff_t n_taps, const void *image, ptrdiff_t a_step,
                                 const void *grad, ptrdiff_t b_step, ptrdiff_t n_pixels, ptrdiff_t block, void *out)
{
    T *sums = out;
    for (ptrdiff_t count; n_taps > 0; taps += count, n_taps -= count, sums += count * block) {
        count = n_taps < FC(summed_taps) ? n_taps : FC(summed_taps);
        switch (count) {
            TAPS_CASE(1) TAPS_CASE(2) TAPS_CASE(3) TAPS_CASE(4) TAPS_CASE(5) TAPS_CASE(6) TAPS_CASE(7) TAPS_CASE(8) TAPS_CASE(9)
        }
    }
}
#undef TAPS_CASE

/* Some steps over a row's cells, from number j on, a gradient of each in its turn: all of them are there, with all the pixels that see them,
 * unless it is an edge. `rows` of neighbouring taps, `wide`, `edge` and `steps` are constants where this is inlined. */
static inline __attribute__((always_inline)) void FC(weight_steps)(const fc_window *w, const int rows, const int wide, const int edge,
                                                                   const int steps, ptrdiff_t j, const T *const *cells, const T *grad,
                                                                   V acc[][7], V *g)
{
    UNROLL for (int u = 0; u < steps; u++, j++) {
        if (!edge || j < w->pixels)
            g[u % wide] = *(const V *)(grad + j * w->grad_step);
        if (edge && (j < w->from || j >= w->to))
            continue;
        UNROLL for (int r = 0; r < rows; r++) {
            V x = *(const V *)(cells[r] + j * w->cell_step);
            HELD(x);
            UNROLL for (int n = 0; n < wide; n++)
                if (!edge || (j - n >= 0 && j - n < w->pixels))
                    acc[r][n] += x * g[(u - n + 2 * wide) % wide];
        }
    }
}

/* Sums over a row of pixels: a cell is loaded once for all taps that see it, a gradient for some rows of them. */
static inline __attribute__((always_inline)) void FC(weight_rows)(const fc_window *w, const int rows, const int wide, const ptrdiff_t *starts,
                                                                  const T *image, const T *grad, T *out)
{
    for (ptrdiff_t i = 0; i < w->channels; i += LANES) {
        const T *cells[3];
        V acc[3][7], g[7];
        ptrdiff_t j = wide;
        UNROLL for (int r = 0; r < rows; r++) {
            cells[r] = image + starts[r] + i;
            UNROLL for (int n = 0; n < wide; n++)
                acc[r][n] = (V){0};
        }
        FC(weight_steps)(w, rows, wide, 1, wide, 0, cells, grad + i, acc, g);
        for (; j + wide <= w->pixels; j += wide)
            FC(weight_steps)(w, rows, wide, 0, wide, j, cells, grad + i, acc, g);
        FC(weight_steps)(w, rows, wide, 1, 2 * wide - 2, j, cells, grad + i, acc, g);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int n = 0; n < wide; n++)
                *(V *)(out + (r * wide + n) * w->channels + i) += acc[r][n];
    }
}

/* Rows of taps taken together are as many as hide the latency, and leave registers for gradients. */
static void FC(depthwise_weight_rows)(const fc_window *w, const ptrdiff_t *starts, ptrdiff_t n_rows, const void *image, const void *grad,
                                      void *out)
{
    T *sums = out;
    for (ptrdiff_t rows; n_rows > 0; n_rows -= rows, starts += rows, sums += rows * w->wide * w->channels) {
        const ptrdiff_t most = w->wide == 3 ? 3 : w->wide == 5 ? 2 : 1;
        rows = n_rows < most ? n_rows : most;
#define ROWS_CASE(rows, wide) case 8 * rows + wide: FC(weight_rows)(w, rows, wide, starts, image, grad, sums); break;
        switch (8 * rows + w->wide) {
            ROWS_CASE(1, 3) ROWS_CASE(2, 3) ROWS_CASE(3, 3) ROWS_CASE(1, 5) ROWS_CASE(2, 5) ROWS_CASE(1, 7)
        }
#undef ROWS_CASE
    }
}

static void FC(add)(void *total, const void *more, ptrdiff_t n)
{
    T *sums = total;
    const T *x = more;
    for (ptrdiff_t i = 0; i < n; i += LANES)
        *(V *)(sums + i) += *(const V *)(x + i);
}

static void FC(add_apart)(void *total, ptrdiff_t step, const void *more, ptrdiff_t n)
{
    typedef T part __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
    enum { PART = 16 / sizeof(T) };
    T *sums = total;
    const T *x = more;
    ptrdiff_t i = 0;
    if (step == 1) {
        for (; i + LANES <= n; i += LANES)
            *(V *)(sums + i) += *(const V *)(x + i);
        for (; i + PART <= n; i += PART)
            *(part *)(sums + i) += *(const part *)(x + i);
    }
#ifdef MASKED_LOAD
    else if (step > 1 && 2 * step <= LANES && n >= 24) { /* in short rows the next sums would wait: masked stores aren't forwarded */
        const ptrdiff_t count = (LANES - 1) / step + 1;
        unsigned lanes = 0;
        for (ptrdiff_t k = 0; k < count; k++)
            lanes |= 1u << k * step;
        for (; i + count <= n; i += count) {
            T *at = sums + i * step;
            MASKED_STORE(at, lanes, MASKED_LOAD(lanes, at) + SPREAD_LOAD(lanes, x + i));
        }
    }
#endif
    for (; i < n; i++)
        sums[i * step] += x[i];
}

/* ---------------------------------------------------------------------------------------------------------- planar */

#include "planar.h"
#include "pointwise.h"

/* -------------------------------------------------------------------------------------------------------- Winograd */

#include "winograd.h"

/* A branch for each number, or a single int for all, would keep the compiler from using vectors. */
static int FC(all_below)(const void *input, ptrdiff_t n, double limit)
{
    typedef T_INT mask __attribute__((vector_size(VECTOR_BYTES)));
    const T *x = input, most = (T)limit;
    mask below[2] = {(mask){0} - 1, (mask){0} - 1};
    ptrdiff_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        UNROLL for (int v = 0; v < 2; v++) {
            const V lanes = *(const V *)(x + i + v * LANES);
            below[v] &= (mask)(lanes < most) & (mask)(lanes > -most); /* false for a NaN */
        }
    T_INT all = -1;
    UNROLL for (int lane = 0; lane < LANES; lane++)
        all &= below[0][lane] & below[1][lane];
    for (; i < n; i++)
        all &= -(x[i] < most && x[i] > -most);
    return (int)-all;
}

/* Of bits: an infinity times 0 would be a NaN. */
static void FC(relu_grad)(const void *output, const void *grad, ptrdiff_t n, void *grad_input)
{
    typedef T_INT bits __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    const T *y = output, *from = grad;
    T *to = grad_input;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        *(bits *)(to + i) = *(const bits *)(from + i) & (bits)(*(const V *)(y + i) > (V){0});
    for (; i < n; i++)
        to[i] = y[i] > 0 ? from[i] : 0;
}

/* ----------------------------------------------------------------------------------------------------- max pooling */

#undef V /* max_pool.h has its own, at two widths */

#define POOL(name) FC(name##_vector)
#define WIDTH (VECTOR_BYTES / T_BYTES)
#include "max_pool.h"
#undef POOL
#undef WIDTH

#if VECTOR_BYTES > 4 * T_BYTES
#define POOL(name) FC(name##_quad)
#define WIDTH 4
#include "max_pool.h"
#undef POOL
#undef WIDTH
#endif

/* Whether vectors that are those bytes apart (several distances, or-ed) can be streamed. */
static inline int FC(can_stream)(const fc_runs *out, ptrdiff_t distances)
{
    return STREAMS && out->stream && ((uintptr_t)out->data | (uintptr_t)distances) % 16 == 0;
}

static inline void FC(max_window)(const fc_cells *cells, const T *in, const fc_runs *out, ptrdiff_t out_at,
                                  const fc_runs *winners, ptrdiff_t winners_at)
{
    T best = -(T)INFINITY;
    int32_t winner = cells->numbers[0];
    for (ptrdiff_t t = 0; t < cells->count; t++) {
        const T x = in[cells->offsets[t]];
        const int take = (x > best) | (x != x);
        best = take ? x : best;
        winner = take ? cells->numbers[t] : winner;
    }
    ((T *)out->data)[out_at] = best;
    if (winners->item == 1)
        ((uint8_t *)winners->data)[winners_at] = (uint8_t)winner;
    else if (winners->item == 2)
        ((uint16_t *)winners->data)[winners_at] = (uint16_t)winner;
}

static inline __attribute__((always_inline)) void FC(max_runs)(const fc_cells *cells, ptrdiff_t runs, ptrdiff_t n,
                                                               const fc_runs *in, ptrdiff_t step, const int wanted,
                                                               const fc_runs *out, const fc_runs *winners)
{
    const int stream = FC(can_stream)(out, (out->run | n) * T_BYTES);
    for (ptrdiff_t r = 0; r < runs; r++) {
        const T *from = (const T *)in->data + r * in->run;
        const ptrdiff_t to = r * out->run, won = r * winners->run;
        if (n >= 4 * LANES)
            FC(max_run_vector)(cells, n, from, step, 4, wanted, out, to, stream, winners, won);
        else if (n >= 2 * LANES)
            FC(max_run_vector)(cells, n, from, step, 2, wanted, out, to, 0, winners, won);
        else if (n >= LANES)
            FC(max_run_vector)(cells, n, from, step, 1, wanted, out, to, 0, winners, won);
#if VECTOR_BYTES > 4 * T_BYTES
        else if (n >= 4)
            FC(max_run_quad)(cells, n, from, step, 1, wanted, out, to, 0, winners, won);
#endif
        else
            for (ptrdiff_t i = 0; i < n; i++)
                FC(max_window)(cells, from + i * step, out, to + i * out->step, winners, won + i * winners->step);
    }
}

static void FC(max_pool)(const fc_cells *cells, ptrdiff_t runs, ptrdiff_t n, const fc_runs *input,
                         const fc_runs *output, const fc_runs *wins)
{
    const fc_runs copy[3] = {*input, *output, *wins}; /* for the compiler: what is stored doesn't change them */
    const fc_runs *in = &copy[0], *out = &copy[1], *winners = &copy[2];
#define STEP_CASE(step)                                             \
    if (winners->item)                                              \
        FC(max_runs)(cells, runs, n, in, step, 1, out, winners);    \
    else                                                            \
        FC(max_runs)(cells, runs, n, in, step, 0, out, winners);
    switch (in->step) {
    case 1:
        STEP_CASE(1) break;
    case 2:
        STEP_CASE(2) break;
    case 4:
        STEP_CASE(4) break;
    default:
        STEP_CASE(in->step)
    }
#undef STEP_CASE
}

static void FC(max_pool_finite)(const fc_cells *cells, ptrdiff_t n, const void *input, void *output, uint8_t *wins,
                                const void *ahead, ptrdiff_t bytes)
{
    const T *in = input;
    T *out = output;
    const fc_runs winners = {.data = wins, .step = 1, .item = 1}, rest = {.data = wins ? wins + n % (4 * LANES) : NULL, .step = 1, .item = 1};
    const ptrdiff_t odd = n % (4 * LANES), lines = n > odd ? (bytes + 63) / 64 / ((n - odd) / (4 * LANES)) + 1 : 0;
    if (wins) {
        FC(max_finite_vector)(cells, odd, in, 1, 1, out, &winners, NULL, 0);
        FC(max_finite_vector)(cells, n - odd, in + odd, 4, 1, out + odd, &rest, ahead, lines);
    } else {
        FC(max_finite_vector)(cells, odd, in, 1, 0, out, &winners, NULL, 0);
        FC(max_finite_vector)(cells, n - odd, in + odd, 4, 0, out + odd, &rest, ahead, lines);
    }
}

static inline T FC(gather_cell)(const fc_cells *sources, const T *grad, const uint8_t *winners)
{
    T sum = 0;
    for (ptrdiff_t t = 0; t < sources->count; t++) {
        const T choice[2] = {0, grad[sources->offsets[t]]}; /* no branch: who wins is a matter of chance */
        sum += choice[winners[sources->offsets[t]] == sources->numbers[t]];
    }
    return sum;
}

/* Vectors that gradients are added to at once. */
#if VECTOR_BYTES == 64
#define MOST_WON 4
#else
#define MOST_WON (LANES <= 8 ? 2 : 1)
#endif

enum { FC(ahead) = 2048, FC(in_turns) = 2048 }; /* bytes: from a cell to those that are written soon, of a class in its turn */

/* The cells of one class, in runs of n. */
static void FC(gather_class)(const fc_cells *sources, ptrdiff_t runs, ptrdiff_t n, const fc_runs *grads, const fc_runs *wins,
                             const fc_runs *to, T *out, const int stream)
{
    const T *grad = grads->data;
    const uint8_t *winners = wins->data;
    const ptrdiff_t bytes = (to->run > 0 ? to->run : -to->run) * T_BYTES;
    const ptrdiff_t ahead = bytes < FC(ahead) && bytes ? FC(ahead) / bytes * to->run * T_BYTES : to->run * T_BYTES;
    if (n >= LANES && stream)
        FC(gather_class_vector)(sources, runs, n, grads->run, grad, winners, MOST_WON, out, to->run, 1, 1, ahead);
    else if (n >= LANES && to->step == 1)
        FC(gather_class_vector)(sources, runs, n, grads->run, grad, winners, MOST_WON, out, to->run, 1, 0, ahead);
    else if (n >= LANES)
        FC(gather_class_vector)(sources, runs, n, grads->run, grad, winners, 1, out, to->run, to->step, 0, ahead);
#if VECTOR_BYTES > 4 * T_BYTES
    else if (n >= 4)
        FC(gather_class_quad)(sources, runs, n, grads->run, grad, winners, 1, out, to->run, to->step, 0, ahead);
#endif
    else
        for (ptrdiff_t r = 0; r < runs; r++, grad += grads->run, winners += grads->run, out += to->run)
            for (ptrdiff_t i = 0; i < n; i++)
                out[i * to->step] = FC(gather_cell)(sources, grad + i, winners + i);
}

static void FC(max_pool_grad)(const fc_cells *sources, const fc_classes *classes, ptrdiff_t runs, ptrdiff_t n,
                              const fc_runs *grad, const fc_runs *winners, const fc_runs *out)
{
    const int stream = out->step == 1 && FC(can_stream)(out, (out->run | classes->step | n) * T_BYTES);
    const ptrdiff_t most = classes->count == 1 ? runs : FC(in_turns) / (n * T_BYTES) + 1; /* memory is written in its order, about */
    fc_runs g = *grad, w = *winners;
    for (ptrdiff_t r = 0; r < runs; r += most) {
        for (int x = 0; x < classes->count; x++)
            FC(gather_class)(&sources[x], runs - r < most ? runs - r : most, n, &g, &w, out,
                             (T *)out->data + r * out->run + x * classes->step, stream);
        g.data = (T *)g.data + most * g.run;
        w.data = (uint8_t *)w.data + most * w.run;
    }
}

#include "max_pool_scatter.h"
#include "max_pool_grad.h"

/* ----------------------------------------------------------------------------------------------------------- table */

static const fc_ukernels FC(table) = {
    .lanes = VECTOR_BYTES / sizeof(T),
    .tile_rows = TILE_ROWS,
    .even_rows = EVEN_ROWS,
    .depth_step = 1,
    .fused = FUSED,
    .brgemm = FC(brgemm),
    .saturate = FC(saturate),
    .epilogue = FC(epilogue),
    .weave = FC(weave),
    .transpose = FC(transpose),
    .depthwise = FC(depthwise),
    .depthwise_weight = FC(depthwise_weight),
    .depthwise_weight_rows = FC(depthwise_weight_rows),
    .pad = FC(pad),
    .planar_filters = FC(filters),
    .planar = FC(planar),
    .pointwise = FC(pointwise),
    .planar_weight = FC(planar_weight),
    .sum_lanes = FC(sum_lanes),
    .planar_rows = FC(rows),
    .planar_one = FC(planar_one),
    .zip = FC(zip),
    .max_pool = FC(max_pool),
    .max_pool_finite = FC(max_pool_finite),
    .to_phases = FC(to_phases),
    .copy_rows = FC(copy_rows),
    .max_pool_grad = FC(max_pool_grad),
    .max_pool_won = FC(max_pool_won),
    .max_pool_scatter = FC(max_pool_scatter),
    .winograd_transform = FC(winograd_transform),
    .winograd_gather = FC(winograd_gather),
    .add = FC(add),
    .add_apart = FC(add_apart),
    .all_below = FC(all_below),
    .relu_grad = FC(relu_grad),
};

#undef LANES
#undef LINE
#undef MOST_WON
#undef WIDE
