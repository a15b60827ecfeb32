/* The gradient of max pooling in rows of cells; family.h includes this. The classes of a row take turns in it, so that it is stored
 * once, from registers:
 *
 *     windows that see even cells     s0 s1 s2 ..  \
 *                                                    s0 t0 s1 t1 s2 t2 ..     a row of the gradient of the input
 *     windows that see odd cells      t0 t1 t2 ..  /
 */
#define V FC(vector)

typedef FC(number_vector) FC(number);
#define EVERY(x) ((FC(number)){0} + (uint8_t)(x))
enum { FC(most_lines) = 3, FC(most_columns) = 5, FC(most_classes) = 16 };

/* Rows of cells, and what they see: see max_pool_won. */
typedef struct {
    const fc_cells *lines; /* of each class of rows */
    ptrdiff_t wide;
    const fc_columns *columns;
    const fc_rows *rows;
    const ptrdiff_t *window_step;
    ptrdiff_t n;
} FC(won);

/* What even and odd cells see: neighbours of some lines, and their numbers. The first of the odd cells' is the second of the even cells'
 * where these see more, and the same where not. Few lines are in registers; of more, the numbers are those of line 0. */
typedef struct {
    const fc_cells *of;
    ptrdiff_t lines[FC(most_lines)];
    FC(number) numbers[FC(most_lines)][2][FC(most_columns)];
} FC(seen);

static inline __attribute__((always_inline)) void FC(sum_line)(const FC(number) (*numbers)[FC(most_columns)], const int even,
                                                               const int odd, const T *grad, const uint8_t *winners,
                                                               FC(vector_vector) *sum)
{
    __asm__("" : "+r"(grad), "+r"(winners)); /* neighbours are so far from these: GCC would rather spill a pointer to each */
    UNROLL for (int c = 0; c < even; c++)
        FC(add_won_vector)(numbers[0][c], winners + c, grad + c, 1, &sum[0]);
    UNROLL for (int c = 0; c < odd; c++)
        FC(add_won_vector)(numbers[1][c], winners + c + (even > odd), grad + c + (even > odd), 1, &sum[1]);
}

/* Sums up what a vector of cells of each class has won. */
static inline __attribute__((always_inline)) void FC(sum_won)(const FC(won) *w, const FC(seen) *seen, const int lines,
                                                              const int even, const int odd, const T *grad,
                                                              const uint8_t *winners, V *sum)
{
    FC(vector_vector) won[2] = {{0}, {0}};
    UNROLL for (int line = 0; line < lines; line++)
        FC(sum_line)(seen->numbers[line], even, odd, grad + seen->lines[line], winners + seen->lines[line], won);
    for (ptrdiff_t line = 0; !lines && line < seen->of->count; line++) {
        const ptrdiff_t from = seen->of->offsets[line] + w->columns[0].first;
        const FC(number) more = EVERY(seen->of->numbers[line]);
        FC(number) numbers[2][FC(most_columns)];
        UNROLL for (int c = 0; c < even; c++)
            numbers[0][c] = seen->numbers[0][0][c] + more;
        UNROLL for (int c = 0; c < odd; c++)
            numbers[1][c] = seen->numbers[0][1][c] + more;
        FC(sum_line)(numbers, even, odd, grad + from, winners + from, won);
    }
    sum[0] = (V)won[0], sum[1] = (V)won[1];
}

/* A row of n cells of one class, or of two that take turns: odd = 0 or not. `brief`, a constant where this is inlined: at most a vector. */
static inline __attribute__((always_inline)) void FC(won_row)(const FC(won) *w, const FC(seen) *seen, const int lines, const int even,
                                                              const int odd, const int brief, ptrdiff_t n, const FC(lanes) *some,
                                                              const T *grad, const uint8_t *winners, T *out)
{
    const int wide = odd ? 2 : 1;
    V sum[2];
    if (brief) {
        __builtin_prefetch((char *)out + FC(ahead), 1);
        FC(sum_won)(w, seen, lines, even, odd, grad, winners, sum);
        if (wide == 2)
            FC(two_in_turns)(sum[0], sum[1], n < LANES ? n : LANES, some, out);
        else
            STORE_LANES(out, some[0], sum[0]);
        return;
    }
    for (; n > 0; n -= wide * LANES, grad += LANES, winners += LANES, out += wide * LANES) {
        UNROLL for (int i = 0; i < wide; i++)
            __builtin_prefetch((char *)(out + i * LANES) + FC(ahead), 1);
        FC(sum_won)(w, seen, lines, even, odd, grad, winners, sum);
        if (wide == 2)
            FC(two_in_turns)(sum[0], sum[1], n, some, out);
        else if (n >= LANES)
            *(V *)out = sum[0];
        else
            STORE_LANES(out, some[0], sum[0]);
    }
}

/* A row of any classes, whose windows may be apart. */
static inline void FC(won_row_of_any)(const FC(won) *w, const T *grad, const uint8_t *winners, T *out)
{
    const ptrdiff_t wide = w->wide;
    T sums[FC(most_classes) * LANES];
    for (ptrdiff_t n = w->n; n > 0; n -= wide * LANES, grad += LANES, winners += LANES, out += wide * LANES) {
        for (ptrdiff_t x = 0; x < wide; x++) {
            const fc_columns *seen = &w->columns[x];
            FC(vector_vector) won = {0};
            for (ptrdiff_t line = 0; line < w->lines->count; line++)
                for (ptrdiff_t c = 0; c < seen->count; c++) {
                    const ptrdiff_t from = w->lines->offsets[line] + seen->first + c * seen->step;
                    const int32_t number = w->lines->numbers[line] + seen->number + (int32_t)c * seen->number_step;
                    FC(add_won_vector)(EVERY(number), winners + from, grad + from, 1, &won);
                }
            *(V *)(sums + x * LANES) = (V)won;
        }
        FC(row_from_many)(sums, wide, LANES, n < wide * LANES ? n : wide * LANES, out);
    }
}

/* What a class of rows sees. */
static inline __attribute__((always_inline)) void FC(see)(const FC(won) *w, const fc_cells *of, const int lines, const int even,
                                                          const int odd, FC(seen) *seen)
{
    const int known = lines || !even ? lines : 1;
    seen->of = of;
    UNROLL for (int line = 0; line < known; line++) {
        const int32_t more = lines ? of->numbers[line] : 0;
        seen->lines[line] = lines ? of->offsets[line] + w->columns[0].first : 0;
        UNROLL for (int c = 0; c < even; c++)
            seen->numbers[line][0][c] = EVERY(more + w->columns[0].number + c * w->columns[0].number_step);
        UNROLL for (int c = 0; c < odd; c++)
            seen->numbers[line][1][c] = EVERY(more + w->columns[1].number + c * w->columns[1].number_step);
    }
    UNROLL for (int c = 0; c < FC(most_columns); c++) { /* GCC would rather add numbers first, and spread each sum */
        if (!lines && c < even)
            OPAQUE(seen->numbers[0][0][c]);
        if (!lines && c < odd)
            OPAQUE(seen->numbers[0][1][c]);
    }
}

/* Rows of a slab: of one class, or, with `later` lines for the second, of two that take turns. */
static inline __attribute__((always_inline)) void FC(won_slab)(const FC(won) *w, const FC(seen) *seen, const int lines, const int later,
                                                               const int even, const int odd, const int brief, ptrdiff_t rows,
                                                               ptrdiff_t row_step, ptrdiff_t window_step, const FC(lanes) *some,
                                                               const T *grad, const uint8_t *winners, T *out)
{
    for (ptrdiff_t y = 0; y < rows; y++, grad += window_step, winners += window_step, out += row_step) {
        FC(won_row)(w, &seen[0], lines, even, odd, brief, w->n, some, grad, winners, out);
        if (later && ++y < rows) {
            out += row_step;
            FC(won_row)(w, &seen[1], later, even, odd, brief, w->n, some, grad, winners, out);
        }
    }
}

/* lines (0: any number of them), later, even and odd are constants where this is inlined; even = 0: any classes. */
static inline __attribute__((always_inline)) void FC(won_rows)(const FC(won) *work, const int lines, const int later, const int even,
                                                               const int odd, const T *grad, const uint8_t *winners, T *out)
{
    const FC(won) own = *work, *w = &own; /* which no store changes */
    const fc_rows rows = *w->rows;
    const ptrdiff_t step[3] = {w->window_step[0], w->window_step[1], w->window_step[2]};
    const ptrdiff_t n = w->n, left = n % ((odd ? 2 : 1) * LANES);
    const FC(lanes) some[2] = {FC(between)(0, left), FC(between)(0, left - LANES)};
    FC(seen) seen[2];
    FC(see)(w, &w->lines[0], lines, even, odd, &seen[0]);
    if (later)
        FC(see)(w, &w->lines[1], later, even, odd, &seen[1]);
    for (ptrdiff_t plane = 0; plane < rows.size[0]; plane++)
        for (ptrdiff_t z = 0; z < rows.size[1]; z++) {
            ptrdiff_t from = plane * step[0] + z * step[1];
            T *to = out + plane * rows.step[0] + z * rows.step[1];
            if (!even)
                for (ptrdiff_t y = 0; y < rows.size[2]; y++, from += step[2], to += rows.step[2])
                    FC(won_row_of_any)(w, grad + from, winners + from, to);
            else if (n < LANES + (odd > 0))
                FC(won_slab)(w, seen, lines, later, even, odd, 1, rows.size[2], rows.step[2], step[2], some, grad + from,
                             winners + from, to);
            else
                FC(won_slab)(w, seen, lines, later, even, odd, 0, rows.size[2], rows.step[2], step[2], some, grad + from,
                             winners + from, to);
        }
}

/* One function for each case: in a single one, GCC would find too few registers. */
#define WON(lines, later, even, odd) FC(won_##lines##_##later##_##even##_##odd)
#define WON_FUNCTION(lines, later, even, odd)                                                                                          \
    static __attribute__((noinline)) void WON(lines, later, even, odd)(const FC(won) *w, const T *grad, const uint8_t *winners, T *out) \
    {                                                                                                                                  \
        FC(won_rows)(w, lines, later, even, odd, grad, winners, out);                                                                   \
    }
#define WON_CASES(CASE)                                                                                                       \
    CASE(1, 0, 1, 1) CASE(1, 0, 1, 2) CASE(1, 0, 2, 1) CASE(2, 0, 1, 1) CASE(2, 0, 1, 2) CASE(2, 0, 2, 1) CASE(2, 0, 2, 0)      \
    CASE(3, 0, 3, 0) CASE(0, 0, 2, 0) CASE(0, 0, 3, 0) CASE(0, 0, 5, 0) CASE(0, 0, 1, 2) CASE(0, 0, 2, 1) CASE(0, 0, 2, 3)      \
    CASE(0, 0, 3, 2)
#define WON_PAIRS(CASE) CASE(1, 1, 1, 1) CASE(1, 2, 1, 2) CASE(2, 1, 2, 1)
WON_CASES(WON_FUNCTION)
WON_PAIRS(WON_FUNCTION)
WON_FUNCTION(0, 0, 0, 0)

#define WON_CASE(high, low, first, second)                                                                                       \
    if (alike && (high == 0 || w->lines[0].count == high) && (low == 0 || w->lines[1].count == low) && columns->count == first && \
        odd->count == second) {                                                                                                  \
        WON(high, low, first, second)(w, grad, winners, out);                                                                     \
        return 1;                                                                                                                \
    }

/* Rows of one class, or (if that is one of the cases) of two that take turns; returns whether it was. */
static int FC(won_class)(const FC(won) *w, const int two, const T *grad, const uint8_t *winners, T *out)
{
    const fc_columns none = {.step = 1}, *columns = w->columns, *odd = w->wide == 2 ? &columns[1] : &none;
    const int neighbours = w->wide <= 2 && columns->step == 1 && odd->step == 1;
    const int alike = neighbours && (w->wide == 1 || (odd->count && odd->first - columns->first == (columns->count > odd->count)));
    if (two) {
        WON_PAIRS(WON_CASE)
        return 0;
    }
    WON_CASES(WON_CASE)
    WON(0, 0, 0, 0)(w, grad, winners, out);
    return 1;
}
#undef WON_CASE

static void FC(max_pool_won)(const fc_cells *lines, ptrdiff_t high, ptrdiff_t wide, const fc_columns *columns, const fc_rows *rows,
                             const ptrdiff_t *window_step, ptrdiff_t n, const void *grad, const uint8_t *winners, void *out)
{
    FC(won) w = {lines, wide, columns, rows, window_step, n};
    if (high == 2 && FC(won_class)(&w, 1, grad, winners, out))
        return;
    fc_rows some = *rows;
    some.step[2] = rows->step[2] * high;
    w.rows = &some;
    for (ptrdiff_t y = 0; y < high && y < rows->size[2]; y++) {
        w.lines = &lines[y];
        some.size[2] = (rows->size[2] - y + high - 1) / high;
        FC(won_class)(&w, 0, grad, winners, (T *)out + y * rows->step[2]);
    }
}
#undef WON_PAIRS
#undef WON_CASES
#undef WON_FUNCTION
#undef WON

#undef EVERY
#undef V
#undef TURNS_4
#undef TURNS_8
#undef TURNS_16
#undef TURNS
#undef ZIPPED
#undef LOAD_LANES
#undef STORE_LANES
