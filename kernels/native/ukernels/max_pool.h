/* Max pooling for WIDTH windows at once. family.h includes this for a whole vector and, for short rows, for 4 lanes; it
 * defines WIDTH and POOL(name), the name of a function or type at that width.
 */
typedef T POOL(vector) __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef T_INT POOL(mask) __attribute__((vector_size(WIDTH * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef uint8_t POOL(bytes) __attribute__((vector_size(WIDTH * sizeof(T)), may_alias));
typedef int64_t POOL(longs) __attribute__((vector_size(WIDTH * sizeof(T)), may_alias));
#define V POOL(vector)
#define M POOL(mask)

/* EVEN takes every other element of 2 WIDTH - 1 contiguous ones, whose last WIDTH are b, and ORDER puts what EVEN gives into
 * order: AVX2 shuffles fast only within 16 bytes. SWAP exchanges groups of n lanes.
 * OWN gives each byte that of its lane in one of `half` 2 vectors; each 16 bytes hold those of both lanes' vectors. */
#define ORDER(x) x
#if WIDTH == 2
#define LANE_NUMBERS 0, 1
#define EVEN(a, b) SHUFFLE(a, b, 0, 3)
#define SWAP_1(x) SHUFFLE(x, x, 1, 0)
#elif WIDTH == 4
#define LANE_NUMBERS 0, 1, 2, 3
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 5, 7)
#define SWAP_1(x) SHUFFLE(x, x, 1, 0, 3, 2)
#define SWAP_2(x) SHUFFLE(x, x, 2, 3, 0, 1)
#elif WIDTH == 8
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 9, 11, 4, 6, 13, 15)
#undef ORDER
#define ORDER(x) SHUFFLE(x, x, 0, 1, 4, 5, 2, 3, 6, 7)
#define SWAP_1(x) SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6)
#define SWAP_2(x) SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAP_4(x) SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3)
#else
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31)
#define SWAP_1(x) SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define SWAP_2(x) SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#endif
#define OWN_1(half, j) (half) * WIDTH + (j) / T_BYTES + (j) / 16 * 16
#define OWN_4(half, j) OWN_1(half, j), OWN_1(half, j + 1), OWN_1(half, j + 2), OWN_1(half, j + 3)
#define OWN_16(half, j) OWN_4(half, j), OWN_4(half, j + 4), OWN_4(half, j + 8), OWN_4(half, j + 12)
#if WIDTH * T_BYTES == 16 && defined(__SSE2__)
#define GREATER(x, y) (V)PASTE(_mm_max_, SUFFIX)(x, y)
#elif WIDTH * T_BYTES == 32 && defined(__AVX2__)
#define GREATER(x, y) (V)PASTE(_mm256_max_, SUFFIX)(x, y)
#elif WIDTH * T_BYTES == 64 && defined(__AVX512F__)
#define GREATER(x, y) (V)PASTE(_mm512_max_, SUFFIX)(x, y)
#else
#define GREATER(x, y) (V)(((x) > (y) & (M)(x)) | (~((x) > (y)) & (M)(y)))
#endif
#define LOAD_16(from) _mm_loadu_si128((const __m128i *)(from))
#if WIDTH * T_BYTES == 16
#define OWN(half) OWN_16(half, 0)
#define REPEAT(low, high) low, high
#elif WIDTH * T_BYTES == 32
#define OWN(half) OWN_16(half, 0), OWN_16(half, 16)
#define REPEAT(low, high) low, high, low, high
#ifdef __AVX2__ /* GCC doesn't see it everywhere */
#define REPEAT_16(from) (POOL(bytes))_mm256_broadcastsi128_si256(LOAD_16(from))
#endif
#else
#define OWN(half) OWN_16(half, 0), OWN_16(half, 16), OWN_16(half, 32), OWN_16(half, 48)
#define REPEAT(low, high) low, high, low, high, low, high, low, high
#ifdef __AVX512F__
#define REPEAT_16(from) (POOL(bytes))_mm512_broadcast_i32x4(LOAD_16(from))
#endif
#ifdef __AVX512BW__
#define ADD_WHERE(mask, x, y) (V)PASTE(_mm512_mask_add_, SUFFIX)(x, mask, x, y)
#if T_BYTES == 4
#define LOWEST_BYTES(to, x) _mm512_mask_cvtepi32_storeu_epi8(to, 0xffff, (__m512i)(x))
#else
#define LOWEST_BYTES(to, x) _mm512_mask_cvtepi64_storeu_epi8(to, 0xff, (__m512i)(x))
#endif
#endif
#endif
#ifndef REPEAT_16
#define REPEAT_16(from) (POOL(bytes))(POOL(longs)){REPEAT(low, high)}
#endif

/* WIDTH elements, `step` apart, in EVEN's order where the step is 2 or 4; nothing beyond the last of them is read. */
static inline __attribute__((always_inline)) V POOL(load)(const T *in, ptrdiff_t step)
{
    if (step == 1)
        return *(const V *)in;
    if (step == 2)
        return EVEN(*(const V *)in, *(const V *)(in + WIDTH - 1));
    if (step == 4)
        return EVEN(ORDER(POOL(load)(in, 2)), ORDER(POOL(load)(in + 2 * (WIDTH - 1), 2)));
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

/* A whole vector, past the caches if `stream`. */
static inline __attribute__((always_inline)) void POOL(put)(T *out, V x, int stream)
{
    if (!stream)
        *(V *)out = x;
    else
        UNROLL for (int i = 0; i < WIDTH * T_BYTES; i += 16)
            STREAM_16((char *)out + i, (const char *)&x + i);
}

/* Winners have a byte each in memory and a lane each in registers. A word, as wide as T, holds those of sizeof(T) lanes (or of
 * all, if there are fewer): to be stored, a lane is merged into its own byte of it. */
static inline __attribute__((always_inline)) M POOL(in_own_byte)(M x)
{
    const M byte = (M){LANE_NUMBERS} % T_BYTES;
    return x << 8 * byte;
}

/* A number in every byte that is compared. */
#ifdef ADD_WHERE
typedef uint8_t POOL(number) __attribute__((vector_size(16)));
#else
typedef POOL(bytes) POOL(number);
#endif
#define EVERY(x) ((POOL(number)){0} + (uint8_t)(x))

/* Adds the gradients of some vectors of windows where the winner has that number. Without registers for masks there are 16 windows
 * at most: bytes are compared and then widened. */
static inline __attribute__((always_inline)) void POOL(add_won)(POOL(number) number, const uint8_t *winners, const T *grad,
                                                                const int vectors, V *sum)
{
#ifdef ADD_WHERE
    UNROLL for (int v = 0; v < vectors; v++) {
        __m128i winner = {0};
        memcpy(&winner, winners + v * WIDTH, WIDTH);
        sum[v] = ADD_WHERE(_mm_cmpeq_epi8_mask(winner, (__m128i)number), sum[v], *(const V *)(grad + v * WIDTH));
    }
#else
    int64_t low = 0, high = 0;
    memcpy(&low, winners, vectors * WIDTH < 8 ? vectors * WIDTH : 8);
    if (vectors * WIDTH == 16)
        memcpy(&high, winners + 8, 8);
    const POOL(bytes) repeated = vectors * WIDTH == 16 ? REPEAT_16(winners) : (POOL(bytes))(POOL(longs)){REPEAT(low, high)};
    const POOL(bytes) equal = (POOL(bytes))(repeated == number);
    M won[2] = {(M)SHUFFLE(equal, equal, OWN(0))};
#if WIDTH <= 8
    if (vectors == 2)
        won[1] = (M)SHUFFLE(equal, equal, OWN(1));
#endif
    UNROLL for (int v = 0; v < vectors; v++)
        sum[v] += (V)(won[v] & *(const M *)(grad + v * WIDTH));
#endif
}

static inline __attribute__((always_inline)) void POOL(store_winners)(const fc_runs *winners, ptrdiff_t at, M winner)
{
    if (winners->item == 2) {
        UNROLL for (int i = 0; i < WIDTH; i++)
            ((uint16_t *)winners->data)[at + i * winners->step] = (uint16_t)winner[i];
        return;
    }
    uint8_t *out = (uint8_t *)winners->data + at;
    if (winners->step != 1) {
        UNROLL for (int i = 0; i < WIDTH; i++)
            out[i * winners->step] = (uint8_t)winner[i];
        return;
    }
#ifdef LOWEST_BYTES
    LOWEST_BYTES(out, winner);
#else
    M word = POOL(in_own_byte)(winner);
    word |= SWAP_1(word);
#if WIDTH > 2
    word |= SWAP_2(word);
#endif
#if WIDTH > 4 && T_BYTES > 4
    word |= SWAP_4(word);
#endif
    UNROLL for (int i = 0; i < WIDTH; i += T_BYTES) {
        const T_INT bytes = word[i];
        memcpy(out + i, &bytes, WIDTH < T_BYTES ? WIDTH : T_BYTES);
    }
#endif
}

static inline __attribute__((always_inline)) int POOL(any_nan)(V x)
{
    const POOL(longs) nan = (POOL(longs))(x != x);
    int64_t any = 0;
    UNROLL for (int i = 0; i < WIDTH * T_BYTES / 8; i++)
        any |= nan[i];
    return any != 0;
}

/* Without winners, and unless a NaN may be among the cells, a maximum is one instruction: return whether that was so. The sum of
 * the cells is a NaN if one of them is. */
static inline __attribute__((always_inline)) int POOL(max_of_numbers)(const fc_cells *cells, const T *in, ptrdiff_t step,
                                                                      const int vectors, V *best)
{
    V sum[4] = {{0}}, all;
    for (ptrdiff_t t = 0; t < cells->count; t++) {
        const T *cell = in + cells->offsets[t];
        UNROLL for (int v = 0; v < vectors; v++) {
            const V x = POOL(load)(cell + v * WIDTH * step, step);
            best[v] = GREATER(x, best[v]);
            sum[v] += x;
        }
    }
    all = sum[0];
    UNROLL for (int v = 1; v < vectors; v++)
        all += sum[v];
    return !POOL(any_nan)(all);
}

/* The windows of `vectors` vectors; step, vectors and wanted are constants where this is inlined. */
static inline __attribute__((always_inline)) void POOL(max)(const fc_cells *cells, const T *in, ptrdiff_t step,
                                                            const int vectors, const int wanted, const fc_runs *out,
                                                            ptrdiff_t out_at, int stream, const fc_runs *winners,
                                                            ptrdiff_t winners_at)
{
    V best[4];
    M winner[4];
    UNROLL for (int v = 0; v < vectors; v++) {
        best[v] = (V){0} - (T)INFINITY;
        winner[v] = (M){0} + cells->numbers[0];
    }
    const int done = !wanted && POOL(max_of_numbers)(cells, in, step, vectors, best);
    for (ptrdiff_t t = 0; t < cells->count && !done; t++) {
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
        if (step == 2 || step == 4) {
            best[v] = ORDER(best[v]);
            winner[v] = ORDER(winner[v]);
        }
        if (out->step == 1)
            POOL(put)((T *)out->data + out_at + v * WIDTH, best[v], stream);
        else
            POOL(store)((T *)out->data + out_at + v * WIDTH * out->step, out->step, best[v]);
        if (wanted)
            POOL(store_winners)(winners, winners_at + v * WIDTH * winners->step, winner[v]);
    }
}

/* A run of n >= vectors * WIDTH windows; the last vectors overlap those before them. */
static inline __attribute__((always_inline)) void POOL(max_run)(const fc_cells *cells, ptrdiff_t n, const T *in,
                                                                ptrdiff_t step, const int vectors, const int wanted,
                                                                const fc_runs *out, ptrdiff_t out_at, int stream,
                                                                const fc_runs *winners, ptrdiff_t winners_at)
{
    for (ptrdiff_t next = 0; next < n; next += vectors * WIDTH) {
        const ptrdiff_t i = next + vectors * WIDTH <= n ? next : n - vectors * WIDTH;
        POOL(max)(cells, in + i * step, step, vectors, wanted, out, out_at + i * out->step, stream, winners,
                  winners_at + i * winners->step);
    }
}

/* n windows, a whole number of `vectors`; `vectors` and `wanted` are constants where this is inlined. A NaN is where no cell is. `lines`
 * of memory are fetched ahead beside each `vectors`. */
static inline __attribute__((always_inline)) void POOL(max_finite)(const fc_cells *cells, ptrdiff_t n, const T *in,
                                                                   const int vectors, const int wanted, T *out,
                                                                   const fc_runs *winners, const char *ahead, ptrdiff_t lines)
{
    for (ptrdiff_t i = 0; i < n; i += vectors * WIDTH) {
        for (ptrdiff_t line = 0; line < lines; line++, ahead += 64)
            __builtin_prefetch(ahead, 0, 2);
        V best[4];
        M winner[4];
        UNROLL for (int v = 0; v < vectors; v++) {
            best[v] = (V){0} - (T)INFINITY;
            winner[v] = (M){0};
        }
        for (ptrdiff_t t = 0; t < cells->count; t++) {
            const T *cell = in + i + cells->offsets[t];
            const M number = (M){0} + cells->numbers[t];
            UNROLL for (int v = 0; v < vectors; v++) {
                const V x = *(const V *)(cell + v * WIDTH);
                const M take = x > best[v];
                if (wanted)
                    winner[v] = (take & number) | (~take & winner[v]);
                best[v] = GREATER(x, best[v]);
            }
        }
        UNROLL for (int v = 0; v < vectors; v++) {
            *(V *)(out + i + v * WIDTH) = best[v];
            if (wanted)
                POOL(store_winners)(winners, i + v * WIDTH, winner[v]);
        }
    }
}

/* Some vectors of cells of max_pool_grad, from i on. Lines that will be written soon are fetched, `ahead` bytes further on. */
static inline __attribute__((always_inline)) void POOL(gather_some)(const fc_cells *sources, ptrdiff_t i, const T *grad,
                                                                    const uint8_t *winners, const int vectors, T *out,
                                                                    ptrdiff_t step, const int stream, ptrdiff_t ahead)
{
    V sum[4] = {{0}};
    out += i * step;
    if (step == 1 && !stream)
        UNROLL for (int v = 0; v < vectors; v++)
            __builtin_prefetch((char *)(out + v * WIDTH) + ahead, 1);
    UNROLL for (ptrdiff_t t = 0; t < sources->count; t++) {
        const ptrdiff_t from = i + sources->offsets[t];
        POOL(add_won)(EVERY(sources->numbers[t]), winners + from, grad + from, vectors, sum);
    }
    UNROLL for (int v = 0; v < vectors; v++)
        if (step == 1)
            POOL(put)(out + v * WIDTH, sum[v], stream);
        else
            POOL(store)(out + v * WIDTH * step, step, sum[v]);
}

/* Runs of n >= WIDTH cells of one class of max_pool_grad, `vectors` at a time while there are so many. The last vector overlaps the one
 * before. */
static inline __attribute__((always_inline)) void POOL(gather)(const fc_cells *sources, ptrdiff_t runs, ptrdiff_t n, ptrdiff_t from_step,
                                                               const T *grad, const uint8_t *winners, const int vectors, T *out,
                                                               ptrdiff_t to_step, ptrdiff_t step, const int stream, ptrdiff_t ahead)
{
    for (ptrdiff_t r = 0; r < runs; r++, grad += from_step, winners += from_step, out += to_step) {
        ptrdiff_t i = 0;
        for (; vectors > 1 && i + vectors * WIDTH <= n; i += vectors * WIDTH)
            POOL(gather_some)(sources, i, grad, winners, vectors, out, step, stream, ahead);
        for (; i < n; i += WIDTH) {
            i = i + WIDTH <= n ? i : n - WIDTH;
            POOL(gather_some)(sources, i, grad, winners, 1, out, step, stream, ahead);
        }
    }
}

/* The same for `count` sources, a constant: they are in registers. */
static inline __attribute__((always_inline)) void POOL(gather_few)(const fc_cells *sources, const int count, ptrdiff_t runs, ptrdiff_t n,
                                                                   ptrdiff_t from_step, const T *grad, const uint8_t *winners,
                                                                   const int vectors, T *out, ptrdiff_t to_step, ptrdiff_t step,
                                                                   const int stream, ptrdiff_t ahead)
{
    ptrdiff_t offsets[9];
    int32_t numbers[9];
    UNROLL for (int t = 0; t < count; t++) {
        offsets[t] = sources->offsets[t];
        numbers[t] = sources->numbers[t];
    }
    const fc_cells few = {count, offsets, numbers};
    POOL(gather)(&few, runs, n, from_step, grad, winners, vectors, out, to_step, step, stream, ahead);
}

static inline __attribute__((always_inline)) void POOL(gather_class)(const fc_cells *sources, ptrdiff_t runs, ptrdiff_t n,
                                                                     ptrdiff_t from_step, const T *grad, const uint8_t *winners,
                                                                     const int vectors, T *out, ptrdiff_t to_step, ptrdiff_t step,
                                                                     const int stream, ptrdiff_t ahead)
{
#define FEW_CASE(count)                                                                                                        \
    case count:                                                                                                                \
        POOL(gather_few)(sources, count, runs, n, from_step, grad, winners, vectors, out, to_step, step, stream, ahead);        \
        break;
    switch (sources->count) {
        FEW_CASE(1)
        FEW_CASE(2)
        FEW_CASE(4)
        FEW_CASE(9)
    default:
        POOL(gather)(sources, runs, n, from_step, grad, winners, vectors, out, to_step, step, stream, ahead);
    }
#undef FEW_CASE
}

#undef V
#undef M
#undef LANE_NUMBERS
#undef EVEN
#undef ORDER
#undef SWAP_1
#undef SWAP_2
#undef SWAP_4
#undef OWN
#undef OWN_1
#undef OWN_4
#undef OWN_16
#undef REPEAT
#undef REPEAT_16
#undef ADD_WHERE
#undef EVERY
#undef LOWEST_BYTES
#undef GREATER
#undef LOAD_16
