/* What the kernels of training's attention read; `native/attention.py` declares the same. */
#ifndef TRAIN_ATTENTION_H
#define TRAIN_ATTENTION_H
#include <stdint.h>

/* Queries [first, last) of a segment; in the forward pass one block of them. */
typedef struct {
    int64_t start, first, last; /* start: the segment's first token; first and last count from it */
    int64_t partial;            /* backward: row at which its gradients of keys begin in partial_k and
                                 * partial_v; -1 if it writes those of the segment itself */
} Task;

typedef struct {
    int64_t tokens, kv_heads, group, dim, threads, num_tasks, num_partial;
    const Task *tasks;
    const float *q, *k, *v;          /* [K, T G, D], [K, T, D] twice */
    float *out, *lse;                /* [K, T G, D], [K, T G]; the backward pass reads them */
    const float *grad;               /* gradient of out */
    float *q_grad, *k_grad, *v_grad;
    float *partial_k, *partial_v;    /* [K, num_partial, D] */
    float *scratch;                  /* attention_scratch() floats per thread */
} Attention;

#endif
