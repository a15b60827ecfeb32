/* The transforms of Winograd's convolution, for LANES channels (or filters) at once.
 *
 *     outputs = At [ (G taps Gt) * (Bt inputs B) ] A          (Lavin and Gray, arXiv 1509.09308)
 *
 * Along each axis the taps and the inputs are polynomials, which are multiplied by their values at some points:
 *
 *     m outputs     taps   inputs   points
 *         1           1       1     none of it: the axis is left alone
 *         2           3       4     0, 1, -1, infinity
 *         4           3       6     0, NEAR, -NEAR, FAR, -FAR, infinity
 *
 * The gradient of the taps is Gt [ (A gradients At) * (Bt inputs B) ] G.
 *
 * No other sixteenths than NEAR and FAR have smaller errors, by more than noise (docs/performance.md); their squares, and the
 * product of these, are exact.
 */
#define POINTS(m) ((m) == 1 ? 1 : (m) + 2)
#define TAPS(m) ((m) == 1 ? 1 : 3)
#define CELLS(kind, m) ((kind) == FC_INPUTS ? POINTS(m) : (kind) == FC_TAPS ? TAPS(m) : (m))
#define MOST_POINTS 6

#define NEAR ((T)0.625)
#define FAR ((T)1.5)
#define NEAR2 (NEAR * NEAR)
#define FAR2 (FAR * FAR)
#define AT_ZERO (1 / (NEAR2 * FAR2)) /* 1 over the product of the distances to the other points */
#define AT_NEAR (1 / (2 * NEAR2 * (NEAR2 - FAR2)))
#define AT_FAR (1 / (2 * FAR2 * (FAR2 - NEAR2)))

#define INLINE static inline __attribute__((always_inline)) /* kind, m and n are constants there, small arrays registers */

/* ------------------------------------------------------------------------------------------------------- one axis */

INLINE void FC(transform_inputs)(const int m, const V *d, V *points) /* Bt d */
{
    if (m == 1) {
        points[0] = d[0];
    } else if (m == 2) {
        points[0] = d[0] - d[2];
        points[1] = d[1] + d[2];
        points[2] = d[2] - d[1];
        points[3] = d[1] - d[3];
    } else {
        const V even_near = d[4] - d[2] * FAR2, odd_near = d[3] - d[1] * FAR2;
        const V even_far = d[4] - d[2] * NEAR2, odd_far = d[3] - d[1] * NEAR2;
        points[0] = d[4] - d[2] * (NEAR2 + FAR2) + d[0] * (NEAR2 * FAR2);
        points[1] = even_near + odd_near * NEAR;
        points[2] = even_near - odd_near * NEAR;
        points[3] = even_far + odd_far * FAR;
        points[4] = even_far - odd_far * FAR;
        points[5] = d[5] - d[3] * (NEAR2 + FAR2) + d[1] * (NEAR2 * FAR2);
    }
}

INLINE void FC(transform_taps)(const int m, const V *g, V *points) /* G g */
{
    if (m == 1) {
        points[0] = g[0];
    } else if (m == 2) {
        const V even = (g[0] + g[2]) * (T)0.5, odd = g[1] * (T)0.5;
        points[0] = g[0];
        points[1] = even + odd;
        points[2] = even - odd;
        points[3] = g[2];
    } else {
        const V even_near = (g[0] + g[2] * NEAR2) * AT_NEAR, odd_near = g[1] * (NEAR * AT_NEAR);
        const V even_far = (g[0] + g[2] * FAR2) * AT_FAR, odd_far = g[1] * (FAR * AT_FAR);
        points[0] = g[0] * AT_ZERO;
        points[1] = even_near + odd_near;
        points[2] = even_near - odd_near;
        points[3] = even_far + odd_far;
        points[4] = even_far - odd_far;
        points[5] = g[2];
    }
}

INLINE void FC(transform_gradients)(const int m, const V *g, V *points) /* A g */
{
    if (m == 1) {
        points[0] = g[0];
    } else if (m == 2) {
        points[0] = g[0];
        points[1] = g[0] + g[1];
        points[2] = g[0] - g[1];
        points[3] = -g[1];
    } else {
        const V even_near = g[0] + g[2] * NEAR2, odd_near = (g[1] + g[3] * NEAR2) * NEAR;
        const V even_far = g[0] + g[2] * FAR2, odd_far = (g[1] + g[3] * FAR2) * FAR;
        points[0] = g[0];
        points[1] = even_near + odd_near;
        points[2] = even_near - odd_near;
        points[3] = even_far + odd_far;
        points[4] = even_far - odd_far;
        points[5] = g[3];
    }
}

INLINE void FC(gather_outputs)(const int m, const V *points, V *y) /* At m */
{
    if (m == 1) {
        y[0] = points[0];
    } else if (m == 2) {
        y[0] = points[0] + points[1] + points[2];
        y[1] = points[1] - points[2] - points[3];
    } else {
        const V even_near = points[1] + points[2], odd_near = (points[1] - points[2]) * NEAR;
        const V even_far = points[3] + points[4], odd_far = (points[3] - points[4]) * FAR;
        y[0] = even_near + even_far + points[0];
        y[1] = odd_near + odd_far;
        y[2] = even_near * NEAR2 + even_far * FAR2;
        y[3] = odd_near * NEAR2 + odd_far * FAR2 + points[5];
    }
}

INLINE void FC(gather_taps)(const int m, const V *points, V *g) /* Gt m */
{
    if (m == 1) {
        g[0] = points[0];
    } else if (m == 2) {
        const V even = (points[1] + points[2]) * (T)0.5;
        g[0] = points[0] + even;
        g[1] = (points[1] - points[2]) * (T)0.5;
        g[2] = even + points[3];
    } else {
        const V even_near = (points[1] + points[2]) * AT_NEAR, odd_near = (points[1] - points[2]) * (NEAR * AT_NEAR);
        const V even_far = (points[3] + points[4]) * AT_FAR, odd_far = (points[3] - points[4]) * (FAR * AT_FAR);
        g[0] = even_near + even_far + points[0] * AT_ZERO;
        g[1] = odd_near + odd_far;
        g[2] = even_near * NEAR2 + even_far * FAR2 + points[5];
    }
}

INLINE void FC(transform_axis)(const int kind, const int m, const V *cells, V *points)
{
    if (kind == FC_INPUTS)
        FC(transform_inputs)(m, cells, points);
    else if (kind == FC_TAPS)
        FC(transform_taps)(m, cells, points);
    else
        FC(transform_gradients)(m, cells, points);
}

INLINE void FC(gather_axis)(const int kind, const int m, const V *points, V *cells)
{
    if (kind == FC_TAPS)
        FC(gather_taps)(m, points, cells);
    else
        FC(gather_outputs)(m, points, cells);
}

/* ------------------------------------------------------------------------------------------------- tiles of m x n */

INLINE void FC(to_points)(const int kind, const int m, const int n, const fc_tiles *tiles, const T *in, ptrdiff_t block,
                          T *out, ptrdiff_t point_stride)
{
    const ptrdiff_t row_step = tiles->row_step, cell_step = tiles->cell_step;
    for (ptrdiff_t p = 0; p < tiles->count; p++)
        for (ptrdiff_t i = 0; i < block; i += LANES) {
            const T *cells = in + tiles->at[p] + i;
            T *points = out + p * block + i;
            V half[MOST_POINTS][MOST_POINTS], from[MOST_POINTS], to[MOST_POINTS];
            for (int c = 0; c < CELLS(kind, n); c++) { /* columns to points */
                for (int r = 0; r < CELLS(kind, m); r++)
                    from[r] = kind != FC_TAPS || (r < tiles->high && c < tiles->wide)
                                  ? *(const V *)(cells + r * row_step + c * cell_step)
                                  : (V){0};
                FC(transform_axis)(kind, m, from, to);
                for (int r = 0; r < POINTS(m); r++)
                    half[r][c] = to[r];
            }
            for (int r = 0; r < POINTS(m); r++) { /* rows to points */
                FC(transform_axis)(kind, n, half[r], to);
                for (int c = 0; c < POINTS(n); c++)
                    *(V *)(points + (r * POINTS(n) + c) * point_stride) = to[c];
            }
        }
}

INLINE void FC(from_points)(const int kind, const int m, const int n, const fc_tiles *tiles, const T *in,
                            ptrdiff_t point_stride, ptrdiff_t block, T *out)
{
    const ptrdiff_t row_step = tiles->row_step, cell_step = tiles->cell_step;
    for (ptrdiff_t p = 0; p < tiles->count; p++)
        for (ptrdiff_t i = 0; i < block; i += LANES) {
            const T *points = in + p * block + i;
            T *cells = out + tiles->at[p] + i;
            V half[MOST_POINTS][MOST_POINTS], from[MOST_POINTS], to[MOST_POINTS];
            for (int c = 0; c < POINTS(n); c++) { /* columns of points */
                for (int r = 0; r < POINTS(m); r++)
                    from[r] = *(const V *)(points + (r * POINTS(n) + c) * point_stride);
                FC(gather_axis)(kind, m, from, to);
                for (int r = 0; r < CELLS(kind, m); r++)
                    half[r][c] = to[r];
            }
            for (int r = 0; r < CELLS(kind, m); r++) { /* rows of points */
                FC(gather_axis)(kind, n, half[r], to);
                for (int c = 0; c < CELLS(kind, n); c++)
                    *(V *)(cells + r * row_step + c * cell_step) = to[c];
            }
        }
}

#define TILE_CASE(call, m, n)                     \
    if (tiles->rows == m && tiles->columns == n) { \
        call(m, n);                               \
        return;                                   \
    }
#define TILE_CASES(call) \
    TILE_CASE(call, 1, 2) TILE_CASE(call, 1, 4) TILE_CASE(call, 2, 2) TILE_CASE(call, 2, 4) TILE_CASE(call, 4, 4)
#define INPUTS(m, n) FC(to_points)(FC_INPUTS, m, n, tiles, in, block, out, point_stride)
#define TAPS_OF(m, n) FC(to_points)(FC_TAPS, m, n, tiles, in, block, out, point_stride)
#define GRADIENTS(m, n) FC(to_points)(FC_OUTPUTS, m, n, tiles, in, block, out, point_stride)
#define OUTPUTS(m, n) FC(from_points)(FC_OUTPUTS, m, n, tiles, in, point_stride, block, out)
#define TAPS_FROM(m, n) FC(from_points)(FC_TAPS, m, n, tiles, in, point_stride, block, out)

static void FC(winograd_transform)(int kind, const fc_tiles *tiles, const void *in, ptrdiff_t block, void *out,
                                   ptrdiff_t point_stride)
{
    if (kind == FC_INPUTS) {
        TILE_CASES(INPUTS)
    } else if (kind == FC_TAPS) {
        TILE_CASES(TAPS_OF)
    } else {
        TILE_CASES(GRADIENTS)
    }
}

static void FC(winograd_gather)(int kind, const fc_tiles *tiles, const void *in, ptrdiff_t point_stride, ptrdiff_t block,
                                void *out)
{
    if (kind == FC_TAPS) {
        TILE_CASES(TAPS_FROM)
    } else {
        TILE_CASES(OUTPUTS)
    }
}

#undef POINTS
#undef TAPS
#undef CELLS
#undef MOST_POINTS
#undef NEAR
#undef FAR
#undef NEAR2
#undef FAR2
#undef AT_ZERO
#undef AT_NEAR
#undef AT_FAR
#undef INLINE
#undef TILE_CASE
#undef TILE_CASES
#undef INPUTS
#undef TAPS_OF
#undef GRADIENTS
#undef OUTPUTS
#undef TAPS_FROM
