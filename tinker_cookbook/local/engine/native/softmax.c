/* Exponentials of logits and their sums, block by block, for draws and logprobs on a CPU.
 *
 * A row is read twice: for its largest logit and for the exponentials. A row's results do not depend on
 * other rows. `sampling/logits.py` computes the same with torch, and draws from the sums of `exp_blocks`
 * the same tokens as `draw_rows`.
 */
#include "vectors.h"

#define BLOCK 128

/* Return the largest number of a row; NaN is ignored. */
static float highest_of(const float *row, int64_t size) {
    vec most = splat(-INFINITY);
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) most = larger_of(most, load(row + k));
    float highest = largest_lane(most);
    for (; k < size; k++) highest = row[k] > highest ? row[k] : highest;
    return highest;
}

/* Write exp((row - highest) inverse) of one block and return the sum; places beyond `size` become 0. */
INLINE float exp_block(float *to, const float *row, int64_t size, float highest, float inverse) {
    float rest[BLOCK];
    if (size < BLOCK) {
        memcpy(rest, row, (size_t)size * sizeof(float));
        for (int64_t k = size; k < BLOCK; k++) rest[k] = -INFINITY;
        row = rest;
    }
    vec total = {0};
    for (int64_t k = 0; k < BLOCK; k += LANES) {
        vec weight = exp_vec((load(row + k) - splat(highest)) * splat(inverse));
        if (to) store(to + k, weight);
        total += weight;
    }
    return sum_lanes(total);
}

/* Write the exponentials of a row [blocks, BLOCK] (unless NULL) and their block sums; return the sum of
 * all, added in the order of the blocks. */
static double sum_blocks(float *weights, double *sums, const float *row, int64_t vocab, float highest,
                         float inverse) {
    double total = 0;
    for (int64_t b = 0; b * BLOCK < vocab; b++) {
        int64_t left = vocab - b * BLOCK;
        float *to = weights ? weights + b * BLOCK : 0;
        double sum = exp_block(to, row + b * BLOCK, left < BLOCK ? left : BLOCK, highest, inverse);
        total += sums[b] = sum;
    }
    return total;
}

/* Write for each row: weights [blocks, BLOCK] (unless NULL), their sums [blocks], and the logsumexp of
 * logit * inverse. `inverse` is NULL for ones. Rows of logits are `stride` floats apart. */
void exp_blocks(float *weights, double *sums, float *lse, const float *logits, int64_t stride,
                const float *inverse, int64_t rows, int64_t vocab, int64_t threads) {
    int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads) if (rows > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = logits + r * stride;
        float factor = inverse ? inverse[r] : 1.0f, highest = highest_of(row, vocab);
        float *to = weights ? weights + r * blocks * BLOCK : 0;
        double total = sum_blocks(to, sums + r * blocks, row, vocab, highest, factor);
        lse[r] = (float)((double)(highest * factor) + log(total));
    }
}

/* Return the place of the first running sum of `values` that exceeds `target`, or the last place. */
static int64_t first_above(const double *values, int64_t size, double target, double *before) {
    double sum = 0;
    for (int64_t k = 0; k < size; k++) {
        sum += values[k];
        *before = sum - values[k];
        if (sum > target) return k;
    }
    return size - 1;
}

/* Draw a token of one row by inverting its cumulative distribution: first the block, then the token in
 * it. `sums` are the block sums of the row, `total` is their sum. */
static int64_t invert(const float *row, int64_t vocab, float highest, float inverse, const double *sums,
                      double total, double uniform) {
    int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
    double before, weights[BLOCK], inner = 0, target = uniform * total;
    int64_t b = first_above(sums, blocks, target, &before), left = vocab - b * BLOCK;
    float block[BLOCK];
    exp_block(block, row + b * BLOCK, left < BLOCK ? left : BLOCK, highest, inverse);
    for (int64_t k = 0; k < BLOCK; k++) inner += weights[k] = block[k];
    /* The block's float32 sum and this float64 sum differ in the last bits. */
    double most = inner * (1 - 1e-12);
    target = target - before > most ? most : target - before;
    int64_t token = b * BLOCK + first_above(weights, BLOCK, target, &before);
    return token < vocab ? token : vocab - 1; /* NaN could point to the padding */
}

/* Draw one token per row at temperatures 1 / `inverse` (NULL for ones), and write its logprob at
 * temperature 1. `sums` is scratch memory [rows, blocks]. */
void draw_rows(int64_t *tokens, float *logprobs, double *sums, const float *logits, int64_t stride,
               const float *inverse, const double *uniforms, int64_t rows, int64_t vocab,
               int64_t threads) {
    int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads) if (rows > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = logits + r * stride;
        double *own = sums + r * blocks;
        float factor = inverse ? inverse[r] : 1.0f, highest = highest_of(row, vocab);
        double total = sum_blocks(0, own, row, vocab, highest, factor);
        tokens[r] = invert(row, vocab, highest, factor, own, total, uniforms[r]);
        if (factor != 1.0f) total = sum_blocks(0, own, row, vocab, highest, 1.0f);
        float lse = (float)((double)highest + log(total));
        logprobs[r] = (float)((double)row[tokens[r]] - (double)lse);
    }
}
