/* Convolution with neighbouring pixels as lanes; family.h includes this. Nothing is turned: rows of planes are read, and rows of
 * the output are stored, as they lie there.
 */

/* Which lanes of a vector are meant: those from `first` on, up to `end`, where both may lie anywhere. */
#if defined(MASKED_LOAD)
typedef unsigned FC(lanes);
static inline FC(lanes) FC(between)(ptrdiff_t first, ptrdiff_t end)
{
    const unsigned below = first > 0 ? first < LANES ? (1u << first) - 1 : ~0u : 0;
    return (end > 0 ? end < LANES ? (1u << end) - 1 : (1u << LANES) - 1 : 0) & ~below;
}
#define LOAD_LANES(lanes, from) (V)MASKED_LOAD(lanes, from)
#define STORE_LANES(to, lanes, x) MASKED_STORE(to, lanes, x)
#elif defined(LANES_LOAD)
typedef T_INT FC(lanes) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
static inline FC(lanes) FC(between)(ptrdiff_t first, ptrdiff_t end)
{
    static const T_INT numbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
    const FC(lanes) number = *(const FC(lanes) *)numbers;
    return (FC(lanes))(number >= (T_INT)first) & (FC(lanes))(number < (T_INT)end);
}
#define LOAD_LANES(lanes, from) (V)LANES_LOAD(lanes, from)
#define STORE_LANES(to, lanes, x) LANES_STORE(to, lanes, x)
#else
typedef struct {
    ptrdiff_t first, end;
} FC(lanes);
static inline FC(lanes) FC(between)(ptrdiff_t first, ptrdiff_t end)
{
    return (FC(lanes)){first > 0 ? first : 0, end < LANES ? end : LANES};
}
static inline V FC(load_lanes)(FC(lanes) which, const T *from)
{
    V x = {0};
    for (ptrdiff_t i = which.first; i < which.end; i++)
        x[i] = from[i];
    return x;
}
static inline void FC(store_lanes)(T *to, FC(lanes) which, V x)
{
    for (ptrdiff_t i = which.first; i < which.end; i++)
        to[i] = x[i];
}
#define LOAD_LANES(lanes, from) FC(load_lanes)(lanes, from)
#define STORE_LANES(to, lanes, x) FC(store_lanes)(to, lanes, x)
#endif

#if VECTOR_BYTES == 64
enum { FC(widest) = 4, FC(most) = 14 }; /* vectors and rows of a tile */
#else
enum { FC(widest) = 4, FC(most) = 8 };
#endif

/* Rows of n pixels that become every second one of the output: the even lanes of two vectors. */
#if VECTOR_BYTES / T_BYTES == 16
#define LOW_TWICE 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7
#define HIGH_TWICE 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15
#define EVEN_LANES 0x5555
#elif VECTOR_BYTES / T_BYTES == 8
#define LOW_TWICE 0, 0, 1, 1, 2, 2, 3, 3
#define HIGH_TWICE 4, 4, 5, 5, 6, 6, 7, 7
#define EVEN_LANES 0x55
#endif
static __attribute__((noinline)) void FC(spread)(const T *sums, ptrdiff_t rows, ptrdiff_t pitch, ptrdiff_t n, T *out, ptrdiff_t step)
{
    for (ptrdiff_t r = 0; r < rows; r++, sums += pitch, out += step) {
        ptrdiff_t i = 0;
#if defined(MASKED_STORE)
        for (; i < n; i += LANES) {
            const V x = *(const V *)(sums + i);
            const unsigned some = n - i >= LANES ? ~0u : (1u << 2 * (n - i)) - 1;
            MASKED_STORE(out + 2 * i, some & EVEN_LANES, SHUFFLE(x, x, LOW_TWICE));
            MASKED_STORE(out + 2 * i + LANES, (n - i >= LANES ? some : some >> LANES) & EVEN_LANES, SHUFFLE(x, x, HIGH_TWICE));
        }
#endif
        for (; i < n; i++)
            out[2 * i] = sums[i];
    }
}
#undef LOW_TWICE
#undef HIGH_TWICE
#undef EVEN_LANES

/* Vectors of pixels, anywhere: where their sums go, how many pixels are wanted of each, and which lanes these are if not all vectors
 * are whole. */
typedef struct {
    T *out[FC(widest)];
    ptrdiff_t n[FC(widest)];
    FC(lanes) some[FC(widest)];
    int whole;
} FC(target);

static inline __attribute__((always_inline)) void FC(find_lanes)(FC(target) *to, const int vectors)
{
    to->whole = 1;
    UNROLL for (int v = 0; v < vectors; v++) {
        to->whole &= to->n[v] >= LANES;
        to->some[v] = FC(between)(0, to->n[v]);
    }
}

/* Finish a tile's sums and store them, row by row, `step` apart. Each row has a bias of its own, or all have the same. Not all rows may be
 * wanted. Rows and vectors are constants where this is inlined. */
static inline __attribute__((always_inline)) void FC(finish_tile)(const fc_planes *p, V acc[][FC(widest)], const int rows,
                                                                  ptrdiff_t wanted, const int vectors, const T *bias,
                                                                  const int own, const FC(target) *to, ptrdiff_t step)
{
    if (p->accumulate)
        UNROLL for (int r = 0; r < rows; r++) {
            if (r >= wanted)
                break;
            UNROLL for (int v = 0; v < vectors; v++)
                acc[r][v] += to->whole ? *(const V *)(to->out[v] + r * step) : LOAD_LANES(to->some[v], to->out[v] + r * step);
        }
    if (bias)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                acc[r][v] += bias[own * r];
    if (p->relu)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                acc[r][v] = FC(rectified)(acc[r][v]);
    if (p->out_column == 2) {
        V sums[FC(widest)][FC(most)];
        UNROLL for (int v = 0; v < vectors; v++) {
            UNROLL for (int r = 0; r < rows; r++)
                sums[v][r] = acc[r][v];
            FC(spread)((const T *)sums[v], wanted, LANES, to->n[v] < LANES ? to->n[v] : LANES, to->out[v], step);
        }
        return;
    }
    if (to->whole)
        UNROLL for (int r = 0; r < rows; r++) {
            if (r >= wanted)
                break;
            UNROLL for (int v = 0; v < vectors; v++)
                *(V *)(to->out[v] + r * step) = acc[r][v];
        }
    else
        UNROLL for (int v = 0; v < vectors; v++)
            UNROLL for (int r = 0; r < rows; r++) {
                if (r >= wanted)
                    break;
                if (to->n[v] >= LANES)
                    *(V *)(to->out[v] + r * step) = acc[r][v];
                else
                    STORE_LANES(to->out[v] + r * step, to->some[v], acc[r][v]);
            }
}

/* Neighbouring vectors: n pixels, one at least of the last, or fewer than there are. */
static inline __attribute__((always_inline)) FC(target) FC(neighbours)(T *out, ptrdiff_t column, ptrdiff_t n, const int vectors)
{
    FC(target) to;
    UNROLL for (int v = 0; v < vectors; v++) {
        to.out[v] = out + v * LANES * column;
        to.n[v] = n - v * LANES;
    }
    FC(find_lanes)(&to, vectors);
    return to;
}

/* -------------------------------------------------------------------------------------------------------- padding */

static T *FC(pad_zeros)(T *out, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += LANES)
        *(V *)(out + i) = (V){0};
    return out + n;
}

/* The lanes that are cells in a vector that starts `at` cells behind the start of a padded row. */
static FC(lanes) FC(inside)(const fc_padding *p, ptrdiff_t at)
{
    return FC(between)(p->before - at, p->before + p->cells - at);
}

/* Rows of neighbouring cells; every vector is stored once, whole. Narrow rows are copied a vector of each at a time, others row by row, as
 * memory is fetched ahead. */
enum { FC(narrow) = 4, FC(strip) = 16 };
static inline __attribute__((always_inline)) void FC(pad_narrow)(const fc_padding *p, const T *in, T *out, const int vectors)
{
    const ptrdiff_t rows = p->rows, step = p->row_step; /* which no store changes */
    FC(lanes) some[FC(narrow)];
    UNROLL for (int v = 0; v < vectors; v++)
        some[v] = FC(inside)(p, v * LANES);
    for (ptrdiff_t r = 0; r < rows; r++, in += step, out += vectors * LANES)
        UNROLL for (int v = 0; v < vectors; v++)
            *(V *)(out + v * LANES) = LOAD_LANES(some[v], in + v * LANES);
}

#define NARROW_CASES(pad)                      \
    case 1:                                    \
        FC(pad)(p, image - p->before, plane, 1); \
        return;                                \
    case 2:                                    \
        FC(pad)(p, image - p->before, plane, 2); \
        return;                                \
    case 3:                                    \
        FC(pad)(p, image - p->before, plane, 3); \
        return;                                \
    case 4:                                    \
        FC(pad)(p, image - p->before, plane, 4); \
        return;
static void FC(pad_neighbours)(const fc_padding *p, const T *image, T *plane)
{
    switch (p->wide / LANES) {
        NARROW_CASES(pad_narrow)
    }
    FC(lanes) some[FC(strip)];
    for (ptrdiff_t first = 0; first < p->wide; first += FC(strip) * LANES) {
        const ptrdiff_t end = first + FC(strip) * LANES < p->wide ? first + FC(strip) * LANES : p->wide;
        const T *in = image - p->before;
        T *out = plane;
        for (ptrdiff_t at = first; at < end; at += LANES)
            some[(at - first) / LANES] = FC(inside)(p, at);
        for (ptrdiff_t r = 0; r < p->rows; r++, in += p->row_step, out += p->wide)
            for (ptrdiff_t at = first; at < end; at += LANES)
                if (at >= p->before && at + LANES <= p->before + p->cells)
                    *(V *)(out + at) = *(const V *)(in + at);
                else
                    *(V *)(out + at) = LOAD_LANES(some[(at - first) / LANES], in + at);
    }
}

/* The same where every row becomes two. */
#define FOUR(i) i, i + 2, i + 4, i + 6
#define EVERY_SECOND_2(i) i, i + 2
#define EVERY_SECOND_4(i) FOUR(i)
#define EVERY_SECOND_8(i) FOUR(i), FOUR(i + 8)
#define EVERY_SECOND_16(i) FOUR(i), FOUR(i + 8), FOUR(i + 16), FOUR(i + 24)
#if VECTOR_BYTES / T_BYTES == 16
#define EVERY_SECOND EVERY_SECOND_16
#elif VECTOR_BYTES / T_BYTES == 8
#define EVERY_SECOND EVERY_SECOND_8
#elif VECTOR_BYTES / T_BYTES == 4
#define EVERY_SECOND EVERY_SECOND_4
#else
#define EVERY_SECOND EVERY_SECOND_2
#endif
static inline __attribute__((always_inline)) void FC(pad_narrow_pairs)(const fc_padding *p, const T *in, T *out, const int vectors)
{
    const ptrdiff_t rows = p->rows, step = p->row_step; /* which no store changes */
    FC(lanes) some[2 * FC(narrow)];
    UNROLL for (int v = 0; v < 2 * vectors; v++)
        some[v] = FC(inside)(p, v * LANES);
    for (ptrdiff_t r = 0; r < rows; r++, in += step, out += 2 * vectors * LANES)
        UNROLL for (int v = 0; v < vectors; v++) {
            const V x = LOAD_LANES(some[2 * v], in + 2 * v * LANES), y = LOAD_LANES(some[2 * v + 1], in + (2 * v + 1) * LANES);
            *(V *)(out + v * LANES) = SHUFFLE(x, y, EVERY_SECOND(0));
            *(V *)(out + (vectors + v) * LANES) = SHUFFLE(x, y, EVERY_SECOND(1));
        }
}

static void FC(pad_pairs)(const fc_padding *p, const T *image, T *plane)
{
    switch (p->wide / LANES) {
        NARROW_CASES(pad_narrow_pairs)
    }
    FC(lanes) some[FC(strip)];
    const ptrdiff_t strip = FC(strip) * LANES;
    for (ptrdiff_t first = 0; first < 2 * p->wide; first += strip) {
        const ptrdiff_t end = first + strip < 2 * p->wide ? first + strip : 2 * p->wide;
        const T *in = image - p->before;
        T *out = plane;
        for (ptrdiff_t at = first; at < end; at += LANES)
            some[(at - first) / LANES] = FC(inside)(p, at);
        for (ptrdiff_t r = 0; r < p->rows; r++, in += p->row_step, out += 2 * p->wide)
            for (ptrdiff_t at = first; at < end; at += 2 * LANES) {
                const FC(lanes) *which = some + (at - first) / LANES;
                const V x = LOAD_LANES(which[0], in + at), y = LOAD_LANES(which[1], in + at + LANES);
                *(V *)(out + at / 2) = SHUFFLE(x, y, EVERY_SECOND(0));
                *(V *)(out + at / 2 + p->wide) = SHUFFLE(x, y, EVERY_SECOND(1));
            }
    }
}
#undef NARROW_CASES

/* Planes whose cells are apart in the image, row by row of all: channels that are neighbours are turned together. */
static void FC(pad_apart)(const fc_padding *p, ptrdiff_t planes, const T *in, T *out)
{
    const ptrdiff_t line = p->phases * p->wide;
    for (ptrdiff_t i = 0; i < planes; i++) {
        T *row = FC(pad_zeros)(out + i * p->plane_step, p->above * line);
        FC(pad_zeros)(row + p->rows * line, p->below * line);
    }
    out += p->above * line;
    for (ptrdiff_t r = 0; r < p->rows; r++, in += p->row_step)
        for (ptrdiff_t phase = 0; phase < p->phases; phase++, out += p->wide) {
            const ptrdiff_t before = p->before > phase ? (p->before - phase + p->phases - 1) / p->phases : 0;
            const ptrdiff_t first = before * p->phases + phase - p->before;
            const ptrdiff_t n = p->cells > first ? (p->cells - first + p->phases - 1) / p->phases : 0;
            const ptrdiff_t after = (before + n) / LANES * LANES;
            for (ptrdiff_t i = 0; i < planes; i++) {
                FC(pad_zeros)(out + i * p->plane_step, before);
                FC(pad_zeros)(out + i * p->plane_step + after, p->wide - after);
            }
            FC(transpose)(in + first * p->cell_step, p->phases * p->cell_step, p->image_step, n, planes, out + before,
                          p->plane_step);
        }
}

static void FC(pad_plane)(const fc_padding *p, const T *in, T *out)
{
    const ptrdiff_t line = p->phases * p->wide;
    T *row = FC(pad_zeros)(out, p->above * line);
    FC(pad_zeros)(row + p->rows * line, p->below * line);
    if (p->phases == 1)
        FC(pad_neighbours)(p, in, row);
    else
        FC(pad_pairs)(p, in, row);
}

static void FC(pad)(const fc_padding *p, ptrdiff_t planes, const void *image, void *out)
{
    if (p->cell_step != 1 || p->phases > 2) {
        FC(pad_apart)(p, planes, image, out);
        return;
    }
    for (ptrdiff_t i = 0; i < planes; i++)
        FC(pad_plane)(p, (const T *)image + i * p->image_step, (T *)out + i * p->plane_step);
}

/* A row of n cells to one phase, or to the two that even and odd cells belong to. Vectors are stored whole: those of a row that begins
 * there come later. What is added to `sum` is 0, or a NaN where a cell is not finite. */
typedef T_INT FC(bits) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
#define BOTH(x, y) (V)((FC(bits))(x) | (FC(bits))(y))
static inline void FC(row_to_phase)(const T *in, ptrdiff_t n, FC(lanes) some, V nan, T *out, V *sum)
{
    for (; n >= LANES; n -= LANES, in += LANES, out += LANES) {
        const V x = *(const V *)in;
        *sum += x * 0;
        *(V *)out = x;
    }
    if (n) {
        const V x = LOAD_LANES(some, in);
        *sum += x * 0;
        *(V *)out = BOTH(x, nan);
    }
}

static inline void FC(row_to_two)(const T *in, ptrdiff_t n, const FC(lanes) *some, const V *nan, T *even, T *odd, V *sum)
{
    for (; n >= 2 * LANES; n -= 2 * LANES, in += 2 * LANES, even += LANES, odd += LANES) {
        const V x = *(const V *)in, y = *(const V *)(in + LANES);
        *sum += x * 0 + y * 0;
        *(V *)even = SHUFFLE(x, y, EVERY_SECOND(0));
        *(V *)odd = SHUFFLE(x, y, EVERY_SECOND(1));
    }
    if (n) {
        V x = LOAD_LANES(some[0], in), y = LOAD_LANES(some[1], in + LANES);
        *sum += x * 0 + y * 0;
        x = BOTH(x, nan[0]);
        y = BOTH(y, nan[1]);
        *(V *)even = SHUFFLE(x, y, EVERY_SECOND(0));
        *(V *)odd = SHUFFLE(x, y, EVERY_SECOND(1));
    }
}

#undef EVERY_SECOND
#undef EVERY_SECOND_2
#undef EVERY_SECOND_4
#undef EVERY_SECOND_8
#undef EVERY_SECOND_16
#undef FOUR

static void FC(copy_rows)(const fc_rows *rows, const ptrdiff_t *out_step, ptrdiff_t bytes, const void *in, void *out)
{
    for (ptrdiff_t plane = 0; plane < rows->size[0]; plane++)
        for (ptrdiff_t z = 0; z < rows->size[1]; z++) {
            const char *from = (const char *)in + plane * rows->step[0] + z * rows->step[1];
            char *to = (char *)out + plane * out_step[0] + z * out_step[1];
            if (bytes <= 16)
                copy_some_rows(rows->size[2], bytes, 16, from, rows->step[2], to, out_step[2]);
            else if (bytes <= 32)
                copy_some_rows(rows->size[2], bytes, 32, from, rows->step[2], to, out_step[2]);
            else
                copy_some_rows(rows->size[2], bytes, 64, from, rows->step[2], to, out_step[2]);
        }
}

/* --------------------------------------------------------------------------------------------------- some filters */

#if VECTOR_BYTES == 64
enum { FC(filters) = 8 }; /* x 3 vectors of pixels: 24 sums, 3 vectors of cells and a weight are in 32 registers */
#else
enum { FC(filters) = 4 };
#endif

/* The products of one tap. Filters and vectors are constants where this is inlined. */
static inline __attribute__((always_inline)) void FC(add_tap)(ptrdiff_t tap, const T *weight, const int filters,
                                                              const T *const *cells, const int vectors, V acc[][FC(widest)])
{
    V cell[FC(widest)];
    UNROLL for (int v = 0; v < vectors; v++) {
        cell[v] = *(const V *)(cells[v] + tap);
        HELD(cell[v]);
    }
    UNROLL for (int f = 0; f < filters; f++) {
        const V factor = weight[f] - (V){0};
        UNROLL for (int v = 0; v < vectors; v++)
            acc[f][v] += factor * cell[v];
        NEEDED(factor);
    }
}

/* A tile of filters and vectors of pixels, constants where this is inlined. The lines that are stored to next are asked for: where there are
 * few taps, waiting for them takes longest. In common tiles a filter's lines are asked for in each step, of some taps, for what counts taps
 * takes its time from the products. */
enum { FC(step) = 3 };
static inline __attribute__((always_inline)) void FC(planar_tile)(const fc_planes *p, const T *weight, const int filters,
                                                                  const T *const *cells, const int vectors, const T *bias,
                                                                  const FC(target) *to)
{
    V acc[FC(most)][FC(widest)];
    const ptrdiff_t *taps = p->taps, n = p->n_taps;
    const T *lines = to->out[0] + vectors * LANES, *const end = lines + filters * p->out_filter;
    ptrdiff_t t = 0;
    UNROLL for (int r = 0; r < filters; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            acc[r][v] = (V){0}; /* these only: an initializer would clear all of it, in memory */
    for (; filters % (FC(filters) / 2) == 0 && t + FC(step) <= n; t += FC(step), weight += FC(step) * filters) {
        if (lines < end) {
            UNROLL for (int v = 0; v < vectors; v++)
                __builtin_prefetch(lines + v * LANES, 1);
            lines += p->out_filter;
        }
        UNROLL for (int i = 0; i < FC(step); i++)
            FC(add_tap)(taps[t + i], weight + i * filters, filters, cells, vectors, acc);
    }
    for (; t < n; t++, weight += filters)
        FC(add_tap)(taps[t], weight, filters, cells, vectors, acc);
    FC(finish_tile)(p, acc, filters, filters, vectors, bias, 1, to, p->out_filter);
}

/* How many of the vectors that are left the next tile has: as many as registers are for, but the last two tiles are of about the same size. */
static inline ptrdiff_t FC(some_vectors)(ptrdiff_t left, ptrdiff_t most)
{
    return left >= 2 * most || left == most ? most : left > most ? (left + 1) / 2 : left;
}

/* Rows of pixels, vector by vector: a tile may end in the next row. */
static inline __attribute__((always_inline)) void FC(planar_tiles)(const fc_planes *p, const T *weight, const int filters,
                                                                   const T *cells, const T *bias, T *out)
{
    const ptrdiff_t most = filters <= FC(filters) / 2 ? 4 : 3;
    const ptrdiff_t across = p->columns, cell_row = p->cell_row, out_row = p->out_row, out_column = p->out_column;
    ptrdiff_t left = p->rows * ((across + LANES - 1) / LANES), x = 0;
    while (left > 0) {
        const ptrdiff_t vectors = FC(some_vectors)(left, most);
        const T *from[FC(widest)];
        FC(target) to;
        left -= vectors;
        to.whole = x + vectors * LANES <= across;
        if (to.whole) {
            UNROLL for (int v = 0; v < FC(widest); v++) {
                from[v] = cells + x + v * LANES;
                to.out[v] = out + (x + v * LANES) * out_column;
                to.n[v] = LANES;
                to.some[v] = FC(between)(0, LANES);
            }
            x += vectors * LANES;
            if (x >= across)
                x = 0, cells += cell_row, out += out_row;
        } else {
            UNROLL for (int v = 0; v < FC(widest); v++) {
                from[v] = cells + x;
                to.out[v] = out + x * out_column;
                to.n[v] = across - x;
                if (v >= vectors)
                    continue;
                x += LANES;
                if (x >= across)
                    x = 0, cells += cell_row, out += out_row;
            }
            FC(find_lanes)(&to, FC(widest));
        }
        if (filters <= FC(filters) / 2 && vectors == 4)
            FC(planar_tile)(p, weight, filters, from, 4, bias, &to);
        else if (vectors == 3)
            FC(planar_tile)(p, weight, filters, from, 3, bias, &to);
        else if (vectors == 2)
            FC(planar_tile)(p, weight, filters, from, 2, bias, &to);
        else
            FC(planar_tile)(p, weight, filters, from, 1, bias, &to);
    }
}

#define FILTERS_CASE(n)                                                   \
    case n:                                                               \
        if (n <= FC(filters))                                             \
            FC(planar_tiles)(p, w, n <= FC(filters) ? n : 1, a, bias, c); \
        break;

static void FC(planar)(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out)
{
    const fc_planes own = *planes, *const p = &own; /* which no store changes */
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

/* ---------------------------------------------------------------------------------------- gradient of the weights */

#if VECTOR_BYTES == 64
enum { FC(grads) = 6, FC(cells) = 4 }; /* filters x taps: 24 sums, 6 vectors of gradients and one of cells are in 32 registers */
#else
enum { FC(grads) = 3, FC(cells) = 4 };
#endif
enum { FC(cells_of_one) = 9 }; /* taps of a single filter */

/* Products of one vector of pixels, or of some of its lanes. filters, taps and all are constants where this is inlined. */
static inline __attribute__((always_inline)) void FC(add_products)(const int filters, const int taps, const T *grad, ptrdiff_t step,
                                                                   const T *const *cells, ptrdiff_t x, const int all,
                                                                   FC(lanes) some, const T *later, ptrdiff_t n_later,
                                                                   V acc[][FC(cells_of_one)])
{
    V g[FC(grads)];
    for (; n_later > 0; n_later--, later += step)
        __builtin_prefetch(later + x);
    UNROLL for (int f = 0; f < filters; f++) {
        const T *from = grad + f * step + x;
        g[f] = all ? *(const V *)from : LOAD_LANES(some, from);
        HELD(g[f]);
    }
    UNROLL for (int t = 0; t < taps; t++) {
        const T *from = cells[t] + x;
        V cell = all ? *(const V *)from : LOAD_LANES(some, from);
        HELD(cell);
        UNROLL for (int f = 0; f < filters; f++)
            acc[f][t] += g[f] * cell;
        NEEDED(cell);
    }
    UNROLL for (int f = 0; f < filters; f++)
        NEEDED(g[f]);
}

/* All pixels of some filters and taps, of which the last may not be wanted: these are the last wanted one again. Meanwhile gradients of
 * some `later` filters are fetched. */
static inline __attribute__((always_inline)) void FC(weight_tile)(const fc_planes *p, const int filters, const int taps,
                                                                  ptrdiff_t wanted, const ptrdiff_t *at, const T *grad,
                                                                  const T *image, const T *later, ptrdiff_t n_later, T *sums)
{
    V acc[FC(grads)][FC(cells_of_one)];
    const T *cells[FC(cells_of_one)];
    const ptrdiff_t whole = p->columns / LANES * LANES, row = p->n_taps * LANES, columns = p->columns;
    const FC(lanes) some = FC(between)(0, columns - whole);
    UNROLL for (int t = 0; t < taps; t++) {
        cells[t] = image + at[t < wanted ? t : wanted - 1];
        UNROLL for (int f = 0; f < filters; f++)
            acc[f][t] = *(const V *)(sums + f * row + (t < wanted ? t : wanted - 1) * LANES);
    }
    for (ptrdiff_t r = 0; r < p->rows; r++, grad += p->out_row, later += p->out_row) {
        for (ptrdiff_t x = 0; x < whole; x += LANES)
            FC(add_products)(filters, taps, grad, p->out_filter, cells, x, 1, some, later, n_later, acc);
        if (whole < columns)
            FC(add_products)(filters, taps, grad, p->out_filter, cells, whole, 0, some, later, n_later, acc);
        UNROLL for (int t = 0; t < taps; t++)
            cells[t] += p->cell_row;
    }
    UNROLL for (int t = 0; t < taps; t++)
        if (t < wanted)
            UNROLL for (int f = 0; f < filters; f++)
                *(V *)(sums + f * row + t * LANES) = acc[f][t];
}

#define GRADS_CASE(n)                                                                                                              \
    case n:                                                                                                                        \
        for (ptrdiff_t t = 0, first = 0; t < p->n_taps && n <= FC(grads); t += FC(cells), first += each) {                         \
            const ptrdiff_t n_later = first + each < n ? each : first < n ? n - first : 0;                                         \
            FC(weight_tile)(p, n <= FC(grads) ? n : 1, FC(cells), p->n_taps - t < FC(cells) ? p->n_taps - t : FC(cells),           \
                            p->taps + t, g, a, later + first * p->out_filter, n_later, c + t * LANES);                             \
        }                                                                                                                          \
        break;

static void FC(planar_weight)(const fc_planes *planes, ptrdiff_t filters, const void *grad, const void *cells, void *sums)
{
    const fc_planes own = *planes, *p = &own; /* which no store changes */
    const T *g = grad, *a = cells;
    T *c = sums;
    if (filters == 1 && p->n_taps > FC(cells)) {
        for (ptrdiff_t t = 0; t < p->n_taps; t += FC(cells_of_one))
            FC(weight_tile)(p, 1, FC(cells_of_one), p->n_taps - t < FC(cells_of_one) ? p->n_taps - t : FC(cells_of_one),
                            p->taps + t, g, a, g, 0, c + t * LANES);
        return;
    }
    const ptrdiff_t tiles = (filters + FC(grads) - 1) / FC(grads); /* of about the same size */
    const ptrdiff_t steps = (p->n_taps + FC(cells) - 1) / FC(cells), each = p->ahead ? (FC(grads) + steps - 1) / steps : 0;
    for (ptrdiff_t tile = 1, done = 0, n; tile <= tiles; tile++, done += n) {
        n = filters * tile / tiles - done;
        const T *later = tile < tiles ? g + n * p->out_filter : (const T *)grad + p->ahead;
        switch (n) {
            GRADS_CASE(1)
            GRADS_CASE(2)
            GRADS_CASE(3)
            GRADS_CASE(4)
            GRADS_CASE(5)
            GRADS_CASE(6)
        }
        g += n * p->out_filter;
        c += n * p->n_taps * LANES;
    }
}
#undef GRADS_CASE

/* As many vectors as there are lanes are turned, and added up. */
static void FC(sum_lanes)(const void *vectors, ptrdiff_t n, void *sums)
{
    const T *in = vectors;
    T *out = sums;
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        V lanes[LANES] = {{0}};
        FC(transpose)(in + i * LANES, LANES, 1, n - i < LANES ? n - i : LANES, LANES, lanes, LANES);
        UNROLL for (int half = LANES / 2; half > 0; half /= 2)
            UNROLL for (int lane = 0; lane < half; lane++)
                lanes[lane] += lanes[lane + half];
        memcpy(out + i, lanes, (size_t)(n - i < LANES ? n - i : LANES) * sizeof(T));
    }
}

/* ----------------------------------------------------------------------------------------------------- one filter */

enum { FC(rows) = 7 }; /* of pixels, whose sums are in registers beside a column of 7 weights, ... */
#if VECTOR_BYTES == 64
enum { FC(across) = 2 }; /* ... and so many vectors of each, or of twice as many rows one vector */
#else
enum { FC(across) = 1 };
#endif

/* Some vectors of each of some rows of pixels, of which some are wanted. A cell is loaded once for all `high` taps of a column: rows of
 * pixels are `every` rows of taps apart. These are constants where this is inlined. */
static inline __attribute__((always_inline)) void FC(columns)(const fc_planes *p, const T *weight, const int high, const int every,
                                                              const T *cells, const int rows, const int vectors, ptrdiff_t wanted,
                                                              ptrdiff_t n, T *out)
{
    V acc[FC(most)][FC(widest)];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            acc[r][v] = (V){0}; /* these only: an initializer would clear all of it, in memory */
    for (ptrdiff_t t = 0; t < p->n_taps; t++) {
        const T *cell = cells + p->taps[t], *factor = weight + p->weight_taps[t];
        V w[7];
        UNROLL for (int h = 0; h < high; h++, factor += p->weight_row) {
            w[h] = *factor - (V){0};
            HELD(w[h]);
        }
        UNROLL_MORE for (int j = 0; j < (rows - 1) * every + high; j++, cell += p->tap_row)
            UNROLL for (int v = 0; v < vectors; v++) {
                V x = *(const V *)(cell + v * LANES);
                HELD(x);
                UNROLL for (int h = 0; h < high; h++)
                    if (j >= h && (j - h) % every == 0 && (j - h) / every < rows)
                        acc[(j - h) / every][v] += x * w[h];
            }
    }
    const FC(target) to = FC(neighbours)(out, p->out_column, n, vectors);
    FC(finish_tile)(p, acc, rows, wanted, vectors, p->bias, 0, &to, p->out_row);
}

/* The same for columns of any height, and rows of pixels any distance apart. */
static void FC(columns_any)(const fc_planes *p, const T *weight, const T *cells, ptrdiff_t wanted, ptrdiff_t n, T *out)
{
    V acc[FC(most)][FC(widest)];
    UNROLL for (int r = 0; r < FC(rows); r++)
        UNROLL for (int v = 0; v < 1; v++)
            acc[r][v] = (V){0}; /* these only: an initializer would clear all of it, in memory */
    for (ptrdiff_t t = 0; t < p->n_taps; t++)
        for (ptrdiff_t h = 0; h < p->high; h++) {
            const T *cell = cells + p->taps[t] + h * p->tap_row;
            const T factor = weight[p->weight_taps[t] + h * p->weight_row];
            UNROLL for (int r = 0; r < FC(rows); r++)
                acc[r][0] += *(const V *)(cell + r * p->cell_row) * factor;
        }
    const FC(target) to = FC(neighbours)(out, p->out_column, n, 1);
    FC(finish_tile)(p, acc, FC(rows), wanted, 1, p->bias, 0, &to, p->out_row);
}

static inline __attribute__((always_inline)) void FC(column_rows)(const fc_planes *p, const T *weight, const int high,
                                                                  const int every, const T *cells, ptrdiff_t wanted, T *out)
{
    ptrdiff_t x = 0;
    if (FC(across) == 2 && every == 1 && wanted > FC(rows)) { /* a single vector of each */
        FC(columns)(p, weight, high, every, cells, FC(across) * FC(rows), 1, wanted, p->columns, out);
        return;
    }
    for (; FC(across) == 2 && p->columns - x > LANES; x += 2 * LANES)
        FC(columns)(p, weight, high, every, cells + x, FC(rows), 2, wanted, p->columns - x, out + x * p->out_column);
    for (; x < p->columns; x += LANES)
        FC(columns)(p, weight, high, every, cells + x, FC(rows), 1, wanted, p->columns - x, out + x * p->out_column);
}

#define COLUMNS_CASE(n)                                            \
    case n:                                                        \
        if (every == 1)                                            \
            FC(column_rows)(p, weight, n, 1, cells, wanted, out);  \
        else                                                       \
            FC(column_rows)(p, weight, n, 2, cells, wanted, out);  \
        break;

static inline __attribute__((always_inline)) void FC(one_plane)(const fc_planes *p, const T *weight, const T *cells, T *out)
{
    const int every = p->cell_row == p->tap_row ? 1 : p->cell_row == 2 * p->tap_row ? 2 : 0;
    const int known = p->high >= 1 && p->high <= 7; /* columns_any takes FC(rows) at a time */
    const ptrdiff_t most = known && every == 1 && p->columns <= LANES ? FC(across) * FC(rows) : FC(rows);
    for (ptrdiff_t r = 0, rows; r < p->rows; r += rows, cells += rows * p->cell_row, out += rows * p->out_row) {
        rows = p->rows - r > FC(rows) ? most : FC(rows);
        const ptrdiff_t wanted = p->rows - r < rows ? p->rows - r : rows;
        switch (every ? p->high : 0) {
            COLUMNS_CASE(1)
            COLUMNS_CASE(2)
            COLUMNS_CASE(3)
            COLUMNS_CASE(4)
            COLUMNS_CASE(5)
            COLUMNS_CASE(6)
            COLUMNS_CASE(7)
        default:
            for (ptrdiff_t x = 0; x < p->columns; x += LANES)
                FC(columns_any)(p, weight, cells + x, wanted, p->columns - x, out + x * p->out_column);
        }
    }
}

static void FC(planar_one)(const fc_planes *planes, ptrdiff_t groups, const void *weight, const void *cells, void *out)
{
    fc_planes own = *planes, *p = &own; /* which no store changes */
    for (ptrdiff_t i = 0; i < groups; i++) {
        FC(one_plane)(p, (const T *)weight + i * p->weight_group, (const T *)cells + i * p->cell_group, (T *)out + i * p->out_filter);
        p->bias = p->bias ? (const T *)p->bias + 1 : NULL;
    }
}
#undef COLUMNS_CASE

/* ------------------------------------------------------------------------------------------------------ interleaving */

/* Lanes of two vectors in turns: those of the lower halves, or (from `half` on) of the upper ones. */
#define TURNS_4(half) (half), (half) + ZIPPED, (half) + 1, (half) + 1 + ZIPPED
#define TURNS_8(half) TURNS_4(half), TURNS_4((half) + 2)
#define TURNS_16(half) TURNS_8(half), TURNS_8((half) + 4)
#if VECTOR_BYTES / T_BYTES == 16
#define ZIPPED 16
#define TURNS TURNS_16
#elif VECTOR_BYTES / T_BYTES == 8
#define ZIPPED 8
#define TURNS TURNS_8
#elif VECTOR_BYTES / T_BYTES == 4
#define ZIPPED 4
#define TURNS TURNS_4
#endif
/* The first n cells, or all, of a vector of even ones and one of odd ones. Some of less than two vectors: some[] of their lanes. */
static inline __attribute__((always_inline)) void FC(two_in_turns)(V even, V odd, ptrdiff_t n, const FC(lanes) *some, T *out)
{
#ifdef ZIPPED
    const V first = SHUFFLE(even, odd, TURNS(0));
    if (n >= 2 * LANES) {
        *(V *)out = first;
        *(V *)(out + LANES) = SHUFFLE(even, odd, TURNS(ZIPPED / 2));
        return;
    }
    STORE_LANES(out, some[0], first);
    if (n > LANES)
        STORE_LANES(out + LANES, some[1], SHUFFLE(even, odd, TURNS(ZIPPED / 2)));
#else
    (void)some;
    for (ptrdiff_t i = 0; i < 2 * LANES && i < n; i++)
        out[i] = i % 2 ? odd[i / 2] : even[i / 2];
#endif
}

/* A row of n cells of which even ones come from one place and odd ones from another. */
static inline void FC(row_from_two)(const T *even, const T *odd, ptrdiff_t n, const FC(lanes) *some, T *out)
{
    for (; n > 0; n -= 2 * LANES, even += LANES, odd += LANES, out += 2 * LANES)
        FC(two_in_turns)(*(const V *)even, *(const V *)odd, n, some, out);
}

/* A row of n cells, `every`th ones of which come from one place, `phase` from the next. */
static inline void FC(row_from_many)(const T *in, ptrdiff_t every, ptrdiff_t phase, ptrdiff_t n, T *out)
{
    ptrdiff_t done = 0;
#ifdef ZIPPED
    for (; every == 4 && done + 4 * LANES <= n; done += 4 * LANES) {
        V x[4], even[2], odd[2];
        UNROLL for (int i = 0; i < 4; i++)
            x[i] = *(const V *)(in + i * phase + done / 4);
        even[0] = SHUFFLE(x[0], x[2], TURNS(0)), even[1] = SHUFFLE(x[0], x[2], TURNS(ZIPPED / 2));
        odd[0] = SHUFFLE(x[1], x[3], TURNS(0)), odd[1] = SHUFFLE(x[1], x[3], TURNS(ZIPPED / 2));
        UNROLL for (int half = 0; half < 2; half++) {
            *(V *)(out + done + 2 * half * LANES) = SHUFFLE(even[half], odd[half], TURNS(0));
            *(V *)(out + done + (2 * half + 1) * LANES) = SHUFFLE(even[half], odd[half], TURNS(ZIPPED / 2));
        }
    }
#endif
    for (ptrdiff_t p = 0; p < every; p++)
        for (ptrdiff_t i = done / every; i * every + p < n; i++)
            out[i * every + p] = in[p * phase + i];
}

static void FC(zip)(const void *input, ptrdiff_t tiles, ptrdiff_t tile_step, ptrdiff_t rows, ptrdiff_t in_row, ptrdiff_t n,
                    void *output, ptrdiff_t out_row)
{
    const ptrdiff_t left = n % (2 * LANES);
    const FC(lanes) some[2] = {FC(between)(0, left), FC(between)(0, left - LANES)};
    const T *in = input;
    T *out = output;
    for (ptrdiff_t i = 0; i < n && tiles == 2; i += 2 * LANES) /* a strip of two vectors after another */
        for (ptrdiff_t r = 0; r < rows; r++) {
            const T *even = in + r * in_row + i / 2;
            FC(row_from_two)(even, even + tile_step, n - i < 2 * LANES ? n - i : 2 * LANES, some, out + r * out_row + i);
        }
    for (ptrdiff_t r = 0; r < rows && tiles != 2; r++)
        FC(row_from_many)(in + r * in_row, tiles, tile_step, n, out + r * out_row);
}

/* What a row is moved with: which lanes of its last one or two vectors are cells, and NaNs in the others; whether cells are finite. */
typedef struct {
    FC(lanes) some[2];
    V nan[2], sum;
} FC(moved);

/* Rows of a slab to phases. `wide`, the stride along them, is a constant where this is inlined. The first cell is the cell before[2] of
 * row before[1] of the phases. */
static inline __attribute__((always_inline)) void FC(slab_to_phases)(const fc_phases *p, ptrdiff_t rows, ptrdiff_t step, ptrdiff_t n,
                                                                     const T *cells, T *phases, const int wide, FC(moved) *m)
{
    const ptrdiff_t high = p->stride[1], phase = p->phase, pitch = p->pitch[2], column = p->before[2];
    const ptrdiff_t even = column % wide * phase + column / wide, odd = (column + 1) % wide * phase + (column + 1) / wide;
    const FC(moved) moved = *m; /* for the compiler: what is stored doesn't change it */
    V sum = m->sum;
    ptrdiff_t of = p->before[1] % high;
    T *line = phases + p->before[1] / high * pitch, *row = line + of * wide * phase;
    for (ptrdiff_t y = 0; y < rows; y++, cells += step) {
        if (wide == 2)
            FC(row_to_two)(cells, n, moved.some, moved.nan, row + even, row + odd, &sum);
        else
            FC(row_to_phase)(cells, n, moved.some[0], moved.nan[0], row + even, &sum);
        row += wide * phase;
        if (++of == high) {
            of = 0;
            row = line += pitch;
        }
    }
    m->sum = sum;
}

static int FC(to_phases)(const fc_phases *p, const fc_rows *rows, ptrdiff_t n, const void *image, void *out)
{
    const ptrdiff_t wide = p->stride[2], left = n % (wide * LANES), slab_phases = p->stride[1] * wide * p->phase;
    FC(moved) moved = {.some = {FC(between)(0, left), FC(between)(0, left - LANES)}};
    for (ptrdiff_t i = 0; i < 2 * LANES; i++)
        moved.nan[i / LANES][i % LANES] = i < left ? 0 : (T)NAN;
    for (ptrdiff_t plane = 0; plane < rows->size[0]; plane++)
        for (ptrdiff_t z = 0; z < rows->size[1]; z++) {
            const ptrdiff_t slab = p->before[0] + z;
            const T *cells = (const T *)image + plane * rows->step[0] + z * rows->step[1];
            T *to = (T *)out + plane * p->pitch[0];
            if (p->stride[0] > 1 || slab > 0)
                to += slab / p->stride[0] * p->pitch[1] + slab % p->stride[0] * slab_phases;
            if (wide == 2)
                FC(slab_to_phases)(p, rows->size[2], rows->step[2], n, cells, to, 2, &moved);
            else
                FC(slab_to_phases)(p, rows->size[2], rows->step[2], n, cells, to, 1, &moved);
        }
    for (ptrdiff_t i = 1; i < LANES; i++)
        moved.sum[0] += moved.sum[i];
    return moved.sum[0] == 0;
}
