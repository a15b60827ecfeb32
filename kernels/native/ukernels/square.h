/* Transposition and epilogue in squares of SIDE x SIDE elements, one vector a row; family.h includes this for each side it has.
 *
 * A square is turned in log2(SIDE) steps. Step `bit` exchanges that bit of the row number with the same bit of the column
 * number: of every 2 x 2 blocks of side `bit`, the upper right and the lower left change places.
 *
 *      a a b b       a a c c
 *      a a b b  ->   a a c c       bit = 2
 *      c c d d       b b d d
 *      c c d d       b b d d
 */
#define SQ(name) SQUARES(name, SIDE)

typedef T SQ(row) __attribute__((vector_size(SIDE * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef __typeof__((SQ(row)){0} < (SQ(row)){0}) SQ(mask); /* integers as wide as T */
#define ROW SQ(row)

/* Lane j of the new upper and of the new lower row of a pair; lanes of the old lower row count from SIDE on. */
#define UPPER(bit, j) ((j) & (bit) ? (j) - (bit) + SIDE : (j))
#define LOWER(bit, j) ((j) & (bit) ? (j) + SIDE : (j) + (bit))
#define LANES_4(pick, bit, j) pick(bit, j), pick(bit, j + 1), pick(bit, j + 2), pick(bit, j + 3)
#define LANES_8(pick, bit, j) LANES_4(pick, bit, j), LANES_4(pick, bit, j + 4)
#define LANES_16(pick, bit, j) LANES_8(pick, bit, j), LANES_8(pick, bit, j + 8)
#define ALL_LANES(pick, bit) PASTE(LANES_, SIDE)(pick, bit, 0)
#define STEP(bit)                                                            \
    UNROLL for (int i = 0; i < SIDE; i++) if (!(i & (bit)))                   \
    {                                                                        \
        ROW upper = x[i], lower = x[i + (bit)];                              \
        x[i] = SHUFFLE(upper, lower, ALL_LANES(UPPER, bit));                 \
        x[i + (bit)] = SHUFFLE(upper, lower, ALL_LANES(LOWER, bit));         \
    }

static inline __attribute__((always_inline)) void SQ(turn)(ROW x[SIDE])
{
    STEP(1)
    STEP(2)
#if SIDE > 4
    STEP(4)
#endif
#if SIDE > 8
    STEP(8)
#endif
}

/* x = the rows that AT points to, turned. The steps that exchange parts of 16 bytes or more are done by loading such parts where they
 * belong: a load takes no turn of the unit that shuffles. The parts of a line are loaded one after another, while L1 has it. */
#if defined(__AVX__) && SIDE > 4
#define PARTS(j, AT, READ)                                                                   \
    UNROLL for (int r = 0; r < PART; r++) UNROLL for (int n = r; n < SIDE; n += PART) \
        x[n] = (ROW)READ(AT(PART * (j) + r) + n - r);
#define SECOND_PART(from) PUT_PART(x[n], from, 1)
#define THIRD_PART(from) PUT_PART(x[n], from, 2)
#define FOURTH_PART(from) PUT_PART(x[n], from, 3)
#ifdef __AVX512F__
#define LAST_PARTS(AT) PARTS(2, AT, THIRD_PART) PARTS(3, AT, FOURTH_PART)
#else
#define LAST_PARTS(AT)
#endif
#define READ_TURNED(AT)                    \
    enum { PART = 16 / sizeof(T) };        \
    PARTS(0, AT, FIRST_PART)               \
    PARTS(1, AT, SECOND_PART)              \
    LAST_PARTS(AT)                         \
    STEP(1)                                \
    if (PART == 4)                         \
        STEP(2)
#else
#define READ_TURNED(AT)                    \
    UNROLL for (int n = 0; n < SIDE; n++)  \
        x[n] = *(const ROW *)AT(n);        \
    SQ(turn)(x);
#endif

static inline __attribute__((always_inline)) void SQ(read_turned)(const T *in, ptrdiff_t i_stride, ROW x[SIDE])
{
#define EVENLY(m) (in + (m) * i_stride)
    READ_TURNED(EVENLY)
#undef EVENLY
}

static inline __attribute__((always_inline)) void SQ(read_anywhere)(const T *const rows[SIDE], ptrdiff_t i, ROW x[SIDE])
{
#define ANYWHERE(m) (rows[m] + i)
    READ_TURNED(ANYWHERE)
#undef ANYWHERE
}

/* out[j * out_stride + i] = in[i * i_stride + j]; ni, nj >= SIDE. A few cache lines of a row at a time: enough to be fetched ahead,
 * and few enough for L1, where rows that are a power of two apart share a set. The last squares overlap those before them. */
static void SQ(transpose)(const T *in, ptrdiff_t i_stride, ptrdiff_t ni, ptrdiff_t nj, T *out, ptrdiff_t out_stride)
{
    const ptrdiff_t run = 4 * LINE;
    for (ptrdiff_t first = 0; first < nj; first += run)
        for (ptrdiff_t i = 0; i < ni; i += SIDE)
            for (ptrdiff_t j = first; j < nj && j < first + run; j += SIDE) {
                const ptrdiff_t i0 = i + SIDE <= ni ? i : ni - SIDE, j0 = j + SIDE <= nj ? j : nj - SIDE;
                ROW x[SIDE];
                SQ(read_turned)(in + i0 * i_stride + j0, i_stride, x);
                UNROLL for (int n = 0; n < SIDE; n++)
                    *(ROW *)(out + (j0 + n) * out_stride + i0) = x[n];
            }
}

#if defined(MASKED_LOAD) && SIDE > 4
/* The same for rows that are shorter than a vector: no lane beyond them is read. `in` has a column every j_stride > 0 elements. */
static void SQ(transpose_short)(const T *in, ptrdiff_t i_stride, ptrdiff_t j_stride, ptrdiff_t ni, ptrdiff_t nj, T *out,
                                ptrdiff_t out_stride)
{
    const ptrdiff_t span = (nj - 1) * j_stride + 1;
    const unsigned read = (1u << span) - 1;
    for (ptrdiff_t i = 0; i < ni; i += SIDE) {
        const ptrdiff_t i0 = i + SIDE <= ni ? i : ni - SIDE;
        const T *row = in + i0 * i_stride;
        T *column = out + i0;
        ROW x[SIDE];
        UNROLL for (int n = 0; n < SIDE; n++, row += i_stride)
            x[n] = (ROW)MASKED_LOAD(read, row);
        SQ(turn)(x);
        ptrdiff_t wanted = 0;
        UNROLL for (int n = 0; n < SIDE; n++) {
            if (n == span)
                break;
            if (n == wanted) {
                *(ROW *)column = x[n];
                column += out_stride;
                wanted += j_stride;
            }
        }
    }
}
#endif

#if defined(MASKED_LOAD) && SIDE > 4
/* The same for fewer rows than a vector has lanes, ni < SIDE <= nj. */
static void SQ(transpose_few)(const T *in, ptrdiff_t i_stride, ptrdiff_t ni, ptrdiff_t nj, T *out, ptrdiff_t out_stride)
{
    for (ptrdiff_t j = 0; j < nj; j += SIDE) {
        const ptrdiff_t j0 = j + SIDE <= nj ? j : nj - SIDE;
        ROW x[SIDE];
        UNROLL for (int n = 0; n < SIDE; n++)
            x[n] = n < ni ? *(const ROW *)(in + n * i_stride + j0) : (ROW){0};
        SQ(turn)(x);
        UNROLL for (int n = 0; n < SIDE; n++)
            MASKED_STORE(out + (j0 + n) * out_stride, (1u << ni) - 1, x[n]);
    }
}

/* out[j * out_stride + i] = in[2 * i + j * j_stride]. */
#define SECOND(unused, j) 2 * (j)
static void SQ(copy_second)(const T *in, ptrdiff_t j_stride, ptrdiff_t ni, ptrdiff_t nj, T *out, ptrdiff_t out_stride)
{
    for (ptrdiff_t i = 0; i < ni; i += SIDE, in += 2 * SIDE, out += SIDE) {
        const int n = ni - i < SIDE ? (int)(ni - i) : SIDE;
        const unsigned read = (unsigned)((1ull << (2 * n - 1)) - 1), low = read & ((1u << SIDE) - 1), high = read >> SIDE;
        for (ptrdiff_t j = 0; j < nj; j++) {
            const ROW x = (ROW)MASKED_LOAD(low, in + j * j_stride), y = (ROW)MASKED_LOAD(high, in + j * j_stride + SIDE);
            MASKED_STORE(out + j * out_stride, (1u << n) - 1, SHUFFLE(x, y, ALL_LANES(SECOND, 0)));
        }
    }
}
#undef SECOND
#endif

/* Three rows, of at least SIDE elements, side by side: out[3 j + i] = in[i * i_stride + j], the channels of an RGB image. */
#define OF_TWO(part, j) (((part) * SIDE + (j)) % 3 == 1) * SIDE + ((part) * SIDE + (j)) / 3
#define AND_THIRD(part, j) ((part) * SIDE + (j)) % 3 == 2 ? SIDE + ((part) * SIDE + (j)) / 3 : (j)
#define THIRD(part)                                                                           \
    do {                                                                                      \
        const ROW two = SHUFFLE(x[0], x[1], ALL_LANES(OF_TWO, part));                         \
        *(ROW *)(out + 3 * j + (part) * SIDE) = SHUFFLE(two, x[2], ALL_LANES(AND_THIRD, part)); \
    } while (0)
static void SQ(interleave_3)(const T *in, ptrdiff_t i_stride, ptrdiff_t nj, T *out)
{
    for (ptrdiff_t next = 0; next < nj; next += SIDE) {
        const ptrdiff_t j = next + SIDE <= nj ? next : nj - SIDE;
        ROW x[3];
        UNROLL for (int i = 0; i < 3; i++)
            x[i] = *(const ROW *)(in + i * i_stride + j);
        THIRD(0);
        THIRD(1);
        THIRD(2);
    }
}
#undef OF_TWO
#undef AND_THIRD
#undef THIRD

static inline void SQ(rectify)(ROW *value)
{
    *value = (ROW)((SQ(mask))*value & ~(*value < 0)); /* a NaN stays one */
}

/* Store a row for each channel, of pixels that are `ps` apart: every second one under a mask, where lanes can be masked. */
#define TWICE(part, j) ((part) * SIDE / 2 + (j) / 2)
#define EVEN_LANES (0x5555 & ((1 << SIDE) - 1))
static inline __attribute__((always_inline)) void SQ(store)(const ROW x[SIDE], T *out, ptrdiff_t cs, ptrdiff_t ps)
{
    if (ps == 1) {
        UNROLL for (int n = 0; n < SIDE; n++, out += cs)
            *(ROW *)out = x[n];
#if defined(MASKED_STORE) && SIDE > 4
    } else if (ps == 2) {
        UNROLL for (int n = 0; n < SIDE; n++, out += cs) {
            MASKED_STORE(out, EVEN_LANES, SHUFFLE(x[n], x[n], ALL_LANES(TWICE, 0)));
            MASKED_STORE(out + SIDE, EVEN_LANES, SHUFFLE(x[n], x[n], ALL_LANES(TWICE, 1)));
        }
#endif
    } else {
        UNROLL for (int n = 0; n < SIDE; n++, out += cs)
            UNROLL for (int k = 0; k < SIDE; k++)
                out[k * ps] = x[n][k];
    }
}
#undef TWICE
#undef EVEN_LANES

/* Add the bias of channels from i on to a square of their sums, and apply the activation. */
static inline __attribute__((always_inline)) void SQ(activate)(const fc_epilogue *e, ptrdiff_t i, ROW x[SIDE])
{
    const T *bias = e->bias;
    if (bias)
        UNROLL for (int n = 0; n < SIDE; n++)
            x[n] += bias[i + n];
    if (e->relu)
        UNROLL for (int n = 0; n < SIDE; n++)
            SQ(rectify)(&x[n]);
}

/* The epilogue for at least SIDE channels whose elements are neighbours in the output, or SIDE of them and as many pixels. Pixels
 * that are no neighbours are stored one by one, a channel's after another: channels may be a power of two apart. */
static void SQ(epilogue)(const fc_epilogue *e, const T *c, ptrdiff_t c_stride, ptrdiff_t pixels, ptrdiff_t channels, T *out)
{
    const T *bias = e->bias;
    const ptrdiff_t ps = e->pixel_stride, cs = e->channel_stride;
    for (ptrdiff_t pixel = 0; pixel < pixels && cs == 1; pixel++)
        for (ptrdiff_t channel = 0; channel < channels; channel += SIDE) {
            const ptrdiff_t i = channel + SIDE <= channels ? channel : channels - SIDE;
            ROW x = *(const ROW *)(c + pixel * c_stride + i);
            if (bias)
                x += *(const ROW *)(bias + i);
            if (e->relu)
                SQ(rectify)(&x);
            *(ROW *)(out + pixel * ps + i) = x;
        }
    for (ptrdiff_t channel = 0; channel < channels && cs != 1; channel += SIDE) {
        const ptrdiff_t i = channel + SIDE <= channels ? channel : channels - SIDE;
        for (ptrdiff_t pixel = 0; pixel < pixels; pixel += SIDE) {
            const ptrdiff_t p = pixel + SIDE <= pixels ? pixel : pixels - SIDE;
            ROW x[SIDE];
            SQ(read_turned)(c + p * c_stride + i, c_stride, x);
            SQ(activate)(e, i, x);
            SQ(store)(x, out + i * cs + p * ps, cs, ps);
        }
    }
}

/* The epilogue for pixels that take turns: neighbours come from one tile of sums after another. SIDE channels at least, and SIDE
 * pixels unless lanes can be masked. */
static void SQ(weave)(const fc_epilogue *e, const void *const *c, ptrdiff_t tiles, ptrdiff_t c_stride, ptrdiff_t pixels,
                      ptrdiff_t channels, T *out)
{
    const ptrdiff_t cs = e->channel_stride;
    for (ptrdiff_t pixel = 0; pixel < pixels; pixel += SIDE) {
        const ptrdiff_t p = pixel + SIDE <= pixels || pixels < SIDE ? pixel : pixels - SIDE;
        const T *rows[SIDE];
        for (ptrdiff_t m = 0, row = p / tiles, tile = p % tiles; m < SIDE; m++) {
            rows[m] = m < pixels ? (const T *)c[tile] + row * c_stride : rows[0];
            tile = tile + 1 < tiles ? tile + 1 : 0;
            row += tile == 0;
        }
        for (ptrdiff_t channel = 0; channel < channels; channel += SIDE) {
            const ptrdiff_t i = channel + SIDE <= channels ? channel : channels - SIDE;
            ROW x[SIDE];
            SQ(read_anywhere)(rows, i, x);
            SQ(activate)(e, i, x);
#if defined(MASKED_STORE) && SIDE > 4
            if (pixels < SIDE) {
                UNROLL for (int n = 0; n < SIDE; n++)
                    MASKED_STORE(out + (i + n) * cs, (1u << pixels) - 1, x[n]);
                continue;
            }
#endif
            SQ(store)(x, out + i * cs + p, cs, 1);
        }
    }
}

#undef PARTS
#undef SECOND_PART
#undef THIRD_PART
#undef FOURTH_PART
#undef LAST_PARTS
#undef READ_TURNED
#undef SQ
#undef ROW
#undef UPPER
#undef LOWER
#undef LANES_4
#undef LANES_8
#undef LANES_16
#undef ALL_LANES
#undef STEP
