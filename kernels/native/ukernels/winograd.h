/* The transforms of Winograd's convolution, for LANES channels (or filters) at once.
 *
 *     outputs = At [ (G taps Gt) * (Bt inputs B) ] A          (Lavin and Gray, arXiv 1509.09308)
 *
 * Along each axis the taps and the inputs are polynomials, which are multiplied by their values at some points:
 *
 *     outputs, taps       inputs   points
 *     F(1, 1)               1      none of it: the axis is left alone
 *     F(2, 3), F(3, 2)      4      0, 1, -1, infinity
 *     F(4, 3), F(3, 4)      6      0, NEAR, -NEAR, FAR, -FAR, infinity
 *     F(3, 3), stride 2     7      even taps see even inputs: F(3, 2); the odd tap sees odd ones: 3 products
 *     F(3, 4), stride 2     8      even and odd taps: F(3, 2) twice
 *
 * The gradient of the taps is Gt [ (A gradients At) * (Bt inputs B) ] G.
 *
 * No other sixteenths than NEAR and FAR have smaller errors, by more than noise (docs/performance.md); their squares, and the
 * product of these, are exact.
 */
#define STRIDE(side) ((side) / 100)
#define OUTPUTS(side) ((side) / 10 % 10)
#define TAPS(side) ((side) % 10)
#define POINTS(side) ((OUTPUTS(side) - 1) * STRIDE(side) + TAPS(side)) /* and inputs */
#define PHASE_TAPS(side, phase) ((TAPS(side) + 1 - (phase)) / 2) /* with stride 2: of even taps, and of odd ones */
#define TAP_POINTS(side) (STRIDE(side) == 2 && TAPS(side) == 3 ? 5 : POINTS(side)) /* products of one tap share it */
#define VALUES(kind, side) ((kind) == FC_TAPS ? TAP_POINTS(side) : POINTS(side))
#define CELLS(kind, side) ((kind) == FC_INPUTS ? POINTS(side) : (kind) == FC_TAPS ? TAPS(side) : OUTPUTS(side))
#define MOST_POINTS 8

#define NEAR ((T)0.625)
#define FAR ((T)1.5)
#define NEAR2 (NEAR * NEAR)
#define FAR2 (FAR * FAR)

/* The pairs of points beside 0 and infinity; the products of distances to the other points, which values of taps are over. */
#define PAIRS(points) (((points) - 2) / 2)
#define PAIR(points, i) ((points) == 4 ? (T)1 : (i) == 0 ? NEAR : FAR)
#define AT_ZERO(points) ((points) < 6 ? (T)1 : 1 / (NEAR2 * FAR2))
#define AT_PAIR(points, i) \
    ((points) == 4 ? (T)0.5 : (i) == 0 ? 1 / (2 * NEAR2 * (NEAR2 - FAR2)) : 1 / (2 * FAR2 * (FAR2 - NEAR2)))

#define INLINE static inline __attribute__((always_inline)) /* kind and sides are constants there, small arrays registers */

/* --------------------------------------------------------------------------------------------- one axis, stride 1 */

INLINE void FC(transform_inputs)(const int n, const V *d, V *points) /* Bt d */
{
    if (n == 1) {
        points[0] = d[0];
    } else if (n == 4) {
        points[0] = d[0] - d[2];
        points[1] = d[1] + d[2];
        points[2] = d[2] - d[1];
        points[3] = d[3] - d[1];
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

/* The values of c[0] + c[1] x + ... at n points: of taps (G c) over the distances, of gradients (A c) not. */
INLINE void FC(transform_values)(const int n, const int taps, const int count, const V *c, V *points)
{
    points[0] = c[0] * (taps ? AT_ZERO(n) : 1);
    if (n == 1)
        return;
    for (int i = 0; i < PAIRS(n); i++) {
        const T p = PAIR(n, i), over = taps ? AT_PAIR(n, i) : 1;
        V even = c[0], odd = c[1];
        if (count > 2)
            even += c[2] * (p * p);
        if (count > 3)
            odd += c[3] * (p * p);
        points[1 + 2 * i] = even * over + odd * (p * over);
        points[2 + 2 * i] = even * over - odd * (p * over);
    }
    points[n - 1] = c[count - 1];
}

/* Their transposed sums: outputs (At points), or the gradients of taps (Gt points). */
INLINE void FC(gather_values)(const int n, const int taps, const int count, const V *points, V *c)
{
    c[0] = points[0] * (taps ? AT_ZERO(n) : 1);
    if (n == 1)
        return;
    c[count - 1] = points[n - 1];
    for (int i = 0; i < PAIRS(n); i++) {
        const T p = PAIR(n, i), over = taps ? AT_PAIR(n, i) : 1;
        const V even = points[1 + 2 * i] + points[2 + 2 * i], odd = points[1 + 2 * i] - points[2 + 2 * i];
        for (int k = 0; k < count; k++) {
            const V part = (k % 2 ? odd * (p * over) : even * over) * (k < 2 ? 1 : p * p);
            const int first = i == 0 && k > 0 && k < count - 1;
            c[k] = first ? part : (V)(c[k] + part);
        }
    }
}

/* --------------------------------------------------------------------------------------------------- one axis, any */

INLINE void FC(transform_phase)(const int kind, const int n, const int count, const V *cells, V *points)
{
    if (kind == FC_INPUTS)
        FC(transform_inputs)(n, cells, points);
    else
        FC(transform_values)(n, kind == FC_TAPS, count, cells, points);
}

INLINE void FC(transform_axis)(const int kind, const int side, const V *cells, V *points)
{
    if (STRIDE(side) == 1) {
        FC(transform_phase)(kind, POINTS(side), CELLS(kind, side), cells, points);
        return;
    }
    for (int phase = 0; phase < 2; phase++) {
        const int taps = PHASE_TAPS(side, phase), n = taps + 2;
        V every_second[4];
        for (int i = 0; 2 * i + phase < CELLS(kind, side); i++)
            every_second[i] = cells[2 * i + phase];
        if (taps == 2)
            FC(transform_phase)(kind, n, taps, every_second, points + 4 * phase);
        else
            for (int i = 0; i < (kind == FC_TAPS ? 1 : n); i++)
                points[4 * phase + i] = every_second[i];
    }
}

INLINE void FC(gather_axis)(const int kind, const int side, const V *points, V *cells)
{
    if (STRIDE(side) == 1) {
        FC(gather_values)(POINTS(side), kind == FC_TAPS, CELLS(kind, side), points, cells);
        return;
    }
    V odd[3];
    FC(gather_values)(4, 0, 3, points, cells);
    if (PHASE_TAPS(side, 1) == 2)
        FC(gather_values)(4, 0, 3, points + 4, odd);
    for (int i = 0; i < 3; i++)
        cells[i] += PHASE_TAPS(side, 1) == 2 ? odd[i] : points[4 + i];
}

/* ---------------------------------------------------------------------------------------------------------- tiles */

INLINE void FC(to_points)(const int kind, const int high, const int wide, const fc_tiles *tiles, const T *in, ptrdiff_t block,
                          T *out, ptrdiff_t point_stride)
{
    const ptrdiff_t row_step = tiles->row_step, cell_step = tiles->cell_step;
    for (ptrdiff_t p = 0; p < tiles->count; p++)
        for (ptrdiff_t i = 0; i < block; i += LANES) {
            const T *cells = in + tiles->at[p] + i;
            T *points = out + p * block + i;
            V half[MOST_POINTS][MOST_POINTS], from[MOST_POINTS], to[MOST_POINTS];
            for (int c = 0; c < CELLS(kind, wide); c++) { /* columns to points */
                for (int r = 0; r < CELLS(kind, high); r++)
                    from[r] = kind != FC_TAPS || (r < tiles->high && c < tiles->wide)
                                  ? *(const V *)(cells + r * row_step + c * cell_step)
                                  : (V){0};
                FC(transform_axis)(kind, high, from, to);
                for (int r = 0; r < VALUES(kind, high); r++)
                    half[r][c] = to[r];
            }
            for (int r = 0; r < VALUES(kind, high); r++) { /* rows to points */
                FC(transform_axis)(kind, wide, half[r], to);
                for (int c = 0; c < VALUES(kind, wide); c++)
                    *(V *)(points + (r * VALUES(kind, wide) + c) * point_stride) = to[c];
            }
        }
}

INLINE void FC(from_points)(const int kind, const int high, const int wide, const fc_tiles *tiles, const T *in,
                            ptrdiff_t point_stride, ptrdiff_t block, T *out)
{
    const ptrdiff_t row_step = tiles->row_step, cell_step = tiles->cell_step;
    for (ptrdiff_t p = 0; p < tiles->count; p++)
        for (ptrdiff_t i = 0; i < block; i += LANES) {
            const T *points = in + p * block + i;
            T *cells = out + tiles->at[p] + i;
            V half[MOST_POINTS][MOST_POINTS], from[MOST_POINTS], to[MOST_POINTS];
            for (int c = 0; c < POINTS(wide); c++) { /* columns of points */
                for (int r = 0; r < POINTS(high); r++)
                    from[r] = *(const V *)(points + (r * POINTS(wide) + c) * point_stride);
                FC(gather_axis)(kind, high, from, to);
                for (int r = 0; r < CELLS(kind, high); r++)
                    half[r][c] = to[r];
            }
            for (int r = 0; r < CELLS(kind, high); r++) { /* rows of points */
                FC(gather_axis)(kind, wide, half[r], to);
                for (int c = 0; c < CELLS(kind, wide); c++)
                    *(V *)(cells + r * row_step + c * cell_step) = to[c];
            }
        }
}

#define TILE_CASE(call, m, n)                      \
    if (tiles->rows == m && tiles->columns == n) { \
        call(m, n);                                \
        return;                                    \
    }
#define TILE_CASES(call)                                                                                    \
    TILE_CASE(call, 111, 123) TILE_CASE(call, 111, 132) TILE_CASE(call, 111, 134) TILE_CASE(call, 111, 143) \
    TILE_CASE(call, 123, 123) TILE_CASE(call, 123, 143) TILE_CASE(call, 132, 132) TILE_CASE(call, 134, 134) \
    TILE_CASE(call, 143, 143)
#define STRIDE_CASES(call) /* the gradient of the weights has none */ \
    TILE_CASE(call, 111, 233) TILE_CASE(call, 111, 234) TILE_CASE(call, 233, 233) TILE_CASE(call, 234, 234)
#define TO_POINTS_OF_INPUTS(m, n) FC(to_points)(FC_INPUTS, m, n, tiles, in, block, out, point_stride)
#define TO_POINTS_OF_TAPS(m, n) FC(to_points)(FC_TAPS, m, n, tiles, in, block, out, point_stride)
#define TO_POINTS_OF_OUTPUTS(m, n) FC(to_points)(FC_OUTPUTS, m, n, tiles, in, block, out, point_stride)
#define TO_TAPS(m, n) FC(from_points)(FC_TAPS, m, n, tiles, in, point_stride, block, out)
#define TO_OUTPUTS(m, n) FC(from_points)(FC_OUTPUTS, m, n, tiles, in, point_stride, block, out)

static void FC(winograd_transform)(int kind, const fc_tiles *tiles, const void *in, ptrdiff_t block, void *out,
                                   ptrdiff_t point_stride)
{
    if (kind == FC_INPUTS) {
        TILE_CASES(TO_POINTS_OF_INPUTS) STRIDE_CASES(TO_POINTS_OF_INPUTS)
    } else if (kind == FC_TAPS) {
        TILE_CASES(TO_POINTS_OF_TAPS) STRIDE_CASES(TO_POINTS_OF_TAPS)
    } else {
        TILE_CASES(TO_POINTS_OF_OUTPUTS)
    }
}

static void FC(winograd_gather)(int kind, const fc_tiles *tiles, const void *in, ptrdiff_t point_stride, ptrdiff_t block,
                                void *out)
{
    if (kind == FC_TAPS) {
        TILE_CASES(TO_TAPS)
    } else {
        TILE_CASES(TO_OUTPUTS) STRIDE_CASES(TO_OUTPUTS)
    }
}

#undef STRIDE
#undef OUTPUTS
#undef TAPS
#undef POINTS
#undef PHASE_TAPS
#undef TAP_POINTS
#undef VALUES
#undef CELLS
#undef MOST_POINTS
#undef NEAR
#undef FAR
#undef NEAR2
#undef FAR2
#undef PAIRS
#undef PAIR
#undef AT_ZERO
#undef AT_PAIR
#undef INLINE
#undef TILE_CASE
#undef TILE_CASES
#undef STRIDE_CASES
#undef TO_POINTS_OF_INPUTS
#undef TO_POINTS_OF_TAPS
#undef TO_POINTS_OF_OUTPUTS
#undef TO_TAPS
#undef TO_OUTPUTS
