/* The backward pass of training's attention where products are in bfloat16.
 *
 * Operands of all products, the probabilities and their gradients among them, are rounded to bfloat16 and
 * multiplied in pairs; sums, exponentials and results are float32. `model/attention.py` has the formulas,
 * `train_attention.c` computes the same without rounding.
 *
 * A block of keys is packed once and meets the blocks of queries that see it. The gradients of its keys and
 * values are summed transposed, [D, keys]: then the probabilities are the right side of a product, whose
 * layout they already have. The order of all sums depends on the lengths only.
 */
#define PAIRS
#undef BLOCKS /* its blocks of rows are narrow, and its gradients need not agree with other kernels */
#include "tiles.h"
#include "train_attention.h"

#define BLOCK_ROWS 96
#define BLOCK_KEYS 256
#define MAX_DIM 256

/* The working memory of a thread. Layouts are those of `tiles.h`. */
typedef struct {
    /* of a block of keys; right sides: [D, keys] twice, [keys, D] */
    Word k_columns[WORDS(MAX_DIM) * BLOCK_KEYS], v_columns[WORDS(MAX_DIM) * BLOCK_KEYS];
    Word k_rows[WORDS(BLOCK_KEYS) * MAX_DIM];
    float k_sums[MAX_DIM * BLOCK_KEYS], v_sums[MAX_DIM * BLOCK_KEYS]; /* [D, BLOCK_KEYS] */
    /* of a block of queries; left sides: [rows, D] twice, [D, rows] twice */
    Word q[(BLOCK_ROWS + MR) * WORDS(MAX_DIM)], grad[(BLOCK_ROWS + MR) * WORDS(MAX_DIM)];
    Word q_columns[WORDS(BLOCK_ROWS) * (MAX_DIM + MR)], grad_columns[WORDS(BLOCK_ROWS) * (MAX_DIM + MR)];
    float grad_rows[BLOCK_ROWS * MAX_DIM], dots[BLOCK_ROWS + 1];
    /* of both */
    float scores[(BLOCK_ROWS + 1) * BLOCK_KEYS], slopes[(BLOCK_ROWS + 1) * BLOCK_KEYS];
    Word weights[WORDS(BLOCK_ROWS) * BLOCK_KEYS]; /* right sides: [rows, keys] */
    Word slope_rows[WORDS(BLOCK_ROWS) * BLOCK_KEYS];
    Word packed[(BLOCK_ROWS + MR) * WORDS(BLOCK_KEYS)]; /* left side: `slopes` */
} Space;

/* Some queries of a segment, and the block of keys [from, from + count) that they meet. */
typedef struct {
    int64_t head, query; /* query: token of the query at position 0 */
    int64_t token, rows; /* token: position of the first query; rows: G for each query */
    int64_t from, count;
    int64_t packed; /* keys that were packed: `count`, or more of which these queries see only some */
} Block;

INLINE int64_t in_panels(int64_t outs) { return (outs + PANEL - 1) / PANEL * PANEL; }

/* y = x . right, or y += x . right if `adds`: [rows, count] . [count, outs]. Both sides are packed;
 * `stride` is the count of the whole right side. */
INLINE void product_of(float *y, int64_t y_stride, int64_t outs, const Word *x, int64_t rows,
                       int64_t count, const Word *right, int64_t stride, int adds) {
    Part part = {.y = y, .stride = y_stride, .outs = outs, .scale = 1};
    Right side = {.at = right, .layout = PANELS, .half = 1, .stride = stride};
    multiply(&part, &side, x, 0, 0, rows, 0, count, !adds, 1);
}

/* Pack a matrix as the right side of a product, [count, outs]. */
static void pack_right(Word *to, const float *at, Layout layout, int64_t stride, int64_t count,
                       int64_t outs) {
    Right right = {.at = at, .layout = layout, .half = 1, .stride = stride};
    for (int64_t out = 0; out < outs; out += PANEL, to += WORDS(count) * PANEL)
        strip(to, &right, 0, count, out, outs);
}

/* Pack the columns of x [rows, columns], MR side by side, as the left side of a product: [columns, rows]. */
static void pack_columns(Word *to, const float *x, int64_t rows, int64_t columns) {
    static const float zeros[MAX_DIM];
    Word words[MAX_DIM + MR] = {0};
    for (int64_t r = 0; r < rows; r += 2) {
        const float *even = x + r * columns, *odd = r + 1 < rows ? even + columns : zeros;
        int64_t k = 0;
        for (; k + LANES <= columns; k += LANES)
            *(uvec_any *)(words + k) = rounded_words(load(even + k), load(odd + k));
        for (; k < columns; k++)
            words[k] = round_number(even[k]) | (uint32_t)round_number(odd[k]) << 16;
        for (k = 0; k < columns; k += MR)
            memcpy(to + (k * WORDS(rows) + r / 2 * MR), words + k, MR * sizeof *to);
    }
}

INLINE float dot_of(const float *x, const float *y, int64_t size) {
    vec sums = {0};
    float sum = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums = FUSED(load(x + i), load(y + i), sums);
    for (; i < size; i++) sum += x[i] * y[i];
    return sum_lanes(sums) + sum;
}

/* Return exp(score - lse), 0 for keys from number `seen` on. */
INLINE vec weight_of(vec score, float lse, ivec place, int64_t seen) {
    vec over = score - splat(lse), none = {0};
    ivec visible = place < (int32_t)seen + (ivec){0}, positive = over > none; /* from rounding */
    return (vec)(visible & (ivec)exp_vec((vec)(~positive & (ivec)over)));
}

/* Return how many keys of the block row r may see: causal, so those up to its own token. */
INLINE int64_t visible(const Attention *a, const Block *b, int64_t r) {
    return r < b->rows ? b->token + r / a->group + 1 - b->from : 0;
}

/* Turn two rows of scores into probabilities P, and their gradients in `slopes` into those of the scores:
 * P * (P_grad - dot), with dot = sum_j P_ij P_grad_ij = out_i . grad_i. */
INLINE void slope_pair(const Attention *a, const Block *b, const float *lse, int64_t r, Space *space) {
    int64_t seen[2] = {visible(a, b, r), visible(a, b, r + 1)}, at = r / 2 * PANEL;
    float *scores = space->scores + r * BLOCK_KEYS, *slopes = space->slopes + r * BLOCK_KEYS;
    float sums[2] = {lse[r], r + 1 < b->rows ? lse[r + 1] : 0};
    ivec place;
    for (int i = 0; i < LANES; i++) place[i] = i;
    for (int64_t k = 0; k < in_panels(b->count); k += LANES, place += LANES) {
        vec weight[2], slope[2];
        for (int i = 0; i < 2; i++) {
            int64_t n = i * BLOCK_KEYS + k;
            weight[i] = weight_of(load(scores + n), sums[i], place, seen[i]);
            slope[i] = weight[i] * (load(slopes + n) - splat(space->dots[r + i]));
            store(slopes + n, slope[i]);
        }
        int64_t word = k / PANEL * PANEL * WORDS(b->rows) + at + k % PANEL;
        *(uvec_any *)(space->weights + word) = rounded_words(weight[0], weight[1]);
        *(uvec_any *)(space->slope_rows + word) = rounded_words(slope[0], slope[1]);
    }
}

/* Pack what a block of queries brings to its products. */
static void pack_queries(const Attention *a, const Block *b, int64_t row, Space *space) {
    int64_t dim = a->dim, size = a->group * dim;
    const float *q = a->q + row * dim;
    float *grad = space->grad_rows;
    for (int64_t r = 0; r < b->rows; r += a->group) {
        int64_t at = ((b->query + b->token + r / a->group) * a->kv_heads + b->head) * size;
        memcpy(grad + r * dim, a->grad + at, (size_t)size * sizeof(float));
        for (int64_t g = 0; g < a->group; g++)
            space->dots[r + g] = dot_of(a->out + at + g * dim, a->grad + at + g * dim, dim);
    }
    pack_rows(space->q, q, dim, b->rows, dim);
    pack_rows(space->grad, grad, dim, b->rows, dim);
    pack_columns(space->q_columns, q, b->rows, dim);
    pack_columns(space->grad_columns, grad, b->rows, dim);
    space->dots[b->rows] = 0;
    /* An odd number of rows is filled up with a row of zeros. */
    memset(space->scores + b->rows * BLOCK_KEYS, 0, BLOCK_KEYS * sizeof(float));
    memset(space->slopes + b->rows * BLOCK_KEYS, 0, BLOCK_KEYS * sizeof(float));
}

/* Let a block of queries meet a block of keys. */
static void meet(const Attention *a, const Block *b, Space *space) {
    int64_t dim = a->dim, row = (b->head * a->tokens + b->query + b->token) * a->group;
    int64_t keys = in_panels(b->count);
    pack_queries(a, b, row, space);
    product_of(space->scores, BLOCK_KEYS, keys, space->q, b->rows, dim, space->k_columns, dim, 0);
    product_of(space->slopes, BLOCK_KEYS, keys, space->grad, b->rows, dim, space->v_columns, dim, 0);
    for (int64_t r = 0; r < b->rows; r += 2) slope_pair(a, b, a->lse + row, r, space);
    product_of(space->v_sums, BLOCK_KEYS, keys, space->grad_columns, dim, b->rows, space->weights,
               b->rows, 1);
    product_of(space->k_sums, BLOCK_KEYS, keys, space->q_columns, dim, b->rows, space->slope_rows,
               b->rows, 1);
    pack_rows(space->packed, space->slopes, BLOCK_KEYS, b->rows, b->count);
    product_of(a->q_grad + row * dim, dim, dim, space->packed, b->rows, b->count, space->k_rows,
               b->packed, b->from > 0);
}

/* The gradients that a task's queries give to one block of keys, and the other way round. */
static void backward_keys(const Attention *a, const Task *task, Block b, float *k_grad, float *v_grad,
                          Space *space) {
    int64_t dim = a->dim, step = BLOCK_ROWS / a->group;
    int64_t own = (b.head * a->keys + task->start + b.from) * dim;
    b.packed = task->last - b.from < BLOCK_KEYS ? task->last - b.from : BLOCK_KEYS;
    pack_right(space->k_columns, a->k + own, COLUMNS, dim, dim, b.packed);
    pack_right(space->v_columns, a->v + own, COLUMNS, dim, dim, b.packed);
    pack_right(space->k_rows, a->k + own, ROWS, dim, b.packed, dim);
    memset(space->k_sums, 0, (size_t)(dim * BLOCK_KEYS) * sizeof(float));
    memset(space->v_sums, 0, (size_t)(dim * BLOCK_KEYS) * sizeof(float));
    for (b.token = task->first; b.token < task->last; b.token += step) {
        int64_t end = b.token + step < task->last ? b.token + step : task->last;
        b.rows = (end - b.token) * a->group;
        b.count = end - b.from < b.packed ? end - b.from : b.packed;
        if (b.count > 0) meet(a, &b, space);
    }
    turn(k_grad + b.from * dim, dim, space->k_sums, BLOCK_KEYS, dim, b.packed);
    turn(v_grad + b.from * dim, dim, space->v_sums, BLOCK_KEYS, dim, b.packed);
}

static void backward_task(const Attention *a, const Task *task, int64_t head, Space *space) {
    int64_t own = (head * a->keys + task->start) * a->dim;
    int64_t apart = (head * a->num_partial + task->partial) * a->dim;
    float *k_grad = task->partial < 0 ? a->k_grad + own : a->partial_k + apart;
    float *v_grad = task->partial < 0 ? a->v_grad + own : a->partial_v + apart;
    Block b = {.head = head, .query = task->query};
    for (; b.from < task->last; b.from += BLOCK_KEYS)
        backward_keys(a, task, b, k_grad, v_grad, space);
}

int omp_get_thread_num(void);

int64_t attention_pairs_scratch(void) { return (sizeof(Space) + 64) / sizeof(float); }

void attention_backward_pairs(const Attention *a) {
#pragma omp parallel num_threads((int)a->threads)
    {
        Space *space = (Space *)(a->scratch + omp_get_thread_num() * attention_pairs_scratch());
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < a->num_tasks * a->kv_heads; n++)
            backward_task(a, &a->tasks[n / a->kv_heads], n % a->kv_heads, space);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < a->kv_heads; head++) add_partial(a, head);
    }
}
