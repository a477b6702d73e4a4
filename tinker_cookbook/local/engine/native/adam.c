/* One AdamW step in a single pass over memory, with moments of 24 bits.
 *
 * A moment is a float32 rounded to its upper 24 bits, ties to even: sign, exponent and 15 bits of the
 * mantissa. Bits 31 to 16 are in one array, bits 15 to 8 in another. `training/moments.py` computes the
 * same with torch, with another square root. No product is fused with a sum, so all instruction sets give
 * the same bits.
 */
#include "pairs.h"

#define BLOCK 16384
typedef uint8_t bvec __attribute__((vector_size(LANES)));
typedef uint8_t bvec_any __attribute__((vector_size(LANES), aligned(1), may_alias));

typedef struct {
    uint16_t *upper;
    uint8_t *lower;
} moment;

typedef struct {
    int64_t size, threads;
    float *values;
    const float *gradient;
    moment mean, square;
    float mean_share, square_keep, square_share, root_factor, eps, decay, rate;
} adam_call;

int64_t adam_call_size(void) { return sizeof(adam_call); }

INLINE vec lengthened(moment from) {
    uvec upper = __builtin_convertvector(*(const hvec_any *)from.upper, uvec);
    uvec lower = __builtin_convertvector(*(const bvec_any *)from.lower, uvec);
    return (vec)((upper << 16) | (lower << 8));
}

INLINE void store_shortened(moment to, vec v) {
    uvec bits = (uvec)v;
    bits += 0x7fu + ((bits >> 8) & 1u);
    *(hvec_any *)to.upper = __builtin_convertvector(bits >> 16, hvec);
    *(bvec_any *)to.lower = __builtin_convertvector((bits >> 8) & 0xffu, bvec);
}

/* Update one vector of parameters and their moments. */
INLINE void update(const adam_call *c, float *values, const float *gradient, moment mean, moment square) {
    vec g = load(gradient), m = lengthened(mean), s = lengthened(square);
    m += (g - m) * splat(c->mean_share);
    s = s * splat(c->square_keep) + g * splat(c->square_share) * g;
    vec root = sqrt_vec(s) * splat(c->root_factor) + splat(c->eps);
    store(values, load(values) * splat(c->decay) + m * splat(c->rate) / root);
    store_shortened(mean, m);
    store_shortened(square, s);
}

INLINE moment at(moment m, int64_t k) { return (moment){m.upper + k, m.lower + k}; }

/* Copy the last numbers, which fill less than a vector. */
INLINE void copy_moment(moment to, moment from, int64_t size) {
    memcpy(to.upper, from.upper, (size_t)size * sizeof *to.upper);
    memcpy(to.lower, from.lower, (size_t)size);
}

/* Update the parameters from k on, which fill less than a vector. */
static void update_rest(const adam_call *c, int64_t k) {
    float values[LANES] = {0}, gradient[LANES] = {0};
    uint16_t upper[2][LANES] = {{0}};
    uint8_t lower[2][LANES] = {{0}};
    moment mean = {upper[0], lower[0]}, square = {upper[1], lower[1]};
    int64_t left = c->size - k;
    memcpy(values, c->values + k, (size_t)left * sizeof(float));
    memcpy(gradient, c->gradient + k, (size_t)left * sizeof(float));
    copy_moment(mean, at(c->mean, k), left);
    copy_moment(square, at(c->square, k), left);
    update(c, values, gradient, mean, square);
    memcpy(c->values + k, values, (size_t)left * sizeof(float));
    copy_moment(at(c->mean, k), mean, left);
    copy_moment(at(c->square, k), square, left);
}

void adam_step(const adam_call *c) {
    int64_t whole = c->size / LANES * LANES;
#pragma omp parallel for schedule(dynamic) num_threads((int)c->threads) if (whole > BLOCK)
    for (int64_t first = 0; first < whole; first += BLOCK) {
        int64_t end = first + BLOCK < whole ? first + BLOCK : whole;
        for (int64_t k = first; k < end; k += LANES)
            update(c, c->values + k, c->gradient + k, at(c->mean, k), at(c->square, k));
    }
    if (whole < c->size) update_rest(c, whole);
}
