/* What the kernels of training's attention read; `native/attention.py` declares the same. */
#ifndef TRAIN_ATTENTION_H
#define TRAIN_ATTENTION_H
#include <stdint.h>

/* Queries [first, last) of a segment; in the forward pass one block of them. */
typedef struct {
    int64_t start, first, last; /* start: the segment's first key; first and last count from it */
    int64_t partial;            /* backward: row at which its gradients of keys begin in partial_k and
                                 * partial_v; -1 if it writes those of the segment itself */
    int64_t query;              /* token of the query at position 0. It is `start`, except where segments
                                 * share a prefix: each has its own copy of all keys, but only the
                                 * queries that follow the prefix */
} Task;

typedef struct {
    int64_t tokens, keys, kv_heads, group, dim, threads, num_tasks, num_partial;
    const Task *tasks;
    const float *q, *k, *v;          /* [K, T G, D], [K, keys, D] twice */
    float *out, *lse;                /* [K, T G, D], [K, T G]; the backward pass reads them. Kernels of
                                      * pairs have out [T, K G D] instead */
    const float *grad;               /* gradient of out */
    float *q_grad, *k_grad, *v_grad;
    float *partial_k, *partial_v;    /* [K, num_partial, D] */
    float *scratch;                  /* floats per thread: as many as the called function asks for */
} Attention;

/* Add the partial gradients of one head's keys and values to those of their segments. */
static inline void add_partial(const Attention *a, int64_t head) {
    for (const Task *task = a->tasks; task < a->tasks + a->num_tasks; task++) {
        if (task->partial < 0) continue;
        int64_t own = (head * a->keys + task->start) * a->dim;
        int64_t apart = (head * a->num_partial + task->partial) * a->dim;
        for (int64_t i = 0; i < task->last * a->dim; i++) {
            a->k_grad[own + i] += a->partial_k[apart + i];
            a->v_grad[own + i] += a->partial_v[apart + i];
        }
    }
}

#endif
