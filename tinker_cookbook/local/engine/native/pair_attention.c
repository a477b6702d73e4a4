/* The forward pass of training's attention where products are in bfloat16: that of the decoder.
 *
 * A rounding to bfloat16 follows, which would turn the last bits of two different sums into differences of
 * half a percent. So sums run in the decoder's order, and trainer and sampler agree bit for bit. Keys and values
 * are the numbers that the decoder stores in bfloat16, here in float32: split_heads has rounded them.
 */
#include "decode_attention.h"
#include "train_attention.h"

int omp_get_thread_num(void);

/* `a->scratch` has SPAN * SPAN_HEADS * `stride` floats per thread; `stride` is the longest segment and a
 * vector. Queries arrive multiplied by 1 / sqrt(D). */
void attention_in_order(const Attention *a, int64_t stride) {
    int64_t dim = a->dim, group = a->group;
#pragma omp parallel for schedule(dynamic) num_threads((int)a->threads)
    for (int64_t n = 0; n < a->num_tasks * a->kv_heads; n++) {
        const Task *task = &a->tasks[n / a->kv_heads];
        int64_t head = n % a->kv_heads, start = head * a->keys + task->start;
        float *scores = a->scratch + omp_get_thread_num() * SPAN * SPAN_HEADS * stride;
        const float *keys = a->k + start * dim, *values = a->v + start * dim;
        for (int64_t first = task->first; first < task->last; first += SPAN) {
            int64_t count = task->last - first < SPAN ? task->last - first : SPAN;
            Looking tokens[SPAN];
            for (int64_t i = 0; i < count; i++) {
                int64_t token = task->query + first + i, row = (head * a->tokens + token) * group;
                tokens[i] = (Looking){.q = a->q + row * dim,
                                      .out = a->out + (token * a->kv_heads + head) * group * dim,
                                      .lse = a->lse + row,
                                      .past = {keys, values, keys, values, 0},
                                      .length = first + i + 1,
                                      .fetch_from = first + i + 1};
            }
            attend_group(tokens, count, group, dim, 1.0f, scores, stride);
        }
    }
}
