/* Convolution with neighbouring pixels as columns of AMX's tile; amx.c includes this. Two vectors of 16 cells, anywhere in a row of the
 * planes, that two taps of a row see are a row of the tile, for each piece. Rows of planes are laid one after another, and a row of pixels
 * begins `stride` of them below the one above it, so that what was laid serves all rows of taps.
 *
 *    planes                       laid             pixels of a row: 6 | 7
 *    row 0  +--+--+--+--    c,w   | row 0, pair 0  -.                +----+----+
 *    row 1  +--+--+--+--          |        pair 1   |      weights:  | 0  | 1  | 4     Filters are rows of the tile,
 *    row 2  +--+--+--+--          | row 1, pair 0   |-. =>           +----+----+       [filter][step of 16 pairs][piece][32], and
 *                                 |        pair 1   | |              | 2  | 3  | 5     sums are what the output has.
 *                                 | row 2, pair 0  -' |              +----+----+
 *                                 |        ...       -'
 *
 * Between the products of a row of pixels, what the next sees is laid, and sums of the last are stored: vector instructions beside the tile's
 * take little time of their own.
 */

enum { PIXELS = 2 * LANES, PAIRS = CHANNELS / 2, BLOCK = 2 * ROWS };

/* What is done between products: pairs are laid, and sums stored. */
typedef struct {
    const fc_planes *planes;
    const float *cells;         /* of the first pixel of a strip */
    char *laid;                 /* [vector][piece][row of planes][pair], so far apart, ... */
    ptrdiff_t plane;
    int vectors;
    ptrdiff_t row, pair, left;  /* ... the next pair, and how many more */
    ptrdiff_t quota;            /* between some products and the next ones */
    words largest;
    ptrdiff_t rows, n;          /* filters whose sums are to be stored, and pixels of each */
    const float *sums, *bias;
    float *out;
} planar_jobs;

INLINE ptrdiff_t row_pairs(const fc_planes *p) { return (p->n_taps + 1) / 2; }

INLINE ptrdiff_t planar_steps(const fc_planes *p) { return (row_pairs(p) * p->high + PAIRS - 1) / PAIRS; }

/* Lay some pairs. The last tap of a row may have no other. */
INLINE void lay_pairs(planar_jobs *jobs, ptrdiff_t most, const int pieces)
{
    const ptrdiff_t *const taps = jobs->planes->taps, n_taps = jobs->planes->n_taps, pairs = row_pairs(jobs->planes);
    const ptrdiff_t row_step = jobs->planes->tap_row, plane = jobs->plane, n = jobs->left < most ? jobs->left : most;
    ptrdiff_t pair = jobs->pair, row = jobs->row;
    const float *cells = jobs->cells + row * row_step;
    char *out = jobs->laid + (row * pairs + pair) * ROW_BYTES;
    const int vectors = jobs->vectors;
    words largest = jobs->largest;
    for (ptrdiff_t i = 0; i < n; i++, out += ROW_BYTES) {
        const float *even = cells + taps[2 * pair], *odd = cells + taps[2 * pair + (2 * pair + 1 < n_taps)];
        char *line = out;
        for (int v = 0; v < vectors; v++, line += pieces * plane) {
            words low[MAX_PIECES], high[MAX_PIECES];
            split(*(const floats *)(even + v * LANES), pieces, low, &largest);
            split(*(const floats *)(odd + v * LANES), pieces, high, &largest);
            UNROLL for (int q = 0; q < pieces; q++)
                *(words *)(line + q * plane) = pair_upper_halves(low[q], high[q]);
        }
        if (++pair == pairs) {
            pair = 0;
            row++;
            cells += row_step;
        }
    }
    jobs->pair = pair;
    jobs->row = row;
    jobs->left -= n;
    jobs->largest = largest;
}

INLINE void store(float *out, ptrdiff_t n, floats x)
{
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(out, n < LANES ? (1u << n) - 1 : 0xffff, (__m512)x);
#else
    memcpy(out, &x, (size_t)(n < LANES ? n : LANES) * sizeof(float));
#endif
}

/* The sums of n pixels for some filters to rows of the output. The next row's lines are fetched before they are stored to: stores that
 * wait for one make the tile's loads of what is laid wait, too. */
INLINE void store_some(const fc_planes *p, const float *sums, const float *bias, ptrdiff_t rows, ptrdiff_t n, float *out)
{
    const floats least = (p->relu ? 0 : -__builtin_inff()) - (floats){0};
    for (ptrdiff_t f = 0; f < rows; f++, sums += PIXELS, out += p->out_filter)
        for (ptrdiff_t i = 0; i < n; i += LANES) {
            floats x = *(const floats *)(sums + i);
            __builtin_prefetch(out + i + p->out_row, 1);
            if (bias)
                x += bias[f];
            store(out + i, n - i, (floats)((words)x & ~(words)(x < least))); /* a NaN stays one */
        }
}

INLINE void store_rows(planar_jobs *jobs, ptrdiff_t most)
{
    const fc_planes *p = jobs->planes;
    const ptrdiff_t rows = jobs->rows < most ? jobs->rows : most, n = jobs->n;
    if (n == PIXELS) /* a constant */
        store_some(p, jobs->sums, p->bias ? jobs->bias : NULL, rows, PIXELS, jobs->out);
    else
        store_some(p, jobs->sums, p->bias ? jobs->bias : NULL, rows, n, jobs->out);
    jobs->sums += rows * PIXELS;
    jobs->out += rows * p->out_filter;
    jobs->bias += p->bias ? rows : 0;
    jobs->rows -= rows;
}

/* 16 or (high) 32 filters, `spacing` apart, by 16 or (wide) 32 pixels; constants where this is inlined. */
INLINE void planar_tile(const char *weights, ptrdiff_t spacing, const char *laid, ptrdiff_t steps, const int high, const int wide,
                        const int pieces, float *c, planar_jobs *jobs)
{
    char scratch[TILE_BYTES] __attribute__((aligned(64)));
    const ptrdiff_t c_bytes = PIXELS * sizeof(float), plane = jobs->plane;
    const int products = PRODUCTS[pieces].n;
    float *const lower = c + ROWS * PIXELS;
    int unstored = 0;
    FOR_SUMS(ZERO);
    for (ptrdiff_t step = 0; step < steps; step++, weights += pieces * ROW_BYTES, laid += TILE_BYTES) {
#define LOAD_ROWS(reg, n, p) _tile_loadd(reg, weights + (n) * ROWS * spacing + (p) * ROW_BYTES, spacing)
#define LOAD_COLUMNS(reg, n, q) _tile_loadd(reg, laid + ((n) * pieces + (q)) * plane, ROW_BYTES)
        MULTIPLY_PIECES(LOAD_ROWS, LOAD_COLUMNS, {
            store_rows(jobs, (BLOCK + products - 1) / products);
            lay_pairs(jobs, jobs->quota, pieces);
        });
#undef LOAD_ROWS
#undef LOAD_COLUMNS
        KEEP_STORING(4, scratch);
    }
    FOR_SUMS(_tile_stored);
    STORES_DONE;
}

/* A row of pixels of a strip, for all filters. */
INLINE void planar_row(const char *weights, ptrdiff_t filters, ptrdiff_t row, ptrdiff_t n, const int pieces, float *sums,
                       planar_jobs *jobs, float *out)
{
    const fc_planes *p = jobs->planes;
    const ptrdiff_t steps = planar_steps(p), spacing = steps * pieces * ROW_BYTES, stages = steps * PRODUCTS[pieces].n;
    const char *laid = jobs->laid + row * (p->cell_row / p->tap_row) * row_pairs(p) * ROW_BYTES;
    jobs->quota = (jobs->left + stages - 1) / stages;
    for (ptrdiff_t f = 0; f < filters; f += BLOCK, sums += BLOCK * PIXELS, weights += BLOCK * spacing) {
        if (filters - f > ROWS && jobs->vectors == 2)
            planar_tile(weights, spacing, laid, steps, 1, 1, pieces, sums, jobs);
        else if (filters - f > ROWS)
            planar_tile(weights, spacing, laid, steps, 1, 0, pieces, sums, jobs);
        else if (jobs->vectors == 2)
            planar_tile(weights, spacing, laid, steps, 0, 1, pieces, sums, jobs);
        else
            planar_tile(weights, spacing, laid, steps, 0, 0, pieces, sums, jobs);
        jobs->rows = filters - f < BLOCK ? filters - f : BLOCK;
        jobs->n = n;
        jobs->sums = sums;
        jobs->bias = (const float *)p->bias + (p->bias ? f : 0);
        jobs->out = out + f * p->out_filter;
    }
}

INLINE int planar(const fc_planes *p, const char *weights, ptrdiff_t filters, const float *cells, const int pieces, float *out)
{
    const ptrdiff_t step = p->cell_row / p->tap_row * row_pairs(p), seen = planar_steps(p) * PAIRS; /* by a row of pixels */
    const ptrdiff_t all = (p->rows - 1) * step + p->high * row_pairs(p);
    planar_jobs jobs = {.planes = p, .laid = p->laid, .plane = (all + PAIRS) * ROW_BYTES};
    float *const sums = (float *)(jobs.laid + 2 * pieces * jobs.plane);
    for (int i = 0; i < 2 * pieces; i++) /* what weights of zero meet had better be numbers, too */
        memset(jobs.laid + i * jobs.plane + all * ROW_BYTES, 0, PAIRS * ROW_BYTES);
    for (ptrdiff_t x = 0; x < p->columns; x += PIXELS) {
        const ptrdiff_t n = p->columns - x < PIXELS ? p->columns - x : PIXELS;
        jobs.cells = cells + x;
        jobs.vectors = n > LANES ? 2 : 1;
        jobs.row = jobs.pair = 0;
        ptrdiff_t end = seen < all ? seen : all;
        jobs.left = end;
        lay_pairs(&jobs, jobs.left, pieces);
        for (ptrdiff_t r = 0; r < p->rows; r++) {
            const ptrdiff_t next = (r + 1) * step + seen;
            jobs.left = (next < all ? next : all) - end;
            end += jobs.left;
            planar_row(weights, filters, r, n, pieces, sums, &jobs, out + r * p->out_row + x);
        }
    }
    store_rows(&jobs, jobs.rows);
    return size(jobs.largest);
}

static int fc_f32_planar_split_x1__amx(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out)
{
    return planar(planes, weight, filters, cells, 1, out);
}

static int fc_f32_planar_split_x3__amx(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out)
{
    return planar(planes, weight, filters, cells, 2, out);
}

static int fc_f32_planar_split_x6__amx(const fc_planes *planes, const void *weight, ptrdiff_t filters, const void *cells, void *out)
{
    return planar(planes, weight, filters, cells, 3, out);
}
