/* The gradient of max pooling by scattering; family.h includes this. Sums into one cell wait for each other, and neighbouring windows
 * often have the same winner: channels, or groups of them, take turns.
 *
 *     channels first                                        channels last
 *     lanes are neighbouring windows, turns channels        lanes are neighbouring channels, turns groups of them
 *
 * Neighbouring windows are those of a row or, where they are listed, of a plane: short rows would leave lanes empty.
 */
#define V FC(vector)

/* The first of LANES windows or fewer: where it begins, along each axis and in memory; whether all cells that they see are there. */
typedef struct {
    ptrdiff_t place[3], offset, n;
    int inside;
} FC(windows);

/* Any windows, one after another. */
static inline void FC(scatter_any)(const fc_scatter *s, const FC(windows) *w, ptrdiff_t turns, const T *grad, const void *winners,
                                   T *cells)
{
    for (ptrdiff_t i = 0; i < w->n; i++)
        for (ptrdiff_t turn = 0; turn < turns; turn++) {
            const ptrdiff_t from = turn * s->turn.winner + i * s->lane.winner;
            const ptrdiff_t won = s->winner_item == 1 ? ((const uint8_t *)winners)[from] : ((const uint16_t *)winners)[from];
            int inside = 1;
            for (int axis = 0; axis < 3 && !w->inside; axis++) {
                const ptrdiff_t place = w->place[axis] + s->places[axis][won] + (axis == 2 ? i * s->lane_stride : 0);
                inside &= place >= 0 && place < s->image[axis];
            }
            if (inside)
                cells[w->offset + s->offsets[won] + turn * s->turn.cell + i * s->lane.cell] +=
                    grad[turn * s->turn.grad + i * s->lane.grad];
        }
}

#if VECTOR_BYTES == 64 && T_BYTES == 4
/* A table of 2 LANES numbers, in registers. */
typedef struct {
    __m512i low, high;
} FC(numbers);

static inline FC(numbers) FC(numbers_of)(const int32_t *from)
{
    return (FC(numbers)){_mm512_loadu_si512(from), _mm512_loadu_si512(from + LANES)};
}

static inline __m512i FC(look_up)(FC(numbers) table, __m512i which)
{
    return _mm512_permutex2var_epi32(table.low, which, table.high);
}

/* Where the cells of a window are along the last axis: nowhere if they aren't inside the image along the others. */
static inline FC(numbers) FC(columns_inside)(const fc_scatter *s, const FC(windows) *w)
{
    FC(numbers) column = FC(numbers_of)(s->places[2]);
    for (int axis = 0; axis < 2; axis++) {
        const FC(numbers) place = FC(numbers_of)(s->places[axis]);
        const __m512i first = _mm512_set1_epi32((int)w->place[axis]), size = _mm512_set1_epi32((int)s->image[axis]);
        const __m512i nowhere = _mm512_set1_epi32(INT32_MIN / 2);
        column.low = _mm512_mask_mov_epi32(column.low, _mm512_cmpge_epu32_mask(_mm512_add_epi32(place.low, first), size), nowhere);
        column.high = _mm512_mask_mov_epi32(column.high, _mm512_cmpge_epu32_mask(_mm512_add_epi32(place.high, first), size), nowhere);
    }
    return column;
}

/* What is added, and to which cell. */
typedef struct {
    int32_t at[FC_TURNS][LANES];
    T value[FC_TURNS][LANES];
} FC(additions);

/* Looks up the cells of neighbours. What was won outside the image, and what is no window, adds nothing to the first cell. */
static inline __attribute__((always_inline)) void FC(find)(const fc_scatter *s, const FC(windows) *w, ptrdiff_t turns, const int inside,
                                                           const T *grad, const uint8_t *winners, FC(additions) *to)
{
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)s->lane_stride));
    const __m512i column = _mm512_add_epi32(_mm512_set1_epi32((int)w->place[2]), apart);
    const __m512i size = _mm512_set1_epi32((int)s->image[2]), turn_step = _mm512_set1_epi32((int)s->turn.cell);
    const FC(numbers) offsets = FC(numbers_of)(s->near_offsets);
    const FC(numbers) columns = inside ? offsets : FC(columns_inside)(s, w);
    const __mmask16 some = (__mmask16)FC(between)(0, w->n);
    __m512i first = _mm512_add_epi32(_mm512_set1_epi32((int)w->offset), _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)s->lane.cell)));
    for (ptrdiff_t turn = 0; turn < turns; turn++) {
        const __m512i won = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, winners));
        const __m512i at = _mm512_add_epi32(first, FC(look_up)(offsets, won));
        if (inside) {
            _mm512_storeu_si512(to->at[turn], _mm512_maskz_mov_epi32(some, at));
            _mm512_storeu_ps(to->value[turn], _mm512_maskz_loadu_ps(some, grad));
        } else {
            const __m512i place = _mm512_add_epi32(column, FC(look_up)(columns, won));
            const __mmask16 there = _mm512_mask_cmplt_epu32_mask(some, place, size);
            _mm512_storeu_si512(to->at[turn], _mm512_maskz_mov_epi32(there, at));
            _mm512_storeu_ps(to->value[turn], _mm512_maskz_loadu_ps(there, grad));
        }
        first = _mm512_add_epi32(first, turn_step);
        winners += s->turn.winner;
        grad += s->turn.grad;
    }
}

/* Two at a time: so many places fit into one register. */
static inline __attribute__((always_inline)) void FC(add_two)(const FC(additions) *from, ptrdiff_t turn, ptrdiff_t i, T *cells)
{
    int64_t at;
    memcpy(&at, &from->at[turn][i], sizeof at);
    cells[(int32_t)at] += from->value[turn][i];
    cells[at >> 32] += from->value[turn][i + 1];
}

/* turns is a constant where this is inlined. */
static inline __attribute__((always_inline)) void FC(add_windows)(const FC(additions) *from, ptrdiff_t n, const ptrdiff_t turns, T *cells)
{
    for (ptrdiff_t i = 0; i < n; i += 2)
        UNROLL for (ptrdiff_t turn = 0; turn < turns; turn++)
            FC(add_two)(from, turn, i, cells);
}

static inline void FC(add_channels)(const FC(additions) *from, ptrdiff_t n, ptrdiff_t turns, T *cells)
{
    for (ptrdiff_t turn = 0; turn < turns; turn++)
        UNROLL for (ptrdiff_t i = 0; i < LANES; i += 2)
            if (i < n)
                FC(add_two)(from, turn, i, cells);
}

/* All windows of some planes, whatever rows they are in. */
static void FC(scatter_planes)(const fc_scatter *s, ptrdiff_t turns, const T *grad, const uint8_t *winners, T *cells)
{
    const ptrdiff_t count = s->windows[0] * s->windows[1] * s->windows[2];
    const __m512i one = _mm512_set1_epi32(1), turn_step = _mm512_set1_epi32((int)s->turn.cell);
    const FC(numbers) offsets = FC(numbers_of)(s->near_offsets);
    FC(additions) to;
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        const ptrdiff_t n = count - i < LANES ? count - i : LANES;
        const __mmask16 some = (__mmask16)FC(between)(0, n);
        const __m512i inside = _mm512_loadu_si512(s->inside + i);
        __m512i first = _mm512_loadu_si512(s->first + i);
        for (ptrdiff_t turn = 0; turn < turns; turn++) {
            const __m512i won = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, winners + turn * s->turn.winner + i));
            const __mmask16 there = _mm512_mask_test_epi32_mask(some, inside, _mm512_sllv_epi32(one, won));
            const __m512i at = _mm512_add_epi32(first, FC(look_up)(offsets, won));
            _mm512_storeu_si512(to.at[turn], _mm512_maskz_mov_epi32(there, at));
            _mm512_storeu_ps(to.value[turn], _mm512_maskz_loadu_ps(there, grad + turn * s->turn.grad + i));
            first = _mm512_add_epi32(first, turn_step);
        }
        if (turns == FC_TURNS)
            FC(add_windows)(&to, n, FC_TURNS, cells);
        else
            FC(add_windows)(&to, n, turns, cells);
    }
}

static void FC(scatter_near)(const fc_scatter *s, const FC(windows) *w, ptrdiff_t turns, const T *grad, const uint8_t *winners, T *cells)
{
    FC(additions) additions;
    if (w->inside)
        FC(find)(s, w, turns, 1, grad, winners, &additions);
    else
        FC(find)(s, w, turns, 0, grad, winners, &additions);
    if (s->lane_stride == 0 && w->n == LANES)
        FC(add_channels)(&additions, LANES, turns, cells);
    else if (s->lane_stride == 0)
        FC(add_channels)(&additions, w->n, turns, cells);
    else if (turns == FC_TURNS)
        FC(add_windows)(&additions, w->n, FC_TURNS, cells);
    else
        FC(add_windows)(&additions, w->n, turns, cells);
}
#endif

/* Zeros along some axes, the innermost first. */
static void FC(clear)(T *cells, int axes, const ptrdiff_t *size, const ptrdiff_t *step)
{
    ptrdiff_t n = size[axes - 1];
    if (axes > 1)
        for (ptrdiff_t i = 0; i < n; i++)
            FC(clear)(cells + i * step[axes - 1], axes - 1, size, step);
    else if (step[0] != 1)
        for (ptrdiff_t i = 0; i < n; i++)
            cells[i * step[0]] = 0;
    else {
        for (; n >= LANES; n -= LANES, cells += LANES)
            *(V *)cells = (V){0};
        STORE_LANES(cells, FC(between)(0, n), (V){0});
    }
}

static void FC(clear_image)(const fc_scatter *s, ptrdiff_t turns, ptrdiff_t lanes, T *cells)
{
    const ptrdiff_t image[3][2] = {
        {s->image[2], s->cell_step[2]}, {s->image[1], s->cell_step[1]}, {s->image[0], s->cell_step[0]},
    };
    const ptrdiff_t turn[2] = {turns, s->turn.cell}, lane[2] = {lanes, s->lane.cell};
    const ptrdiff_t *last[] = {lane, turn, image[0], image[1], image[2]}, *first[] = {image[0], image[1], image[2], turn};
    ptrdiff_t size[5], step[5];
    int axes = 0;
    for (int i = 0; i < (lanes ? 5 : 4); i++) {
        const ptrdiff_t *axis = lanes ? last[i] : first[i];
        if (axes && (axis[0] == 1 || axis[1] == size[axes - 1] * step[axes - 1])) /* one axis with the one before */
            size[axes - 1] *= axis[0];
        else
            size[axes] = axis[0], step[axes++] = axis[1];
    }
    FC(clear)(cells, axes, size, step);
}

/* Whether windows from one place to another see no padding along an axis. */
static inline int FC(is_inside)(const fc_scatter *s, int axis, ptrdiff_t first, ptrdiff_t last)
{
    return first >= 0 && last + s->reach[axis] < s->image[axis];
}

static void FC(max_pool_scatter)(const fc_scatter *scatter, ptrdiff_t turns, ptrdiff_t lanes, const void *grad, const void *winners,
                                 void *cells)
{
    const fc_scatter own = *scatter, *s = &own; /* which no store changes */
    FC(windows) w;
    FC(clear_image)(s, turns, lanes, cells);
#if VECTOR_BYTES == 64 && T_BYTES == 4
    if (s->inside) {
        FC(scatter_planes)(s, turns, grad, winners, cells);
        return;
    }
#endif
    for (ptrdiff_t z = 0; z < s->windows[0]; z++)
        for (ptrdiff_t y = 0; y < s->windows[1]; y++)
            for (ptrdiff_t x = 0; x < s->windows[2]; x += lanes ? 1 : w.n) {
                w.n = lanes ? lanes : s->windows[2] - x < LANES ? s->windows[2] - x : LANES;
                w.place[0] = z * s->stride[0] - s->pad[0];
                w.place[1] = y * s->stride[1] - s->pad[1];
                w.place[2] = x * s->stride[2] - s->pad[2];
                w.inside = FC(is_inside)(s, 0, w.place[0], w.place[0]) && FC(is_inside)(s, 1, w.place[1], w.place[1]) &&
                           FC(is_inside)(s, 2, w.place[2], w.place[2] + (w.n - 1) * s->lane_stride);
                w.offset = w.place[0] * s->cell_step[0] + w.place[1] * s->cell_step[1] + w.place[2] * s->cell_step[2];
                const T *from = (const T *)grad + z * s->grad_step[0] + y * s->grad_step[1] + x * s->grad_step[2];
                const ptrdiff_t won = z * s->winner_step[0] + y * s->winner_step[1] + x * s->winner_step[2];
                const char *win = (const char *)winners + won * s->winner_item;
#if VECTOR_BYTES == 64 && T_BYTES == 4
                if (s->near_offsets) {
                    FC(scatter_near)(s, &w, turns, from, (const uint8_t *)win, cells);
                    continue;
                }
#endif
                FC(scatter_any)(s, &w, turns, from, win, cells);
            }
}

#undef V
