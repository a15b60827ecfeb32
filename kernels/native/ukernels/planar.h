/* Convolution with neighbouring pixels as lanes; family.h includes this. Nothing is turned: rows of planes are read, and rows of
 * the output are stored, as they lie there.
 */

static inline V FC(rectified)(V value)
{
    return (V)((__typeof__(value < 0))value & ~(value < 0)); /* a NaN stays one */
}

/* The first n < LANES elements. */
static inline __attribute__((always_inline)) V FC(load_some)(const T *in, ptrdiff_t n)
{
#ifdef MASKED_LOAD
    return (V)MASKED_LOAD((1u << n) - 1, in);
#else
    V x = {0};
    T *lanes = (T *)&x;
    for (ptrdiff_t i = 0; i < n; i++)
        lanes[i] = in[i];
    return x;
#endif
}

static inline __attribute__((always_inline)) void FC(store_some)(V x, ptrdiff_t n, T *out)
{
#ifdef MASKED_STORE
    MASKED_STORE(out, (1u << n) - 1, x);
#else
    FC(copy_row)((const T *)&x, n, out);
#endif
}

/* Finish the sums of a vector of pixels, of which there are n, and store them. */
static inline __attribute__((always_inline)) void FC(store_pixels)(const fc_planes *p, V sum, const T *bias, ptrdiff_t n, T *out)
{
    if (p->accumulate)
        sum += n >= LANES ? *(const V *)out : FC(load_some)(out, n);
    if (bias)
        sum += *bias;
    if (p->relu)
        sum = FC(rectified)(sum);
    if (n >= LANES)
        *(V *)out = sum;
    else
        FC(store_some)(sum, n, out);
}

/* -------------------------------------------------------------------------------------------------------- padding */

static T *FC(pad_zeros)(T *out, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += LANES)
        *(V *)(out + i) = (V){0};
    return out + n;
}

#ifdef MASKED_LOAD
/* Which lanes of a vector are cells, if it starts `at` cells behind the start of a padded row. */
static unsigned FC(inside)(const fc_padding *p, ptrdiff_t at)
{
    const ptrdiff_t first = p->before - at, end = first + p->cells;
    const unsigned below = first > 0 ? first < LANES ? (1u << first) - 1 : ~0u : 0;
    return (end > 0 ? end < LANES ? (1u << end) - 1 : (1u << LANES) - 1 : 0) & ~below;
}

/* Rows of neighbouring cells, a vector of all rows at a time; every vector is stored once, whole. */
static void FC(pad_neighbours)(const fc_padding *p, const T *in, T *out)
{
    for (ptrdiff_t at = 0; at < p->wide; at += LANES) {
        const unsigned lanes = FC(inside)(p, at);
        const T *from = in + at - p->before;
        for (ptrdiff_t r = 0; r < p->rows; r++)
            *(V *)(out + r * p->wide + at) = lanes ? (V)MASKED_LOAD(lanes, from + r * p->row_step) : (V){0};
    }
}

#define FOUR(i) i, i + 2, i + 4, i + 6
#if T_BYTES == 4
#define EVERY_SECOND(i) FOUR(i), FOUR(i + 8), FOUR(i + 16), FOUR(i + 24)
#else
#define EVERY_SECOND(i) FOUR(i), FOUR(i + 8)
#endif
/* The same where every row becomes two. */
static void FC(pad_pairs)(const fc_padding *p, const T *in, T *out)
{
    for (ptrdiff_t at = 0; at < p->wide; at += LANES) {
        const unsigned low = FC(inside)(p, 2 * at), high = FC(inside)(p, 2 * at + LANES);
        const T *from = in + 2 * at - p->before;
        T *to = out + at;
        for (ptrdiff_t r = 0; r < p->rows; r++, from += p->row_step, to += 2 * p->wide) {
            const V x = (V)MASKED_LOAD(low, from), y = (V)MASKED_LOAD(high, from + LANES);
            *(V *)to = SHUFFLE(x, y, EVERY_SECOND(0));
            *(V *)(to + p->wide) = SHUFFLE(x, y, EVERY_SECOND(1));
        }
    }
}
#undef EVERY_SECOND
#undef FOUR
#endif

/* Cells of one phase, `step` apart in the image, to a row of `wide`, zeros around them. */
static void FC(pad_row)(const T *in, ptrdiff_t step, ptrdiff_t before, ptrdiff_t n, ptrdiff_t wide, T *out)
{
    const ptrdiff_t after = (before + n) / LANES * LANES;
    FC(pad_zeros)(out, before);
    FC(pad_zeros)(out + after, wide - after);
    if (step == 1)
        FC(copy_row)(in, n, out + before);
    else
        FC(transpose)(in, step, 0, n, 1, out + before, 0);
}

static void FC(pad)(const fc_padding *p, const void *image, void *out)
{
    const T *in = image;
    const ptrdiff_t line = p->phases * p->wide;
    T *row = FC(pad_zeros)(out, p->above * line);
    FC(pad_zeros)(row + p->rows * line, p->below * line);
#ifdef MASKED_LOAD
    if (p->cell_step == 1 && p->phases <= 2) {
        if (p->phases == 1)
            FC(pad_neighbours)(p, in, row);
        else
            FC(pad_pairs)(p, in, row);
        return;
    }
#endif
    for (ptrdiff_t r = 0; r < p->rows; r++, in += p->row_step)
        for (ptrdiff_t phase = 0; phase < p->phases; phase++, row += p->wide) {
            const ptrdiff_t zeros = p->before > phase ? (p->before - phase + p->phases - 1) / p->phases : 0;
            const ptrdiff_t first = zeros * p->phases + phase - p->before;
            const ptrdiff_t n = p->cells > first ? (p->cells - first + p->phases - 1) / p->phases : 0;
            FC(pad_row)(in + first * p->cell_step, p->phases * p->cell_step, zeros, n, p->wide, row);
        }
}

/* --------------------------------------------------------------------------------------------------- some filters */

#if VECTOR_BYTES == 64
enum { FC(filters) = 8 }; /* x 3 vectors of pixels: 24 sums, 3 vectors of cells and a weight are in 32 registers */
#else
enum { FC(filters) = 4 };
#endif

/* filters and vectors are constants where this is inlined; n pixels are wanted, one at least of the last vector. */
static inline __attribute__((always_inline)) void FC(planar_tile)(const fc_planes *p, const T *weight, const int filters,
                                                                  const T *cells, const int vectors, const T *bias,
                                                                  ptrdiff_t n, T *out)
{
    V acc[8][4] = {{{0}}};
    for (ptrdiff_t t = 0; t < p->n_taps; t++, weight += filters) {
        const T *at = cells + p->taps[t];
        V cell[4];
        UNROLL for (int v = 0; v < vectors; v++)
            cell[v] = *(const V *)(at + v * LANES);
        UNROLL for (int f = 0; f < filters; f++) {
            const V factor = weight[f] - (V){0};
            UNROLL for (int v = 0; v < vectors; v++)
                acc[f][v] += factor * cell[v];
            NEEDED(factor);
        }
    }
    UNROLL for (int f = 0; f < filters; f++)
        UNROLL for (int v = 0; v < vectors; v++)
            FC(store_pixels)(p, acc[f][v], bias ? bias + f : bias, v < vectors - 1 ? LANES : n - v * LANES,
                             out + f * p->out_filter + v * LANES);
}

/* A row of pixels, in tiles of about the same size. */
static inline __attribute__((always_inline)) void FC(planar_row)(const fc_planes *p, const T *weight, const int filters,
                                                                 const T *cells, const T *bias, T *out)
{
    const ptrdiff_t most = filters <= 3 ? 4 : 3, all = (p->columns + LANES - 1) / LANES, tiles = (all + most - 1) / most;
    ptrdiff_t done = 0;
    for (ptrdiff_t tile = 1; tile <= tiles; tile++) {
        const ptrdiff_t vectors = all * tile / tiles - done, x = done * LANES;
        done += vectors;
        if (filters <= 3 && vectors == 4)
            FC(planar_tile)(p, weight, filters, cells + x, 4, bias, p->columns - x, out + x);
        else if (vectors == 3)
            FC(planar_tile)(p, weight, filters, cells + x, 3, bias, p->columns - x, out + x);
        else if (vectors == 2)
            FC(planar_tile)(p, weight, filters, cells + x, 2, bias, p->columns - x, out + x);
        else
            FC(planar_tile)(p, weight, filters, cells + x, 1, bias, p->columns - x, out + x);
    }
}

#define FILTERS_CASE(n)                                                                            \
    case n:                                                                                        \
        for (ptrdiff_t r = 0; r < p->rows && n <= FC(filters); r++)                                 \
            FC(planar_row)(p, w, n <= FC(filters) ? n : 1, a + r * p->cell_row, bias, c + r * p->out_row); \
        break;

static void FC(planar)(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out)
{
    const fc_planes own = *planes, *p = &own; /* which no store changes */
    const T *w = weight, *a = cells, *bias = p->bias;
    T *c = out;
    for (ptrdiff_t n; filters > 0; filters -= n) {
        n = filters < FC(filters) ? filters : FC(filters);
        switch (n) {
            FILTERS_CASE(1)
            FILTERS_CASE(2)
            FILTERS_CASE(3)
            FILTERS_CASE(4)
            FILTERS_CASE(5)
            FILTERS_CASE(6)
            FILTERS_CASE(7)
            FILTERS_CASE(8)
        }
        w += n * p->n_taps;
        bias = bias ? bias + n : bias;
        c += n * p->out_filter;
    }
}
#undef FILTERS_CASE

/* ----------------------------------------------------------------------------------------------------- one filter */

enum { FC(rows) = 7 }; /* of pixels, whose sums are in registers beside a column of 7 weights */

/* A vector of each of `rows` rows of pixels. A cell is loaded once for all `high` taps of a column: rows of pixels are `every` rows
 * of taps apart. All three are constants where this is inlined. */
static inline __attribute__((always_inline)) void FC(columns)(const fc_planes *p, const T *weight, const int high, const int every,
                                                              const int rows, const T *cells, ptrdiff_t n, T *out)
{
    V acc[FC(rows)] = {{0}};
    for (ptrdiff_t t = 0; t < p->n_taps; t++) {
        const T *cell = cells + p->taps[t], *factor = weight + p->weight_taps[t];
        V w[7];
        UNROLL for (int h = 0; h < high; h++, factor += p->weight_row)
            w[h] = *factor - (V){0};
        UNROLL for (int j = 0; j < (rows - 1) * every + high; j++, cell += p->tap_row) {
            const V x = *(const V *)cell;
            UNROLL for (int h = 0; h < high; h++)
                if (j >= h && (j - h) % every == 0 && (j - h) / every < rows)
                    acc[(j - h) / every] += x * w[h];
            NEEDED(x);
        }
        UNROLL for (int h = 0; h < high; h++)
            NEEDED(w[h]);
    }
    UNROLL for (int r = 0; r < rows; r++)
        FC(store_pixels)(p, acc[r], p->bias, n, out + r * p->out_row);
}

/* The same for columns of any height and rows of pixels any distance apart. */
static inline __attribute__((always_inline)) void FC(columns_any)(const fc_planes *p, const T *weight, const int rows,
                                                                  const T *cells, ptrdiff_t n, T *out)
{
    V acc[FC(rows)] = {{0}};
    for (ptrdiff_t t = 0; t < p->n_taps; t++)
        for (ptrdiff_t h = 0; h < p->high; h++) {
            const T *cell = cells + p->taps[t] + h * p->tap_row;
            const T factor = weight[p->weight_taps[t] + h * p->weight_row];
            UNROLL for (int r = 0; r < rows; r++)
                acc[r] += *(const V *)(cell + r * p->cell_row) * factor;
        }
    UNROLL for (int r = 0; r < rows; r++)
        FC(store_pixels)(p, acc[r], p->bias, n, out + r * p->out_row);
}

#define COLUMNS_CASE(n)                                          \
    case n:                                                      \
        if (every == 1)                                          \
            FC(columns)(p, weight, n, 1, FC(rows), cells, left, out); \
        else                                                     \
            FC(columns)(p, weight, n, 2, FC(rows), cells, left, out); \
        break;

static void FC(planar_one)(const fc_planes *planes, const void *weights, const void *plane, void *output)
{
    const fc_planes own = *planes, *p = &own;
    const T *weight = weights;
    const int every = p->cell_row == p->tap_row ? 1 : p->cell_row == 2 * p->tap_row ? 2 : 0;
    const ptrdiff_t together = p->rows >= FC(rows) ? FC(rows) : 1;
    for (ptrdiff_t row = 0; row < p->rows; row += together) {
        const ptrdiff_t r = row + together <= p->rows ? row : p->rows - together; /* the last rows overlap those before them */
        for (ptrdiff_t x = 0; x < p->columns; x += LANES) {
            const T *cells = (const T *)plane + r * p->cell_row + x;
            T *out = (T *)output + r * p->out_row + x;
            const ptrdiff_t left = p->columns - x;
            if (together == 1)
                FC(columns_any)(p, weight, 1, cells, left, out);
            else
                switch (every ? p->high : 0) {
                    COLUMNS_CASE(1)
                    COLUMNS_CASE(2)
                    COLUMNS_CASE(3)
                    COLUMNS_CASE(4)
                    COLUMNS_CASE(5)
                    COLUMNS_CASE(6)
                    COLUMNS_CASE(7)
                default:
                    FC(columns_any)(p, weight, FC(rows), cells, left, out);
                }
        }
    }
}
#undef COLUMNS_CASE
