/* Shared by all kernels: vectors of float32, their products and sums, and an exponential. */
#ifndef VECTORS_H
#define VECTORS_H
#include <math.h>
#include <stdint.h>
#include <string.h>

/* The cases of a switch over 1, 2 ... : a file defines CASE(n) and takes as many as it needs. */
#define CASES_TO_6 CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#define CASES_TO_10 CASES_TO_6 CASE(7) CASE(8) CASE(9) CASE(10)
#define CASES_TO_12 CASES_TO_10 CASE(11) CASE(12)

#if defined(GENERIC) /* no vector instructions by name: what the tests compare the others with */
#define LANES 4
#define FUSED(a, b, c) ((a) * (b) + (c))
#elif defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define FUSED(a, b, c) (vec) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define FUSED(a, b, c) (vec) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#define FUSED(a, b, c) (vec) vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b))
#else
#define LANES 4
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
/* A product and a sum are fused only where FUSED or fmaf is written (-ffp-contract=off). If the compiler
 * chose, the choice could differ between tile sizes, and so would the bits of a result. */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec_any *)p; }
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* Load two neighbouring vectors of a packed matrix in float32, or in bfloat16 if `half`. A bfloat16 is
 * the upper half of a float32. A 32-bit word holds one number of each vector: the lower half belongs to
 * the first vector, the upper half to the second. */
INLINE void load_pair(const void *w, int64_t index, const int half, vec *pair) {
    if (half) {
        uvec bits = *(const uvec_any *)((const uint16_t *)w + index);
        pair[0] = (vec)(bits << 16);
        pair[1] = (vec)(bits & 0xffff0000u);
    } else {
        pair[0] = load((const float *)w + index);
        pair[1] = load((const float *)w + index + LANES);
    }
}
INLINE void store(float *p, vec v) { *(vec_any *)p = v; }
INLINE vec splat(float s) { return s - (vec){0}; }

/* Keep a loaded vector in its register; reloading it for every product would halve the speed. */
#if defined(__AVX512F__) && !defined(GENERIC)
#define IN_REGISTER(v) __asm__("" : "+v"(v)) /* any of 32 registers */
#elif defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define IN_REGISTER(v) __asm__("" : "+w"(v))
#else
#define IN_REGISTER(v)
#endif

/* Fetch a cache line into the second-level cache; any address is allowed. */
#define PREFETCH(p) __builtin_prefetch((const void *)(p), 0, 2)

/* Return the square roots, correctly rounded. */
INLINE vec sqrt_vec(vec v) {
#if LANES == 16
    return (vec)_mm512_sqrt_ps((__m512)v);
#elif LANES == 8
    return (vec)_mm256_sqrt_ps((__m256)v);
#elif defined(__aarch64__) && !defined(GENERIC)
    return (vec)vsqrtq_f32((float32x4_t)v);
#else
    for (int i = 0; i < LANES; i++) v[i] = sqrtf(v[i]);
    return v;
#endif
}

/* Return the larger of each pair; NaN in `other` is ignored. */
INLINE vec larger_of(vec v, vec other) {
    ivec larger = other > v;
    return (vec)((larger & (ivec)other) | (~larger & (ivec)v));
}

INLINE float largest_lane(vec v) {
    float most = -INFINITY;
    for (int i = 0; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

INLINE float sum_lanes(vec v) {
    float a[LANES];
    memcpy(a, &v, sizeof a);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
}

/* Sum four vectors, each in the order of sum_lanes. */
INLINE void sum_lanes_of_4(const vec *v, float *out) {
#if LANES >= 8 && defined(__AVX2__)
    __m128 half[4];
    for (int i = 0; i < 4; i++) {
#if LANES == 16
        __m512d wide = (__m512d)v[i];
        __m256 part = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1)));
#else
        __m256 part = (__m256)v[i];
#endif
        half[i] = _mm_add_ps(_mm256_castps256_ps128(part), _mm256_extractf128_ps(part, 1));
    }
    __m128 first = _mm_add_ps(_mm_movelh_ps(half[0], half[1]), _mm_movehl_ps(half[1], half[0]));
    __m128 second = _mm_add_ps(_mm_movelh_ps(half[2], half[3]), _mm_movehl_ps(half[3], half[2]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(first, second, _MM_SHUFFLE(2, 0, 2, 0)),
                                  _mm_shuffle_ps(first, second, _MM_SHUFFLE(3, 1, 3, 1))));
#else
    for (int i = 0; i < 4; i++) out[i] = sum_lanes(v[i]);
#endif
}

/* exp(x) for x <= 0, with relative error 2e-7; results below 2^-126 become 0. Source of the
 * coefficients: expf of Cephes. */
INLINE vec exp_vec(vec x) {
    vec low = splat(-87.0f);
    ivec tiny = x < low;
    x = (vec)((tiny & (ivec)low) | (~tiny & (ivec)x));
    vec n = FUSED(x, splat(1.44269504088896341f), splat(12582912.0f));
    ivec exponent = (ivec)n - (ivec)splat(12582912.0f);
    n -= splat(12582912.0f);
    x = FUSED(n, splat(-0.693359375f), x);
    x = FUSED(n, splat(2.12194440e-4f), x);
    vec y = splat(1.9875691500e-4f);
    y = FUSED(y, x, splat(1.3981999507e-3f));
    y = FUSED(y, x, splat(8.3334519073e-3f));
    y = FUSED(y, x, splat(4.1665795894e-2f));
    y = FUSED(y, x, splat(1.6666665459e-1f));
    y = FUSED(y, x, splat(5.0000001201e-1f));
    y = FUSED(y, x * x, x) + splat(1.0f);
    vec scale = (vec)((exponent + 127) << 23);
    return (vec)(~tiny & (ivec)(y * scale));
}

#endif
