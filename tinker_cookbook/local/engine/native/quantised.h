/* Frozen matrices in 8 or 4 bits, which are expanded to the format of the products while they are used.
 *
 * A panel [inputs, PANEL] is cut into blocks of GROUP inputs. A block is PANEL scales in bfloat16, one for
 * each output, and then the numbers of its inputs. For products in float32 these are in two's complement:
 *
 *     8 bits: [GROUP, PANEL] bytes
 *     4 bits: [GROUP / 2, PANEL] bytes; the lower half of a byte is the even input, the upper half the odd
 *
 * For products of pairs they are [GROUP / RUN, PANEL, 2] words of 32 bits. A run of RUN inputs (8 in 8 bits,
 * 16 in 4 bits) has two words for each output, one with its even and one with its odd inputs. A number is
 * stored without sign, with half of the range added; number j of a word is at bit FIRST_BIT + bits * j, where
 * bits beyond the last continue at bit 0.
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

#ifdef PAIRS
#define RUN(bits) (64 / (bits))
#define FIRST_BIT(bits) ((bits) == 8 ? 1 : 5)
#define HALF_RANGE(bits) (1 << ((bits) - 1))

/* Neighbouring lanes become pairs, LANES / 2 of them from each half of an array. */
#if LANES == 16
static const uvec TWICE[2] = {{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7},
                              {8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15}};
#elif LANES == 8
static const uvec TWICE[2] = {{0, 0, 1, 1, 2, 2, 3, 3}, {4, 4, 5, 5, 6, 6, 7, 7}};
#else
static const uvec TWICE[2] = {{0, 0, 1, 1}, {2, 2, 3, 3}};
#endif

/* The scales of LANES outputs in one block, and what else is the same for all of its inputs. Vector 0 belongs
 * to the first half of the outputs, vector 1 to the second; each output has two lanes. */
typedef struct {
    vec scale[2];
    vec offset[2][4]; /* see `scaled` */
} Scales;

/* Masks that cut numbers out of a word; see `scaled`. They stay in registers. */
typedef struct {
    uvec mask[4], power[4];
} Cutter;

#if LANES == 16 && defined(__AVX512BF16__)
/* A number u in the mantissa of 2^(23 - p), from bit p on, makes it 2^(23 - p) + u. */
#define BIT(bits, j) (FIRST_BIT(bits) + (bits) * (j))
#define POWER(bits, j) (1 << (23 - BIT(bits, j)))

/* Return number j of each word, times its scale: (power + u) * scale - (power + half range) * scale in one
 * instruction. All of its terms, and the sum, are exact in float32: the longest has 16 bits and the scale 8. */
INLINE vec scaled(uvec words, const int half, const int j, const int bits, const Cutter *cutter,
                  const Scales *scales) {
    const int count = 16 / bits, at = j % count;
    if (j >= count) words = (uvec)_mm512_rol_epi32((__m512i)words, 16);
    vec number = (vec)_mm512_ternarylogic_epi32((__m512i)words, (__m512i)cutter->mask[at],
                                                (__m512i)cutter->power[at], 0xea); /* (a & b) | c */
    return FUSED(number, scales->scale[half], scales->offset[half][at]);
}

INLINE void set_cutter(Cutter *cutter, const int bits) {
    for (int j = 0; j < 16 / bits; j++) {
        cutter->mask[j] = (((1u << bits) - 1) << BIT(bits, j)) | (uvec){0};
        cutter->power[j] = (uvec)splat((float)POWER(bits, j));
        IN_REGISTER(cutter->mask[j]); /* the compiler would make them again for every number */
        IN_REGISTER(cutter->power[j]);
    }
}

INLINE void set_offsets(Scales *scales, const int bits) {
    for (int half = 0; half < 2; half++)
        for (int j = 0; j < 16 / bits; j++)
            scales->offset[half][j] =
                scales->scale[half] * splat(-(float)(POWER(bits, j) + HALF_RANGE(bits)));
}

/* Round weights, the even and odd one of an output next to each other, to pairs. */
INLINE uvec round_neighbours(vec lower, vec upper) {
    return (uvec)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower);
}
#else
INLINE vec scaled(uvec words, const int half, const int j, const int bits, const Cutter *cutter,
                  const Scales *scales) {
    (void)cutter;
    const int at = (FIRST_BIT(bits) + bits * j) % 32;
    uvec numbers = ((words >> at) | (words << (32 - at))) & ((1u << bits) - 1);
    return __builtin_convertvector((ivec)numbers - HALF_RANGE(bits), vec) * scales->scale[half];
}

INLINE void set_cutter(Cutter *cutter, const int bits) { (void)cutter, (void)bits; }
INLINE void set_offsets(Scales *scales, const int bits) { (void)scales, (void)bits; }

#if LANES == 16
static const uvec EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif LANES == 8
static const uvec EVEN = {0, 2, 4, 6, 8, 10, 12, 14};
#else
static const uvec EVEN = {0, 2, 4, 6};
#endif
typedef uint64_t lvec __attribute__((vector_size(4 * LANES)));

INLINE uvec round_neighbours(vec lower, vec upper) {
    lvec low = (lvec)round_bits(lower), high = (lvec)round_bits(upper);
    return __builtin_shuffle((uvec)(low | (low >> 16)), (uvec)(high | (high >> 16)), EVEN);
}
#endif

/* Read the scales of LANES outputs. */
INLINE void load_scales(const char *block, const int bits, Scales *scales) {
    uvec halves = __builtin_convertvector(*(const halves_any *)block, uvec) << 16;
    for (int half = 0; half < 2; half++)
        scales->scale[half] = (vec)__builtin_shuffle(halves, TWICE[half]);
    set_offsets(scales, bits);
}

/* Return pair j of LANES outputs, rounded; `words` are those of their run. */
INLINE uvec weight_pairs(const uvec *words, const int j, const int bits, const Cutter *cutter,
                         const Scales *scales) {
    return round_neighbours(scaled(words[0], 0, j, bits, cutter, scales),
                            scaled(words[1], 1, j, bits, cutter, scales));
}

/* Read the words of LANES outputs in run `run`, from output `c` on. */
INLINE void load_run(const char *block, int64_t run, int c, uvec *words) {
    const uint32_t *at = (const uint32_t *)(const void *)(block + 2 * PANEL) + (run * PANEL + c) * 2;
    words[0] = (uvec)load_pairs(at);
    words[1] = (uvec)load_pairs(at + LANES);
}

/* Expand inputs `first` to `end` (even numbers) of one block. */
INLINE void expand_outputs(uint32_t *to, const char *block, int c, const int first, const int end,
                           const int bits, const Cutter *cutter) {
    Scales scales;
    load_scales(block + 2 * c, bits, &scales);
    for (int k = first / RUN(bits) * RUN(bits); k < end; k += RUN(bits)) {
        uvec words[2];
        load_run(block, k / RUN(bits), c, words);
#pragma GCC unroll 8
        for (int j = 0; j < RUN(bits) / 2; j++) {
            int at = k + 2 * j;
            if (at < first || at >= end) continue;
            *(uvec_any *)(to + (at - first) / 2 * PANEL + c) =
                weight_pairs(words, j, bits, cutter, &scales);
        }
    }
}

INLINE void expand_block(uint32_t *to, const char *block, int64_t first, int64_t count,
                         const int bits) {
    Cutter cutter;
    set_cutter(&cutter, bits);
    for (int c = 0; c < PANEL; c += LANES) {
        if (count == GROUP)
            expand_outputs(to, block, c, 0, GROUP, bits, &cutter);
        else
            expand_outputs(to, block, c, (int)first, (int)(first + count), bits, &cutter);
    }
}
#else
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

/* Write the weights of two inputs, rounded to bfloat16, as float32; the second only if it is wanted. */
INLINE void put_weights(float *to, int64_t k, int64_t count, vec even, vec odd) {
    store(to + k * PANEL, (vec)(round_bits(even) << 16));
    if (k + 1 < count) store(to + (k + 1) * PANEL, (vec)(round_bits(odd) << 16));
}

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
#endif

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
