/* The elementwise parts of training on a CPU, each in one pass over its operands; all of it in float32.
 *
 * Rows are tokens. A row of an operand may be part of a wider row: rows are then `stride` floats apart.
 * `model/ops.py` computes the same with torch and explains the formulas.
 */
#include "pairs.h"
#include "rows.h"

/* Use threads only if there are enough rows to repay waking them. They take rows in turns, so that a thread
 * that another program interrupts does not hold up the others for long. */
#define FOR_ROWS                                                                                 \
    _Pragma("omp parallel for schedule(dynamic, 64) num_threads((int)threads) if (rows >= 128)") \
    for (int64_t t = 0; t < rows; t++)

/* Write silu(gate) * up of [rows, 2 inner] into [rows, inner]. */
void swiglu_forward(float *out, int64_t out_stride, const float *gate_up, int64_t rows,
                    int64_t inner, int64_t threads) {
    FOR_ROWS {
        const float *gate = gate_up + t * 2 * inner, *up = gate + inner;
        float *to = out + t * out_stride;
        int64_t k = 0;
        for (; k + LANES <= inner; k += LANES)
            store(to + k, swiglu(load(gate + k), load(up + k)));
        for (; k < inner; k++) to[k] = swiglu_of_one(gate[k], up[k]);
    }
}

/* Write the gradient [rows, 2 inner], and the forward value [rows, inner] again. */
void swiglu_gradient(float *result, float *activation, const float *grad, int64_t grad_stride,
                     const float *gate_up, int64_t rows, int64_t inner, int64_t threads) {
    FOR_ROWS {
        const float *gate = gate_up + t * 2 * inner, *up = gate + inner;
        const float *from = grad + t * grad_stride;
        float *gate_grad = result + t * 2 * inner, *up_grad = gate_grad + inner;
        float *value = activation + t * inner;
        int64_t k = 0;
        for (; k + LANES <= inner; k += LANES) {
            vec g = load(gate + k), u = load(up + k), d = load(from + k);
            vec s = sigmoid(g), silu = g * s;
            store(value + k, silu * u);
            store(up_grad + k, d * silu);
            store(gate_grad + k, d * u * (s + silu - silu * s));
        }
        for (; k < inner; k++) {
            float s = 1.0f / (1.0f + expf(-gate[k])), silu = gate[k] * s;
            value[k] = silu * up[k];
            up_grad[k] = from[k] * silu;
            gate_grad[k] = from[k] * up[k] * (s + silu - silu * s);
        }
    }
}

/* Write 1 / sqrt(mean(x^2) + eps) of every row, as the decoder computes it. */
void inverse_rms(float *inverse, const float *x, int64_t rows, int64_t size, float eps,
                 int64_t threads) {
    FOR_ROWS inverse[t] = inverse_rms_of(x + t * size, size, eps);
}

/* Write x * inverse * weight, [rows, size]; `inverse` has one number per row. */
void norm_forward(float *out, int64_t out_stride, const float *x, const float *inverse,
                  const float *weight, int64_t rows, int64_t size, int64_t threads) {
    FOR_ROWS {
        const float *from = x + t * size;
        float *to = out + t * out_stride;
        norm_row(to, from, weight, inverse[t], size);
    }
}

/* Write the gradient of the norm's input, [rows, size], plus `add` unless that is NULL. */
void norm_gradient(float *out, const float *grad, int64_t grad_stride, const float *x,
                   const float *inverse, const float *weight, const float *add, int64_t rows,
                   int64_t size, int64_t threads) {
    FOR_ROWS {
        const float *from = grad + t * grad_stride, *value = x + t * size;
        float *to = out + t * size;
        vec sums = {0};
        float sum = 0;
        int64_t k = 0;
        for (; k + LANES <= size; k += LANES)
            sums = FUSED(load(from + k) * load(weight + k), load(value + k), sums);
        for (; k < size; k++) sum += from[k] * weight[k] * value[k];
        float scale = inverse[t];
        float slope = (sum_lanes(sums) + sum) / (float)size * scale * scale * scale;
        for (k = 0; k + LANES <= size; k += LANES) {
            vec result = load(from + k) * load(weight + k) * splat(scale);
            result -= load(value + k) * splat(slope);
            if (add) result += load(add + t * size + k);
            store(to + k, result);
        }
        for (; k < size; k++) {
            to[k] = from[k] * weight[k] * scale - value[k] * slope;
            if (add) to[k] += add[t * size + k];
        }
    }
}

typedef struct {
    int64_t rows, kv_heads, group, dim, threads;
    const int64_t *positions; /* [rows] */
    const float *cos, *sin;   /* [positions, dim]; the first half of each row is used */
    const float *q_norm, *k_norm; /* [dim], for split_heads; NULL without such norms */
    float eps;
    int64_t rounded; /* whether k and v become bfloat16 numbers, as the decoder stores them */
} Heads;

#define MAX_DIM 256

/* Norm a head if there is a weight for it, then rotate and scale it. */
INLINE void split_head(const Heads *heads, float *out, const float *x, const float *norm,
                       const float *cos, const float *sin, float scale) {
    float normed[MAX_DIM];
    int64_t dim = heads->dim;
    if (norm) {
        norm_row(normed, x, norm, inverse_rms_of(x, dim, heads->eps), dim);
        x = normed;
    }
    turn_head(out, x, cos, sin, dim / 2, scale, 1.0f);
}

/* From qkv [rows, (K G + 2 K) dim] to normed, rotated and scaled q [K, rows, G, dim], normed and rotated k [K, rows, dim]
 * and v [K, rows, dim]; all in float32. */
void split_heads(const Heads *heads, const float *qkv, float *q, float *k, float *v) {
    int64_t rows = heads->rows, kv = heads->kv_heads, group = heads->group, dim = heads->dim;
    int64_t width = (group + 2) * kv * dim, threads = heads->threads;
    float scale = 1.0f / sqrtf((float)dim);
    FOR_ROWS {
        const float *from = qkv + t * width;
        const float *cos = heads->cos + heads->positions[t] * dim;
        const float *sin = heads->sin + heads->positions[t] * dim;
        for (int64_t h = 0; h < kv; h++) {
            for (int64_t g = 0; g < group; g++)
                split_head(heads, q + ((h * rows + t) * group + g) * dim,
                           from + (h * group + g) * dim, heads->q_norm, cos, sin, scale);
            float *key = k + (h * rows + t) * dim, *value = v + (h * rows + t) * dim;
            split_head(heads, key, from + (kv * group + h) * dim, heads->k_norm, cos, sin, 1.0f);
            memcpy(value, from + (kv * group + kv + h) * dim, (size_t)dim * sizeof(float));
            if (heads->rounded) {
                round_floats(key, key, dim);
                round_floats(value, value, dim);
            }
        }
    }
}

/* From the gradients of q, k and v to that of qkv: split_heads in reverse, with rotations back. The
 * gradient of a rounded number is taken as that of the number. */
void join_heads(const Heads *heads, float *qkv, const float *q, const float *k, const float *v) {
    int64_t rows = heads->rows, kv = heads->kv_heads, group = heads->group, dim = heads->dim;
    int64_t half = dim / 2, width = (group + 2) * kv * dim, threads = heads->threads;
    float scale = 1.0f / sqrtf((float)dim);
    FOR_ROWS {
        float *to = qkv + t * width;
        const float *cos = heads->cos + heads->positions[t] * dim;
        const float *sin = heads->sin + heads->positions[t] * dim;
        for (int64_t h = 0; h < kv; h++) {
            for (int64_t g = 0; g < group; g++)
                turn_head(to + (h * group + g) * dim, q + ((h * rows + t) * group + g) * dim, cos, sin,
                     half, scale, -1.0f);
            turn_head(to + (kv * group + h) * dim, k + (h * rows + t) * dim, cos, sin, half, 1.0f, -1.0f);
            memcpy(to + (kv * group + kv + h) * dim, v + (h * rows + t) * dim,
                   (size_t)dim * sizeof(float));
        }
    }
}
