/* Pairs of bfloat16 numbers: the arithmetic of products in that format.
 *
 * A 32-bit word holds two neighbouring inputs, the even one in its lower half. One step of a sum is
 *
 *     sum = (sum + x_odd w_odd) + x_even w_even        each sum rounded to float32
 *
 * which is what VDPBF16PS computes. A product of two bfloat16 numbers is exact in float32, so steps with
 * and without fused multiply-adds give the same bits: products are equal on all processors (apart from sums
 * below 2^-126, which VDPBF16PS takes for 0).
 *
 * On ARM, BFMLALT multiplies the odd members and BFMLALB the even ones. They are fused multiply-adds that round
 * once, as FPCR says for float32, so they keep sums below 2^-126, too. BFDOT and BFMMLA multiply more numbers at
 * a time, but they add the products of a pair before the sum, and round to odd unless FPCR.EBF is set: other
 * bits, so they are not used.
 */
#ifndef PAIRS_H
#define PAIRS_H
#include "vectors.h"

#if LANES == 4 && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(GENERIC)
#define NEON_BF16
#endif

#define UPPER 0xffff0000u
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t hvec_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vec load_pairs(const void *words) { return (vec)*(const uvec_any *)words; }
INLINE vec splat_pair(uint32_t word) { return (vec)(word | (uvec){0}); }

/* Return sum + x . w for pairs x and w. */
INLINE vec add_pair(vec sum, vec x, vec w) {
#if LANES == 16 && defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#elif defined(NEON_BF16)
    sum = (vec)vbfmlaltq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)w);
    return (vec)vbfmlalbq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)w);
#else
    sum = FUSED((vec)((uvec)x & UPPER), (vec)((uvec)w & UPPER), sum);
    return FUSED((vec)((uvec)x << 16), (vec)((uvec)w << 16), sum);
#endif
}

/* Round to the nearest bfloat16, ties to even; the result is in the lower halves. */
INLINE uvec round_bits(vec v) {
    uvec bits = (uvec)v;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

INLINE uint16_t round_number(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE void store_rounded(uint16_t *to, vec v) {
#if LANES == 16 && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i_u *)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(NEON_BF16)
    *(hvec_any *)to = (hvec)vcvt_bf16_f32((float32x4_t)v);
#else
    *(hvec_any *)to = __builtin_convertvector(round_bits(v), hvec);
#endif
}

INLINE vec expand_half(const uint16_t *from) {
#if LANES == 16
    uvec bits = (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u *)from));
#elif LANES == 8
    uvec bits = (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u *)from));
#else
    uvec bits = __builtin_convertvector(*(const hvec_any *)from, uvec);
#endif
    return (vec)(bits << 16);
}

INLINE float expand_number(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Round a row and keep it in float32; may be in place. Has the numbers of round_row. */
INLINE void round_floats(float *to, const float *from, int64_t size) {
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) {
        uint16_t rounded[LANES];
        store_rounded(rounded, load(from + k));
        store(to + k, expand_half(rounded));
    }
    for (; k < size; k++) to[k] = expand_number(round_number(from[k]));
}

/* Round two vectors; the words hold the first in their lower halves and the second in the upper ones. */
INLINE uvec rounded_words(vec lower, vec upper) {
#if LANES == 16 && defined(__AVX512BF16__)
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)lower));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)upper));
    return (uvec)low | ((uvec)high << 16);
#elif defined(NEON_BF16)
    uint16x8_t low = (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)lower);
    uint16x8_t high = (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)upper);
    return (uvec)vzip1q_u16(low, high);
#else
    return round_bits(lower) | (round_bits(upper) << 16);
#endif
}

/* Round a row; an odd size is filled up with a zero, so that the row consists of pairs. */
INLINE void round_row(uint16_t *to, const float *from, int64_t size) {
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) store_rounded(to + k, load(from + k));
    for (; k < size; k++) to[k] = round_number(from[k]);
    if (size & 1) to[size] = 0;
}

#endif
