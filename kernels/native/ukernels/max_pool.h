/* Max pooling for WIDTH windows at once. family.h includes this for a whole vector and, for short rows, for 4 lanes; it
 * defines WIDTH and POOL(name), the name of a function or type at that width.
 */
typedef T POOL(vector) __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef T_INT POOL(mask) __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef uint8_t POOL(bytes) __attribute__((vector_size(WIDTH), aligned(1), may_alias));
#define V POOL(vector)
#define M POOL(mask)
#define B POOL(bytes)

/* EVEN takes every other element of 2 WIDTH - 1 contiguous ones, whose last WIDTH are b; ZIP_LOW and ZIP_HIGH interleave. */
#if WIDTH == 2
#define EVEN(a, b) SHUFFLE(a, b, 0, 3)
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 2)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 1, 3)
#elif WIDTH == 4
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 5, 7)
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#elif WIDTH == 8
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 9, 11, 13, 15)
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31)
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#endif

/* WIDTH elements, `step` apart; nothing beyond the last of them is read. */
static inline __attribute__((always_inline)) V POOL(load)(const T *in, ptrdiff_t step)
{
    if (step == 1)
        return *(const V *)in;
    if (step == 2)
        return EVEN(*(const V *)in, *(const V *)(in + WIDTH - 1));
    if (step == 4)
        return EVEN(POOL(load)(in, 2), POOL(load)(in + 2 * (WIDTH - 1), 2));
    V x = {0};
    UNROLL for (int i = 0; i < WIDTH; i++)
        x[i] = in[i * step];
    return x;
}

static inline __attribute__((always_inline)) void POOL(store)(T *out, ptrdiff_t step, V x)
{
    if (step == 1)
        *(V *)out = x;
    else
        UNROLL for (int i = 0; i < WIDTH; i++)
            out[i * step] = x[i];
}

static inline __attribute__((always_inline)) void POOL(store_winners)(const fc_runs *winners, ptrdiff_t at, M winner)
{
    const ptrdiff_t step = winners->step;
    if (winners->item == 1 && step == 1)
        *(B *)((uint8_t *)winners->data + at) = __builtin_convertvector(winner, B);
    else if (winners->item == 1)
        UNROLL for (int i = 0; i < WIDTH; i++)
            ((uint8_t *)winners->data)[at + i * step] = (uint8_t)winner[i];
    else
        UNROLL for (int i = 0; i < WIDTH; i++)
            ((uint16_t *)winners->data)[at + i * step] = (uint16_t)winner[i];
}

/* The windows of `vectors` vectors; step, vectors and wanted are constants where this is inlined. */
static inline __attribute__((always_inline)) void POOL(max)(const fc_cells *cells, const T *in, ptrdiff_t step,
                                                            const int vectors, const int wanted, const fc_runs *out,
                                                            ptrdiff_t out_at, const fc_runs *winners,
                                                            ptrdiff_t winners_at)
{
    V best[4];
    M winner[4];
    UNROLL for (int v = 0; v < vectors; v++) {
        best[v] = (V){0} - (T)INFINITY;
        winner[v] = (M){0} + cells->numbers[0];
    }
    for (ptrdiff_t t = 0; t < cells->count; t++) {
        const T *cell = in + cells->offsets[t];
        const M number = (M){0} + cells->numbers[t];
        UNROLL for (int v = 0; v < vectors; v++) {
            V x = POOL(load)(cell + v * WIDTH * step, step);
            M take = (x > best[v]) | (x != x);
            best[v] = (V)((take & (M)x) | (~take & (M)best[v]));
            if (wanted)
                winner[v] = (take & number) | (~take & winner[v]);
        }
    }
    UNROLL for (int v = 0; v < vectors; v++) {
        POOL(store)((T *)out->data + out_at + v * WIDTH * out->step, out->step, best[v]);
        if (wanted)
            POOL(store_winners)(winners, winners_at + v * WIDTH * winners->step, winner[v]);
    }
}

/* A run of n >= WIDTH windows; the last vector overlaps the one before it. */
static inline __attribute__((always_inline)) void POOL(max_run)(const fc_cells *cells, ptrdiff_t n, const T *in,
                                                                ptrdiff_t step, const int wanted, const fc_runs *out,
                                                                ptrdiff_t out_at, const fc_runs *winners,
                                                                ptrdiff_t winners_at)
{
    enum { VECTORS = 4 };
    ptrdiff_t i = 0;
    for (; i + VECTORS * WIDTH <= n; i += VECTORS * WIDTH)
        POOL(max)(cells, in + i * step, step, VECTORS, wanted, out, out_at + i * out->step, winners,
                  winners_at + i * winners->step);
    for (; i < n; i += WIDTH) {
        const ptrdiff_t j = i + WIDTH <= n ? i : n - WIDTH;
        POOL(max)(cells, in + j * step, step, 1, wanted, out, out_at + j * out->step, winners,
                  winners_at + j * winners->step);
    }
}

/* What the WIDTH cells get from their sources: one class of max_pool_grad. */
static inline __attribute__((always_inline)) V POOL(gather)(const fc_cells *sources, const T *grad,
                                                            const uint8_t *winners)
{
    V sum = {0};
    for (ptrdiff_t t = 0; t < sources->count; t++) {
        const ptrdiff_t from = sources->offsets[t];
        M mine = __builtin_convertvector(*(const B *)(winners + from), M) == sources->numbers[t];
        sum += (V)(mine & (M) * (const V *)(grad + from));
    }
    return sum;
}

/* A run of n >= WIDTH cells of each class, stored with the classes side by side. */
static inline __attribute__((always_inline)) void POOL(gather_run)(const fc_cells *sources, const int classes,
                                                                   ptrdiff_t n, const T *grad, const uint8_t *winners,
                                                                   T *out, ptrdiff_t step)
{
    for (ptrdiff_t i = 0; i < n; i += WIDTH) {
        const ptrdiff_t j = i + WIDTH <= n ? i : n - WIDTH;
        V x[4];
        UNROLL for (int c = 0; c < classes; c++)
            x[c] = POOL(gather)(&sources[c], grad + j, winners + j);
        if (classes == 1) {
            POOL(store)(out + j * step, step, x[0]);
        } else if (classes == 2) {
            V *to = (V *)(out + j * 2);
            to[0] = ZIP_LOW(x[0], x[1]);
            to[1] = ZIP_HIGH(x[0], x[1]);
        } else {
            V *to = (V *)(out + j * 4);
            V even[2] = {ZIP_LOW(x[0], x[2]), ZIP_HIGH(x[0], x[2])}, odd[2] = {ZIP_LOW(x[1], x[3]), ZIP_HIGH(x[1], x[3])};
            UNROLL for (int h = 0; h < 2; h++) {
                to[2 * h] = ZIP_LOW(even[h], odd[h]);
                to[2 * h + 1] = ZIP_HIGH(even[h], odd[h]);
            }
        }
    }
}

#undef V
#undef M
#undef B
#undef EVEN
#undef ZIP_LOW
#undef ZIP_HIGH
