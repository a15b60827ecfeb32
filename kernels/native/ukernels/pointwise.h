/* 1x1 convolution with neighbouring pixels as lanes; family.h includes this. Cells are read as they lie in the image, none but those that
 * are wanted, or where the first filters have laid them for the others.
 */

/* A tile of filters, of which some are wanted, and vectors of pixels. Filters, vectors, `whole` (whether all lanes are pixels) and `fetch`
 * (how many vectors of later cells are asked for with each channel) are constants where this is inlined. Cells are laid where `laid` is not
 * NULL. The lines that are stored to next are asked for first: where there are few channels, waiting for them takes longest. */
static inline __attribute__((always_inline)) void FC(point_tile)(const fc_planes *p, const T *weight, const int filters,
                                                                 ptrdiff_t wanted, const T *cells, ptrdiff_t step, const int vectors,
                                                                 const int whole, const int fetch, const T *later, T *laid,
                                                                 const T *bias, const FC(target) *to)
{
    V acc[FC(most)][FC(widest)];
    const T *const lines = to->out[0] + vectors * LANES;
    UNROLL for (int f = 0; f < filters; f++)
        UNROLL for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(lines + f * p->out_filter + v * LANES, 1);
            acc[f][v] = (V){0}; /* these only: an initializer would clear all of it, in memory */
        }
    for (ptrdiff_t t = p->n_taps; t > 0; t--, cells += step, later += p->tap_row, weight += filters) {
        V cell[FC(widest)];
        UNROLL for (int v = 0; v < vectors; v++) {
            cell[v] = whole ? *(const V *)(cells + v * LANES) : LOAD_LANES(to->some[v], cells + v * LANES);
            HELD(cell[v]);
            if (v < fetch)
                __builtin_prefetch(later + v * LANES);
        }
        if (laid) {
            UNROLL for (int v = 0; v < vectors; v++)
                *(V *)(laid + v * LANES) = cell[v];
            laid += p->laid_row;
        }
        UNROLL for (int f = 0; f < filters; f++) {
            const V factor = weight[f] - (V){0};
            UNROLL for (int v = 0; v < vectors; v++)
                acc[f][v] += factor * cell[v];
            NEEDED(factor);
        }
    }
    FC(finish_tile)(p, acc, filters, wanted, vectors, bias, 1, to, p->out_filter);
}

/* One tile where not all lanes are pixels, or fewer vectors than registers are for. */
static inline __attribute__((always_inline)) void FC(point_edge)(const fc_planes *p, const T *weight, const int filters,
                                                                 ptrdiff_t wanted, const T *cells, ptrdiff_t step, ptrdiff_t x,
                                                                 ptrdiff_t vectors, T *laid, const T *bias, T *out)
{
    FC(target) to = FC(neighbours)(out + x, 1, p->columns - x, FC(widest));
    if (x < p->before) {
        to.some[0] = FC(between)(p->before, to.n[0]);
        to.n[0] = to.n[0] < LANES ? to.n[0] : LANES - 1;
    }
    to.whole = 0;
    if (vectors == 4 && filters <= FC(filters) / 2)
        FC(point_tile)(p, weight, filters, wanted, cells + x, step, 4, 0, 0, NULL, laid, bias, &to);
    else if (vectors == 3)
        FC(point_tile)(p, weight, filters, wanted, cells + x, step, 3, 0, 0, NULL, laid, bias, &to);
    else if (vectors == 2)
        FC(point_tile)(p, weight, filters, wanted, cells + x, step, 2, 0, 0, NULL, laid, bias, &to);
    else
        FC(point_tile)(p, weight, filters, wanted, cells + x, step, 1, 0, 0, NULL, laid, bias, &to);
}

/* All pixels of a tile of filters. The first vector is aligned, but its first lanes may not be wanted. */
static inline __attribute__((always_inline)) void FC(point_tiles)(const fc_planes *p, const T *weight, const int filters,
                                                                  ptrdiff_t wanted, const T *cells, ptrdiff_t step, const int fetch,
                                                                  const T *later, const int lay, const T *bias, T *out)
{
    const int most = filters <= FC(filters) / 2 ? 4 : 3;
    for (ptrdiff_t x = 0, vectors; x < p->columns; x += vectors * LANES) {
        T *const laid = lay ? (T *)p->laid + x : NULL;
        vectors = FC(some_vectors)((p->columns - x + LANES - 1) / LANES, most);
        if (vectors == most && x >= p->before && x + vectors * LANES <= p->columns) {
            FC(target) to = FC(neighbours)(out + x, 1, most * LANES, most);
            to.whole = 1;
            FC(point_tile)(p, weight, filters, wanted, cells + x, step, most, 1, fetch, later + x, laid, bias, &to);
        } else
            FC(point_edge)(p, weight, filters, wanted, cells, step, x, vectors, laid, bias, out);
    }
}

static void FC(pointwise)(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out)
{
    const fc_planes own = *planes, *const p = &own; /* which no store changes */
    const T *w = weight, *bias = p->bias, *seen = cells;
    const T *const later = seen + p->ahead;
    ptrdiff_t step = p->tap_row, n = FC(filters);
    T *c = out;
    for (ptrdiff_t first = 0; first < filters; first += n, w += n * p->n_taps, c += n * p->out_filter, bias = bias ? bias + n : bias) {
        const ptrdiff_t tile = first / n, wanted = filters - first < n ? filters - first : n;
        if (p->laid && first == 0) {
            FC(point_tiles)(p, w, FC(filters), wanted, seen, step, 1, later, 1, bias, c);
            seen = p->laid;
            step = p->laid_row;
        } else if (wanted <= n / 2)
            FC(point_tiles)(p, w, FC(filters) / 2, wanted, seen, step, 0, later, 0, bias, c);
        else if (tile == 0 && filters <= 2 * n)
            FC(point_tiles)(p, w, FC(filters), wanted, seen, step, 3, later, 0, bias, c);
        else if (tile < 3 && filters > 2 * n)
            FC(point_tiles)(p, w, FC(filters), wanted, seen, step, 1, later + tile * LANES, 0, bias, c);
        else
            FC(point_tiles)(p, w, FC(filters), wanted, seen, step, 0, later, 0, bias, c);
    }
}
