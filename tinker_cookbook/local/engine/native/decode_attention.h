/* Attention of tokens to the earlier tokens of their sequences, for decode_kernels.c, and for training in
 * bfloat16, where both must give the same bits (pair_attention.c).
 *
 * Sums run in the order of positions, wherever the keys and values are stored.
 */
#ifndef DECODE_ATTENTION_H
#define DECODE_ATTENTION_H
#include "pairs.h"

/* The format of keys and values in memory. With PAIRS they are bfloat16; training in bfloat16 has the same
 * numbers in float32. */
#ifdef PAIRS
typedef uint16_t Stored;
INLINE vec load_stored(const Stored *p) { return expand_half(p); }
INLINE float stored_number(Stored number) { return expand_number(number); }
#else
typedef float Stored;
INLINE vec load_stored(const Stored *p) { return load(p); }
INLINE float stored_number(Stored number) { return number; }
#endif

/* The keys and values of one key head of one sequence: [positions, dim] each. */
typedef struct {
    /* The first `split` positions are read from memory that other sequences read too. */
    const Stored *begin_keys, *begin_values;
    const Stored *keys, *values; /* for the other positions, counted from the first of all */
    int64_t split;
} Past;

/* Tokens that are computed together: memory that several of them read is read once. */
#define SPAN 4
/* Query heads that are computed together. */
#define SPAN_HEADS 3
/* Positions whose values stay in the first-level cache for all tokens of a span. */
#define VALUES_BLOCK 64

/* One token's query heads and the positions that they attend to. */
typedef struct {
    const float *q;
    float *out;        /* may be `q`, whose values are then lost */
    uint16_t *rounded; /* the same in bfloat16, or NULL */
    float *lse;        /* of the scores of each head, or NULL */
    Past past;
    int64_t length; /* number of positions, including its own */
    /* Memory to fetch into the cache meanwhile: its own values from position `fetch_from` on, and the keys of
     * positions [ahead_from, ahead_to) of `ahead`, which this thread will probably read next. */
    int64_t fetch_from;
    const Stored *ahead;
    int64_t ahead_from, ahead_to;
} Looking;

/* Compute the scores of G query heads with N keys. */
INLINE void score_keys(const int G, const int N, const float *q, const Stored *keys, int64_t dim,
                       float *scores, int64_t scores_stride) {
    vec sum[3][4];
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) sum[g][n] = (vec){0};
    int64_t k = 0;
    for (; k + LANES <= dim; k += LANES) {
        vec value[3];
        for (int g = 0; g < G; g++) {
            value[g] = load(q + g * dim + k);
            IN_REGISTER(value[g]);
        }
        for (int n = 0; n < N; n++) {
            vec part = load_stored(keys + n * dim + k);
            IN_REGISTER(part);
            for (int g = 0; g < G; g++) sum[g][n] = FUSED(value[g], part, sum[g][n]);
        }
    }
    for (int g = 0; g < G; g++) {
        float *row = scores + g * scores_stride;
        if (N == 4) {
            sum_lanes_of_4(sum[g], row);
        } else {
            for (int n = 0; n < N; n++) row[n] = sum_lanes(sum[g][n]);
        }
        for (int64_t i = k; i < dim; i++)
            for (int n = 0; n < N; n++) row[n] += q[g * dim + i] * stored_number(keys[n * dim + i]);
    }
}

/* Turn a row of scores into weights exp(factor (score - highest)); return 1 / their sum. Write the
 * logarithm of the sum of exp(factor score), unless `lse` is NULL. */
INLINE float weigh(float *row, int64_t length, float factor, float *lse) {
    for (int64_t p = length; p < length + LANES; p++) row[p] = -INFINITY;
    vec most = load(row);
    for (int64_t p = LANES; p < length; p += LANES) most = larger_of(most, load(row + p));
    float highest = largest_lane(most);
    vec total = {0};
    for (int64_t p = 0; p < length; p += LANES) {
        vec weight = exp_vec((load(row + p) - splat(highest)) * splat(factor));
        store(row + p, weight);
        total += weight;
    }
    float sum = sum_lanes(total);
    if (lse) *lse = highest * factor + logf(sum);
    return 1.0f / sum;
}

/* Fetch `count` numbers of a row into the cache. */
INLINE void fetch_row(const Stored *at, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(Stored)) PREFETCH(at + i);
}

/* Add the weighted values of positions [from, to) to C vectors of G query heads, which begin at number
 * `k` of a head. `values` points to the first position. */
INLINE void mix_values(const int G, const int C, const Looking *token, const Stored *values,
                       int64_t k, int64_t from, int64_t to, const float *weights,
                       int64_t weights_stride, int64_t dim) {
    float *out = token->out;
    vec sum[3][8];
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++)
            sum[g][c] = from ? load(out + g * dim + k + c * LANES) : (vec){0};
    values += k;
    for (int64_t p = from; p < to; p++, values += dim) {
        vec weight[3];
        for (int g = 0; g < G; g++) weight[g] = splat(weights[g * weights_stride + p]);
        if (C > 1 && p >= token->ahead_from && p < token->ahead_to)
            fetch_row(token->ahead + p * dim + k, C * LANES);
        for (int c = 0; c < C; c++) {
            vec part = load_stored(values + c * LANES);
            if (G > 1) IN_REGISTER(part);
            for (int g = 0; g < G; g++) sum[g][c] = FUSED(weight[g], part, sum[g][c]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) store(out + g * dim + k + c * LANES, sum[g][c]);
}

/* Add the weighted values of positions [from, to) to all numbers of G query heads. */
INLINE void mix_block(const int G, const Looking *token, const Stored *values, int64_t from,
                      int64_t to, const float *weights, int64_t weights_stride, int64_t dim) {
    float *out = token->out;
    const int C = G == 1 ? 8 : 4;
    int64_t k = 0;
    for (; k + C * LANES <= dim; k += C * LANES)
        mix_values(G, C, token, values, k, from, to, weights, weights_stride, dim);
    for (; k + LANES <= dim; k += LANES)
        mix_values(G, 1, token, values, k, from, to, weights, weights_stride, dim);
    for (; k < dim; k++)
        for (int g = 0; g < G; g++) {
            float sum = from ? out[g * dim + k] : 0;
            for (int64_t p = from; p < to; p++)
                sum += weights[g * weights_stride + p] * stored_number(values[(p - from) * dim + k]);
            out[g * dim + k] = sum;
        }
}

INLINE const Stored *keys_at(const Past *past, int64_t position, int64_t dim) {
    return (position < past->split ? past->begin_keys : past->keys) + position * dim;
}

INLINE const Stored *values_at(const Past *past, int64_t position, int64_t dim) {
    return (position < past->split ? past->begin_values : past->values) + position * dim;
}

/* Attend with G query heads of up to SPAN tokens that share one key head. Every `split` is a multiple of
 * four. `factor` multiplies the scores. */
INLINE void attend_span(const int G, const Looking *tokens, int64_t count, int64_t dim, float factor,
                        float *scores, int64_t stride) {
    int64_t longest = 0;
    for (int64_t t = 0; t < count; t++)
        longest = tokens[t].length > longest ? tokens[t].length : longest;
    for (int64_t p = 0; p < longest; p += 4) {
        for (int64_t t = 0; t < count; t++) {
            const Looking *token = &tokens[t];
            float *row = scores + t * G * stride;
            if (p >= token->fetch_from && p < token->length)
                fetch_row(values_at(&token->past, p, dim), 4 * dim);
            if (p + 4 <= token->length)
                score_keys(G, 4, token->q, keys_at(&token->past, p, dim), dim, row + p,
                           stride);
            else
                for (int64_t i = p; i < token->length; i++)
                    score_keys(G, 1, token->q, keys_at(&token->past, i, dim), dim, row + i,
                               stride);
        }
    }
    float inverse[SPAN * SPAN_HEADS];
    for (int64_t row = 0; row < count * G; row++) {
        const Looking *token = &tokens[row / G];
        inverse[row] = weigh(scores + row * stride, token->length, factor,
                             token->lse ? token->lse + row % G : 0);
    }
    for (int64_t p = 0; p < longest;) {
        int64_t end = p + VALUES_BLOCK;
        for (int64_t t = 0; t < count; t++)
            if (p < tokens[t].past.split && tokens[t].past.split < end) end = tokens[t].past.split;
        for (int64_t t = 0; t < count; t++) {
            const Looking *token = &tokens[t];
            const Stored *values = values_at(&token->past, p, dim);
            int64_t to = end < token->length ? end : token->length;
            if (p < to) mix_block(G, token, values, p, to, scores + t * G * stride, stride, dim);
        }
        p = end;
    }
    for (int64_t row = 0; row < count * G; row++) {
        float *out = tokens[row / G].out + row % G * dim;
        int64_t k = 0;
        for (; k + LANES <= dim; k += LANES) store(out + k, load(out + k) * splat(inverse[row]));
        for (; k < dim; k++) out[k] *= inverse[row];
        if (tokens[row / G].rounded) round_row(tokens[row / G].rounded + row % G * dim, out, dim);
    }
}

/* Common head sizes are constants for the compiler, which is nearly twice as fast. */
static void attend_heads(int heads, const Looking *tokens, int64_t count, int64_t dim, float factor,
                         float *scores, int64_t stride) {
    switch (heads * 1000 + dim) {
#define CASE(G, D) \
    case G * 1000 + D: attend_span(G, tokens, count, D, factor, scores, stride); return;
        CASE(1, 64) CASE(2, 64) CASE(3, 64) CASE(1, 128) CASE(2, 128) CASE(3, 128)
#undef CASE
    }
    if (heads == 1) attend_span(1, tokens, count, dim, factor, scores, stride);
    if (heads == 2) attend_span(2, tokens, count, dim, factor, scores, stride);
    if (heads == 3) attend_span(3, tokens, count, dim, factor, scores, stride);
}

/* Attend with all `shared` query heads of one key head, up to SPAN_HEADS at a time. */
static void attend_group(Looking *tokens, int64_t count, int64_t shared, int64_t dim, float factor,
                         float *scores, int64_t stride) {
    for (int64_t g = 0; g < shared;) {
        int64_t left = shared - g;
        int now = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1; /* four are two and two */
        attend_heads(now, tokens, count, dim, factor, scores, stride);
        for (int64_t i = 0; i < count; i++) {
            tokens[i].q += now * dim;
            tokens[i].out += now * dim;
            if (tokens[i].rounded) tokens[i].rounded += now * dim;
            if (tokens[i].lse) tokens[i].lse += now;
        }
        g += now;
    }
}

#endif
