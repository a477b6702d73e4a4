/* Operations on one row, which training and decoding share: in bfloat16 both must give the same bits. */
#ifndef ROWS_H
#define ROWS_H
#include "vectors.h"

INLINE vec sigmoid(vec x) {
    ivec negative = x < (vec){0};
    vec minus_abs = (vec)((negative & (ivec)x) | (~negative & (ivec)(-x)));
    vec e = exp_vec(minus_abs); /* no overflow on either side */
    vec top = (vec)((negative & (ivec)e) | (~negative & (ivec)splat(1.0f)));
    return top / (splat(1.0f) + e);
}

INLINE vec swiglu(vec gate, vec up) { return gate * sigmoid(gate) * up; }
INLINE float swiglu_of_one(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

/* Return 1 / sqrt(mean(x^2) + eps). */
INLINE float inverse_rms_of(const float *x, int64_t size, float eps) {
    vec squares = {0};
    float rest = 0;
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) squares = FUSED(load(x + k), load(x + k), squares);
    for (; k < size; k++) rest += x[k] * x[k];
    return 1.0f / sqrtf((sum_lanes(squares) + rest) / (float)size + eps);
}

/* Write x * inverse * weight; may be in place. */
INLINE void norm_row(float *out, const float *x, const float *weight, float inverse, int64_t size) {
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES)
        store(out + k, load(x + k) * splat(inverse) * load(weight + k));
    for (; k < size; k++) out[k] = x[k] * inverse * weight[k];
}

/* Rotate one head and multiply it by `scale`; direction -1 rotates back. May be in place. */
INLINE void turn_head(float *out, const float *x, const float *cos, const float *sin, int64_t half,
                      float scale, float direction) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        vec c = load(cos + i) * splat(scale), s = load(sin + i) * splat(scale * direction);
        vec first = load(x + i), second = load(x + i + half);
        store(out + i, first * c - second * s);
        store(out + i + half, second * c + first * s);
    }
    for (; i < half; i++) {
        float c = cos[i] * scale, s = sin[i] * scale * direction, first = x[i], second = x[i + half];
        out[i] = first * c - second * s;
        out[i + half] = second * c + first * s;
    }
}

#endif
