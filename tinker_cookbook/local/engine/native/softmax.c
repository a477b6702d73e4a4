/* Exponentials of logits and their sums, block by block, for draws and logprobs on a CPU.
 *
 * A row is read twice: for its largest logit and for the exponentials. A row's results do not depend on
 * other rows. `sampling/logits.py` computes the same with torch.
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

/* Write for each row: weights [blocks, BLOCK] (unless NULL), their sums [blocks], and the logsumexp of
 * logit * inverse. `inverse` is NULL for ones. Rows of logits are `stride` floats apart. */
void exp_blocks(float *weights, double *sums, float *lse, const float *logits, int64_t stride,
                const float *inverse, int64_t rows, int64_t vocab, int64_t threads) {
    int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads) if (rows > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = logits + r * stride;
        float factor = inverse ? inverse[r] : 1.0f, highest = highest_of(row, vocab);
        double total = 0;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t left = vocab - b * BLOCK;
            float *to = weights ? weights + (r * blocks + b) * BLOCK : 0;
            double sum = exp_block(to, row + b * BLOCK, left < BLOCK ? left : BLOCK, highest, factor);
            total += sums[r * blocks + b] = sum;
        }
        lse[r] = (float)((double)(highest * factor) + log(total));
    }
}
