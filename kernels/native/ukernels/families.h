/* The float32 and the float64 family of the instruction set that the including file defines by
 *   ISA           its name, as FASTCONV_ISA has it
 *   VECTOR_BYTES  bytes in a vector register
 *   TILE_ROWS     pixels of the register tile: TILE_ROWS x 2 accumulators, 2 weights and a broadcast fill the registers, and
 *                 one pointer for each row must fit into the general registers
 *   EVEN_ROWS     the same of one whose pixels are evenly spaced, which takes fewer of those
 */
#include <math.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "ukernels.h"

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define UNROLL_MORE _Pragma("unroll")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_MORE _Pragma("GCC unroll 32")
#if __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__((a) < (b))){__VA_ARGS__})
#endif
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FUSED 1
#else
#define FUSED 0
#endif

/* GCC likes to put a sum where a factor of it was, and moves it back later: with 64-byte vectors a third more instructions in the
 * tile's loop. It can't where the factor is needed later; this needs it, and is no instruction. */
#ifdef __AVX512F__
#define NEEDED(x) __asm__("" : : "v"(x))
#else
#define NEEDED(x) (void)(x)
#endif

/* A vector that is loaded once, for all that use it: GCC would rather load it again for each. This is no instruction, either. */
#ifdef __AVX512F__
#define HELD(x) __asm__("" : "+v"(x))
#else
#define HELD(x) (void)(x)
#endif

/* An address or a distance of which the compiler is not to know how it came about. */
#define HIDDEN(x) __asm__("" : "+r"(x))

/* A vector of which the compiler is not to know how it came about. */
#if defined(__AVX512F__)
#define OPAQUE(x) HELD(x)
#elif defined(__SSE2__)
#define OPAQUE(x) __asm__("" : "+x"(x))
#else
#define OPAQUE(x) (void)(x)
#endif

/* Loads and stores of some lanes, where there are such. */
#ifdef __AVX512F__
#define MASKED_LOAD(mask, from) PASTE(_mm512_maskz_loadu_, SUFFIX)(mask, from)
#define MASKED_STORE(to, mask, from) PASTE(_mm512_mask_storeu_, SUFFIX)(to, mask, from)
#define SPREAD_LOAD(mask, from) PASTE(_mm512_maskz_expandloadu_, SUFFIX)(mask, from) /* neighbours, to lanes that are apart */
#endif

/* The same under a vector of masks, all ones or all zeros for each lane. */
#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>
#define LANES_LOAD(mask, from) PASTE(_mm256_maskload_, SUFFIX)(from, (__m256i)(mask))
#define LANES_STORE(to, mask, from) PASTE(_mm256_maskstore_, SUFFIX)(to, (__m256i)(mask), from)
#endif

/* Vectors of several parts of 16 bytes: the first from memory, and one with part number n from memory. */
#ifdef __AVX__
#include <immintrin.h>
#define PART_AT(from) _mm_loadu_si128((const __m128i *)(from))
#endif
#ifdef __AVX512F__
#define FIRST_PART(from) _mm512_castsi128_si512(PART_AT(from))
#define PUT_PART(x, from, n) _mm512_inserti32x4((__m512i)(x), PART_AT(from), n)
#elif defined(__AVX__)
#define FIRST_PART(from) _mm256_castsi128_si256(PART_AT(from))
#define PUT_PART(x, from, n) _mm256_inserti128_si256((__m256i)(x), PART_AT(from), n)
#endif

/* A store of 16 bytes, to an address that is a multiple of them, for which no cache line is read. */
#ifdef __SSE2__
#include <emmintrin.h>
#define STREAMS 1
#define STREAM_16(to, from) _mm_stream_si128((__m128i *)(to), _mm_loadu_si128((const __m128i *)(from)))
#else
#define STREAMS 0
#define STREAM_16(to, from) memcpy(to, from, 16)
#endif

/* Which of 64 bytes are among the n first. */
#ifdef __AVX512BW__
#define FIRST_BYTES(n) ((n) < 64 ? ((__mmask64)1 << (n)) - 1 : ~(__mmask64)0)
#else
#define FIRST_BYTES(n) 0
#endif

/* n bytes, often fewer than a vector's; `first` is FIRST_BYTES(n), or of what is left of n behind whole vectors. `widest` is a constant
 * where this is inlined, n at least where n <= 64: a narrow vector seldom reaches into two lines. */
static inline __attribute__((always_inline)) void copy_some(ptrdiff_t n, uint64_t first, const int widest, const char *from, char *to)
{
#ifdef __AVX512BW__
    if (widest == 16)
        _mm_mask_storeu_epi8(to, (__mmask16)first, _mm_maskz_loadu_epi8((__mmask16)first, from));
    else if (widest == 32)
        _mm256_mask_storeu_epi8(to, (__mmask32)first, _mm256_maskz_loadu_epi8((__mmask32)first, from));
    else {
        for (; n > 64; n -= 64, from += 64, to += 64)
            _mm512_storeu_si512(to, _mm512_loadu_si512(from));
        _mm512_mask_storeu_epi8(to, first, _mm512_maskz_loadu_epi8(first, from));
    }
#else
    (void)first, (void)widest;
#define LAST_PIECE(size)                                \
    if (n >= size) {                                    \
        for (ptrdiff_t i = 0; i + size < n; i += size)  \
            memcpy(to + i, from + i, size);             \
        memcpy(to + n - size, from + n - size, size);   \
        return;                                         \
    }
    LAST_PIECE(32)
    LAST_PIECE(16)
    LAST_PIECE(8)
    LAST_PIECE(4)
    LAST_PIECE(1)
#undef LAST_PIECE
#endif
}

static inline __attribute__((always_inline)) void copy_some_rows(ptrdiff_t rows, ptrdiff_t n, const int widest, const char *from,
                                                                 ptrdiff_t from_step, char *to, ptrdiff_t to_step)
{
    const uint64_t first = FIRST_BYTES(n > 64 ? (n - 1) % 64 + 1 : n);
    for (ptrdiff_t y = 0; y < rows; y++, from += from_step, to += to_step)
        copy_some(n, first, widest, from, to);
}

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define SQUARES(name, side) PASTE(PASTE(FC(name), _x), side)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

#define T float
#define T_BYTES 4
#define T_INT int32_t
#define SUFFIX ps
#define FC(name) PASTE(fc_f32_##name##__, ISA)
#include "family.h"
#undef T
#undef T_BYTES
#undef T_INT
#undef SUFFIX
#undef FC

#define T double
#define T_BYTES 8
#define T_INT int64_t
#define SUFFIX pd
#define FC(name) PASTE(fc_f64_##name##__, ISA)
#include "family.h"
#undef T
#undef T_BYTES
#undef T_INT
#undef SUFFIX
#undef FC

const fc_isa PASTE(fc_isa_, ISA) = {
    .name = TEXT(ISA),
    .f32 = &PASTE(fc_f32_table__, ISA),
    .f64 = &PASTE(fc_f64_table__, ISA),
};
