/* Attention of one token to its sequence's past, for decode_kernels.c.
 *
 * A token's numbers are summed in the order of positions, wherever the keys and values are read from.
 */
#ifndef DECODE_ATTENTION_H
#define DECODE_ATTENTION_H
#include "vectors.h"

/* The keys and values of one key head of one sequence: [positions, dim] each. */
typedef struct {
    /* The first `split` positions are read from a place that other sequences read too. */
    const float *begin_keys, *begin_values;
    const float *keys, *values; /* all others, counted from the first position */
    int64_t split;
} Past;

/* Scores of G query heads with N keys. */
INLINE void score_keys(const int G, const int N, const float *q, const float *keys, int64_t dim,
                       float factor, float *scores, int64_t scores_stride) {
    vec sum[3][4];
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) sum[g][n] = (vec){0};
    int64_t k = 0;
    for (; k + LANES <= dim; k += LANES) {
        vec part[4];
        for (int n = 0; n < N; n++) {
            part[n] = load(keys + n * dim + k);
            IN_REGISTER(part[n]);
        }
        for (int g = 0; g < G; g++) {
            vec value = load(q + g * dim + k);
            for (int n = 0; n < N; n++) sum[g][n] = FUSED(value, part[n], sum[g][n]);
        }
    }
    for (int g = 0; g < G; g++) {
        float total[4];
        if (N == 4)
            sum_lanes_of_4(sum[g], total);
        else
            for (int n = 0; n < N; n++) total[n] = sum_lanes(sum[g][n]);
        for (int n = 0; n < N; n++) {
            float rest = 0;
            for (int64_t i = k; i < dim; i++) rest += q[g * dim + i] * keys[n * dim + i];
            scores[g * scores_stride + n] = (total[n] + rest) * factor;
        }
    }
}

/* Turn a row of scores into weights exp(score - highest); returns 1 / their sum. */
INLINE float weigh(float *row, int64_t length) {
    for (int64_t p = length; p < length + LANES; p++) row[p] = -INFINITY;
    vec most = load(row);
    for (int64_t p = LANES; p < length; p += LANES) most = larger_of(most, load(row + p));
    float highest = largest_lane(most);
    vec total = {0};
    for (int64_t p = 0; p < length; p += LANES) {
        vec weight = exp_vec(load(row + p) - splat(highest));
        store(row + p, weight);
        total += weight;
    }
    return 1.0f / sum_lanes(total);
}

/* C vectors, from number `k`, of the weighted values of G query heads. */
INLINE void mix_values(const int G, const int C, const Past *past, int64_t k, int64_t length,
                       const float *weights, int64_t weights_stride, const float *inverse,
                       float *out, int64_t dim) {
    vec sum[3][8];
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) sum[g][c] = (vec){0};
    const float *values = past->begin_values + k;
    for (int64_t p = 0; p < length; p++, values += dim) {
        if (p == past->split) values = past->values + k + p * dim;
        vec weight[3];
        for (int g = 0; g < G; g++) weight[g] = splat(weights[g * weights_stride + p]);
        for (int c = 0; c < C; c++) {
            vec part = load(values + c * LANES);
            if (G > 1) IN_REGISTER(part);
            for (int g = 0; g < G; g++) sum[g][c] = FUSED(weight[g], part, sum[g][c]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++)
            store(out + g * dim + k + c * LANES, sum[g][c] * splat(inverse[g]));
}

/* Query heads of one token that share one key head. `split` is a multiple of four. */
INLINE void attend_group(const int G, const float *q, const Past *past, int64_t length, int64_t dim,
                         float *scores, int64_t scores_stride, float *out) {
    const int C = G == 1 ? 8 : 4;
    float factor = 1.0f / sqrtf((float)dim), inverse[3];
    int64_t p = 0, k = 0;
    for (; p + 4 <= length; p += 4) {
        const float *keys = (p < past->split ? past->begin_keys : past->keys) + p * dim;
        score_keys(G, 4, q, keys, dim, factor, scores + p, scores_stride);
    }
    for (; p < length; p++)
        score_keys(G, 1, q, past->keys + p * dim, dim, factor, scores + p, scores_stride);
    for (int g = 0; g < G; g++) inverse[g] = weigh(scores + g * scores_stride, length);
    for (; k + C * LANES <= dim; k += C * LANES)
        mix_values(G, C, past, k, length, scores, scores_stride, inverse, out, dim);
    for (; k + LANES <= dim; k += LANES)
        mix_values(G, 1, past, k, length, scores, scores_stride, inverse, out, dim);
    for (; k < dim; k++)
        for (int g = 0; g < G; g++) {
            float sum = 0;
            for (p = 0; p < length; p++) {
                const float *values = p < past->split ? past->begin_values : past->values;
                sum += scores[g * scores_stride + p] * values[p * dim + k];
            }
            out[g * dim + k] = sum * inverse[g];
        }
}

#endif
