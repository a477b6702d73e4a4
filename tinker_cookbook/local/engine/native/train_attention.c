/* Causal attention inside the segments of a pack, forward and backward, in float32.
 *
 * Query heads that share a key head are interleaved: row t G + g of a key head belongs to token t.
 * Blocks of rows meet blocks of keys with a running softmax (Dao et al., "FlashAttention", 2022): no
 * matrix of all scores exists, and masked blocks are not computed. The backward pass recomputes the
 * probabilities as exp(score - lse). Queries arrive multiplied by 1 / sqrt(D). `model/attention.py`
 * computes the same with torch and has the formulas of the gradients.
 *
 * The order of all sums depends on the lengths only: the same bits with any number of threads.
 */
#include "tiles.h"
#include "train_attention.h"

#define BLOCK_ROWS 96
#define BLOCK_KEYS 256
#define MAX_DIM 256

/* The working memory of a thread. */
typedef struct {
    float strip[BLOCK_KEYS * PANEL];
    float q[(BLOCK_ROWS + MR) * MAX_DIM], grad[(BLOCK_ROWS + MR) * MAX_DIM]; /* packed */
    float scores[BLOCK_ROWS * BLOCK_KEYS], slopes[BLOCK_ROWS * BLOCK_KEYS];
    float packed[(BLOCK_ROWS + MR) * (BLOCK_KEYS + MR)];
    float highest[BLOCK_ROWS], sums[BLOCK_ROWS], dots[BLOCK_ROWS];
} Space;

/* One block of queries, at keys [from, from + count). */
typedef struct {
    int64_t token, rows; /* token: its first query, counted in the segment */
    int64_t from, count;
} Block;

/* y = x . right, or y += x . right if `adds`: [rows, count] . [count, outs], with x packed. */
static void product_of(float *y, int64_t stride, int64_t outs, int64_t rows, const float *x,
                       int64_t count, Right right, int adds, Space *space) {
    Part part = {.y = y, .stride = stride, .outs = outs, .scale = 1};
    multiply(&part, &right, x, space->strip, 0, rows, 0, count, !adds, 1);
}

INLINE Right rows_of(const float *at, int64_t stride) { return (Right){at, ROWS, 0, stride}; }
INLINE Right columns_of(const float *at, int64_t stride) { return (Right){at, COLUMNS, 0, stride}; }

/* Return how many keys of the block row r may see: causal, so those up to its own token. */
INLINE int64_t visible(const Attention *a, const Block *b, int64_t r) {
    int64_t seen = b->token + r / a->group + 1 - b->from;
    return seen < 0 ? 0 : seen < b->count ? seen : b->count;
}

INLINE void scale_row(float *row, int64_t size, float factor) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(row + i, load(row + i) * splat(factor));
    for (; i < size; i++) row[i] *= factor;
}

INLINE float dot_of(const float *x, const float *y, int64_t size) {
    vec sums = {0};
    float sum = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums = FUSED(load(x + i), load(y + i), sums);
    for (; i < size; i++) sum += x[i] * y[i];
    return sum_lanes(sums) + sum;
}

/* Return the largest number of a row and `most`; reads whole vectors. */
INLINE float largest(const float *row, int64_t size, float most) {
    vec highest = splat(most);
    for (int64_t k = 0; k < size; k += LANES) highest = larger_of(highest, load(row + k));
    return largest_lane(highest);
}

/* Turn scores into exp(score - highest), 0 where masked. If this block has a new highest score, what
 * earlier blocks summed is scaled down to it. */
static void soften(const Attention *a, const Block *b, Space *space, float *out) {
    for (int64_t r = 0; r < b->rows; r++) {
        float *row = space->scores + r * BLOCK_KEYS, before = space->highest[r];
        int64_t seen = visible(a, b, r), k = seen;
        for (; k < (seen + LANES - 1) / LANES * LANES; k++) row[k] = -INFINITY;
        float most = largest(row, seen, before);
        vec total = {0};
        for (k = 0; k < seen; k += LANES) {
            vec weight = exp_vec(load(row + k) - splat(most));
            store(row + k, weight);
            total += weight;
        }
        for (k = seen; k < b->count; k++) row[k] = 0;
        if (b->from) {
            float shrink = expf(before - most);
            space->sums[r] *= shrink;
            scale_row(out + r * a->dim, a->dim, shrink);
        }
        space->highest[r] = most;
        space->sums[r] += sum_lanes(total);
    }
}

static void forward_block(const Attention *a, const Task *task, int64_t head, Space *space) {
    int64_t dim = a->dim, row = (head * a->tokens + task->query + task->first) * a->group;
    const float *k = a->k + (head * a->keys + task->start) * dim;
    const float *v = a->v + (head * a->keys + task->start) * dim;
    float *out = a->out + row * dim;
    Block b = {.token = task->first, .rows = (task->last - task->first) * a->group};
    pack_rows(space->q, a->q + row * dim, dim, b.rows, dim);
    for (int64_t r = 0; r < b.rows; r++) space->highest[r] = -INFINITY, space->sums[r] = 0;
    for (; b.from < task->last; b.from += BLOCK_KEYS) {
        b.count = task->last - b.from < BLOCK_KEYS ? task->last - b.from : BLOCK_KEYS;
        product_of(space->scores, BLOCK_KEYS, b.count, b.rows, space->q, dim,
                   columns_of(k + b.from * dim, dim), 0, space);
        soften(a, &b, space, out);
        pack_rows(space->packed, space->scores, BLOCK_KEYS, b.rows, b.count);
        product_of(out, dim, dim, b.rows, space->packed, b.count, rows_of(v + b.from * dim, dim),
                   b.from > 0, space);
    }
    for (int64_t r = 0; r < b.rows; r++) {
        scale_row(out + r * dim, dim, 1.0f / space->sums[r]);
        a->lse[row + r] = space->highest[r] + logf(space->sums[r]);
    }
}

/* Pack the columns of x [count, columns], MR side by side, so that they are the rows of a product. */
static void pack_columns(float *to, const float *x, int64_t stride, int64_t columns, int64_t count) {
    for (int64_t first = 0; first < columns; first += MR) {
        int64_t num = columns - first < MR ? columns - first : MR;
        for (int64_t k = 0; k < count; k++, to += MR)
            if (num == MR)
                memcpy(to, x + k * stride + first, MR * sizeof(float));
            else
                for (int64_t r = 0; r < MR; r++) to[r] = r < num ? x[k * stride + first + r] : 0;
    }
}

/* Turn scores into probabilities P, and the gradient of P in `slopes` into that of the scores:
 * P * (P_grad - dot), with dot = sum_j P_ij P_grad_ij = out_i . grad_i. */
static void slopes_of(const Attention *a, const Block *b, const float *lse, Space *space) {
    for (int64_t r = 0; r < b->rows; r++) {
        float *weights = space->scores + r * BLOCK_KEYS, *slopes = space->slopes + r * BLOCK_KEYS;
        int64_t seen = visible(a, b, r), k = 0;
        vec sum = splat(lse[r]), dot = splat(space->dots[r]), none = {0};
        for (; k < seen; k += LANES) {
            vec over = load(weights + k) - sum;
            ivec positive = over > none; /* from rounding, or masked */
            vec weight = exp_vec((vec)(~positive & (ivec)over));
            store(weights + k, weight);
            store(slopes + k, weight * (load(slopes + k) - dot));
        }
        for (k = seen; k < b->count; k++) weights[k] = slopes[k] = 0;
    }
}

/* The backward pass of one block of queries; adds to the gradients of the keys that it sees. */
static void backward_block(const Attention *a, const Task *task, int64_t first, int64_t last,
                           int64_t head, float *k_grad, float *v_grad, Space *space) {
    int64_t dim = a->dim, row = (head * a->tokens + task->query + first) * a->group;
    const float *k = a->k + (head * a->keys + task->start) * dim;
    const float *v = a->v + (head * a->keys + task->start) * dim;
    const float *q = a->q + row * dim, *out = a->out + row * dim, *grad = a->grad + row * dim;
    Block b = {.token = first, .rows = (last - first) * a->group};
    pack_rows(space->q, q, dim, b.rows, dim);
    pack_rows(space->grad, grad, dim, b.rows, dim);
    for (int64_t r = 0; r < b.rows; r++) /* the sum in the gradient of a softmax; see slopes_of */
        space->dots[r] = dot_of(out + r * dim, grad + r * dim, dim);
    for (; b.from < last; b.from += BLOCK_KEYS) {
        b.count = last - b.from < BLOCK_KEYS ? last - b.from : BLOCK_KEYS;
        int64_t at = b.from * dim;
        product_of(space->scores, BLOCK_KEYS, b.count, b.rows, space->q, dim,
                   columns_of(k + at, dim), 0, space);
        product_of(space->slopes, BLOCK_KEYS, b.count, b.rows, space->grad, dim,
                   columns_of(v + at, dim), 0, space);
        slopes_of(a, &b, a->lse + row, space);
        pack_columns(space->packed, space->scores, BLOCK_KEYS, b.count, b.rows);
        product_of(v_grad + at, dim, dim, b.count, space->packed, b.rows, rows_of(grad, dim), 1,
                   space);
        pack_columns(space->packed, space->slopes, BLOCK_KEYS, b.count, b.rows);
        product_of(k_grad + at, dim, dim, b.count, space->packed, b.rows, rows_of(q, dim), 1,
                   space);
        pack_rows(space->packed, space->slopes, BLOCK_KEYS, b.rows, b.count);
        product_of(a->q_grad + row * dim, dim, dim, b.rows, space->packed, b.count,
                   rows_of(k + at, dim), b.from > 0, space);
    }
}

static void backward_task(const Attention *a, const Task *task, int64_t head, Space *space) {
    int64_t own = (head * a->keys + task->start) * a->dim, step = BLOCK_ROWS / a->group;
    int64_t apart = (head * a->num_partial + task->partial) * a->dim;
    float *k_grad = task->partial < 0 ? a->k_grad + own : a->partial_k + apart;
    float *v_grad = task->partial < 0 ? a->v_grad + own : a->partial_v + apart;
    size_t bytes = (size_t)(task->last * a->dim) * sizeof(float);
    memset(k_grad, 0, bytes);
    memset(v_grad, 0, bytes);
    for (int64_t first = task->first; first < task->last; first += step) {
        int64_t last = first + step < task->last ? first + step : task->last;
        backward_block(a, task, first, last, head, k_grad, v_grad, space);
    }
}

int omp_get_thread_num(void);

int64_t attention_scratch(void) { return (sizeof(Space) + 64) / sizeof(float); }

void attention_forward(const Attention *a) {
#pragma omp parallel for schedule(dynamic) num_threads((int)a->threads)
    for (int64_t n = 0; n < a->num_tasks * a->kv_heads; n++) {
        Space *space = (Space *)(a->scratch + omp_get_thread_num() * attention_scratch());
        forward_block(a, &a->tasks[n / a->kv_heads], n % a->kv_heads, space);
    }
}

void attention_backward(const Attention *a) {
#pragma omp parallel num_threads((int)a->threads)
    {
        Space *space = (Space *)(a->scratch + omp_get_thread_num() * attention_scratch());
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < a->num_tasks * a->kv_heads; n++)
            backward_task(a, &a->tasks[n / a->kv_heads], n % a->kv_heads, space);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < a->kv_heads; head++) add_partial(a, head);
    }
}

int64_t attention_limits(int64_t which) {
    const int64_t limits[] = {BLOCK_ROWS, MAX_DIM, sizeof(Task), sizeof(Attention)};
    return limits[which];
}
