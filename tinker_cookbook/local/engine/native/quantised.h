/* Frozen matrices in 8 or 4 bits, which are expanded to the format of the products while they are used.
 *
 * A panel [inputs, PANEL] is cut into blocks of GROUP inputs. A block is PANEL scales in bfloat16, one for
 * each output, and then the numbers of its inputs in two's complement:
 *
 *     8 bits: [GROUP, PANEL] bytes
 *     4 bits: [GROUP / 2, PANEL] bytes; the lower half of a byte is the even input, the upper half the odd
 *
 * A weight is scale * number, rounded once to bfloat16, in every instruction set and in both formats of
 * the products. So all results have the bits that they have with a bfloat16 matrix of these weights.
 * The last block of a panel is filled up with zeros.
 */
#ifndef QUANTISED_H
#define QUANTISED_H
#include "pairs.h"
#ifdef PAIRS
#include "compact.h"
#endif

#define GROUP 32

typedef int8_t bytes_any __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t halves_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE int64_t block_bytes(int64_t bits) { return PANEL * (2 + GROUP * bits / 8); }

/* Return the bytes of a panel with `inputs` inputs. */
INLINE int64_t quantised_panel_bytes(int64_t inputs, int64_t bits) {
#ifdef PAIRS
    if (bits == COMPACT_BITS) return compact_panel_bytes(inputs);
#endif
    return (inputs + GROUP - 1) / GROUP * block_bytes(bits);
}

INLINE ivec load_bytes(const char *p) {
#if LANES == 16
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)p));
#elif LANES == 8
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i_u *)p));
#else
    return __builtin_convertvector(*(const bytes_any *)p, ivec);
#endif
}

/* Load the numbers of inputs k and k + 1 (k is even) of LANES outputs, times their scales. */
INLINE void load_weights(const char *numbers, int64_t k, const int bits, vec scale, vec *even,
                         vec *odd) {
    ivec first, second;
    if (bits == 8) {
        first = load_bytes(numbers + k * PANEL);
        second = load_bytes(numbers + (k + 1) * PANEL);
    } else {
        second = load_bytes(numbers + k / 2 * PANEL);
        first = (second << 28) >> 28;
        second >>= 4;
    }
    *even = __builtin_convertvector(first, vec) * scale;
    *odd = __builtin_convertvector(second, vec) * scale;
}

#ifdef PAIRS
#if LANES == 16 && defined(__AVX512BF16__)
static const uint16_t IN_TURNS[32] __attribute__((aligned(64))) = {
    0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif

/* Write the weights of two inputs as pairs. */
INLINE void put_weights(uint32_t *to, int64_t k, int64_t count, vec even, vec odd) {
    (void)count;
#if LANES == 16 && defined(__AVX512BF16__)
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    both = _mm512_permutexvar_epi16(_mm512_load_si512(IN_TURNS), both);
    _mm512_storeu_si512(to + k / 2 * PANEL, both);
#else
    *(uvec_any *)(to + k / 2 * PANEL) = round_bits(even) | (round_bits(odd) << 16);
#endif
}
#else
/* Write the weights of two inputs, rounded to bfloat16, as float32; the second only if it is wanted. */
INLINE void put_weights(float *to, int64_t k, int64_t count, vec even, vec odd) {
    store(to + k * PANEL, (vec)(round_bits(even) << 16));
    if (k + 1 < count) store(to + (k + 1) * PANEL, (vec)(round_bits(odd) << 16));
}
#endif

/* Expand `count` inputs of one block from input `first` on. */
INLINE void expand_block(Word *to, const char *block, int64_t first, int64_t count,
                         const int bits) {
    const char *numbers = block + 2 * PANEL;
    for (int c = 0; c < PANEL; c += LANES) {
        uvec halves = __builtin_convertvector(*(const halves_any *)(block + 2 * c), uvec);
        vec scale = (vec)(halves << 16);
        for (int64_t k = 0; k < count; k += 2) {
            vec even, odd;
            load_weights(numbers + c, first + k, bits, scale, &even, &odd);
            put_weights(to + c, k, count, even, odd);
        }
    }
}

/* Expand `count` inputs of a panel from input `from` (an even number) on: [count, PANEL] numbers, or
 * [count / 2, PANEL] pairs. Meanwhile memory `ahead` bytes later is fetched, unless that is 0. */
static void expand(Word *to, const char *panel, int64_t from, int64_t count, int64_t bits,
                   int64_t ahead) {
#ifdef PAIRS
    if (bits == COMPACT_BITS) {
        expand_compact(to, panel, from, count, ahead);
        return;
    }
#endif
    while (count > 0) {
        int64_t first = from % GROUP, num = GROUP - first < count ? GROUP - first : count;
        const char *block = panel + from / GROUP * block_bytes(bits);
        if (ahead)
            for (int64_t at = 0; at < block_bytes(bits); at += 64) PREFETCH(block + ahead + at);
        if (bits == 8)
            expand_block(to, block, first, num, 8);
        else
            expand_block(to, block, first, num, 4);
        to += WORDS(num) * PANEL, from += num, count -= num;
    }
}

#endif
