/* Products of many rows with frozen packed matrices and low-rank adapters, in float32 or, with PAIRS, of
 * rows and matrices in bfloat16 (`pair_products.c`).
 *
 * A call computes parts (results) as sums over terms: part = sum over terms of term.x . term.right[part].
 * Terms are computed in order, and a later term may read a part that is complete. So one call computes
 *
 *     forward:   low = scale x A'                y = x W' + low B'           (per stacked module)
 *     backward:  low_grad = scale y_grad B       x_grad = y_grad W + low_grad A
 *
 * Threads take blocks of rows in turns. One copy of a matrix serves both directions; in bfloat16 it needs half
 * the memory traffic. An output is one chain of sums in the order of the terms, as in
 * `decode_kernels.c`: its bits do not depend on how rows are grouped.
 */
#include "tiles.h"

#define MAX_TERMS 4
#define MAX_PARTS 4
/* Units of MR rows in a block: as many as the second-level cache holds next to a strip. */
#define MAX_UNITS (LANES >= 16 ? 40 : 84)
/* Several threads cut their rows into at least so many blocks, of at least so many units. */
#define BLOCKS_PER_THREAD 3
#define LEAST_UNITS 16

typedef struct {
    const float *x; /* [rows, count] */
    int64_t stride, count;
    Right right[MAX_PARTS];
} Term;

typedef struct {
    int64_t rows, threads, num_terms, num_parts;
    float *scratch; /* SCRATCH_WORDS per thread */
    Term terms[MAX_TERMS];
    Part parts[MAX_PARTS];
} Product;

/* Compute all terms and parts for the given rows. */
static void run_rows(const Product *p, int64_t row, int64_t rows, Word *x, Word *space) {
    int first[MAX_PARTS], last[MAX_PARTS];
    for (int64_t i = 0; i < p->num_parts; i++) {
        first[i] = last[i] = -1;
        for (int64_t n = 0; n < p->num_terms; n++)
            if (p->terms[n].right[i].at) {
                first[i] = first[i] < 0 ? (int)n : first[i];
                last[i] = (int)n;
            }
    }
    for (int64_t n = 0; n < p->num_terms; n++) {
        const Term *term = &p->terms[n];
        int64_t slices = (term->count + STRIP - 1) / STRIP;
        int64_t height = (term->count + slices - 1) / slices;
        height = (height + PANEL - 1) / PANEL * PANEL;
        for (int64_t from = 0; from < term->count; from += height) {
            int64_t count = term->count - from < height ? term->count - from : height;
            pack_rows(x, term->x + row * term->stride + from, term->stride, rows, count);
            for (int64_t i = 0; i < p->num_parts; i++)
                if (term->right[i].at)
                    multiply(&p->parts[i], &term->right[i], x, space, row, rows, from, count,
                             n == first[i] && from == 0,
                             n == last[i] && from + count == term->count);
        }
    }
}

int omp_get_thread_num(void);

/* Return how many blocks the units are cut into. Threads take them in turns, so that a thread that another
 * program interrupts does not hold up the others for long; smaller blocks would use each strip less. */
static int64_t count_blocks(int64_t units, int64_t threads) {
    int64_t each = (units + threads - 1) / threads;
    int64_t parts = (each + MAX_UNITS - 1) / MAX_UNITS, finer = each / LEAST_UNITS;
    if (finer > BLOCKS_PER_THREAD) finer = BLOCKS_PER_THREAD;
    return threads * (threads > 1 && parts < finer ? finer : parts);
}

#define SPACE_WORDS (STRIP_WORDS * PANEL)
#define SCRATCH_WORDS (SPACE_WORDS + MAX_UNITS * MR * STRIP_WORDS + 16)

#ifdef PAIRS
void product_pairs(const Product *p) {
#else
void product(const Product *p) {
#endif
    int64_t units = (p->rows + MR - 1) / MR, threads = p->threads < units ? p->threads : units;
    int64_t blocks = count_blocks(units, threads);
#pragma omp parallel num_threads((int)threads)
    {
        Word *space = (Word *)(void *)(p->scratch + omp_get_thread_num() * SCRATCH_WORDS);
#pragma omp for schedule(dynamic) nowait
        for (int64_t b = 0; b < blocks; b++) {
            int64_t begin = units * b / blocks * MR, end = units * (b + 1) / blocks * MR;
            run_rows(p, begin, (end < p->rows ? end : p->rows) - begin, space + SPACE_WORDS, space);
        }
    }
}

#ifndef PAIRS
int64_t panel_width(void) { return PANEL; }

/* Return the floats of scratch memory for each thread. */
int64_t product_scratch(void) { return SCRATCH_WORDS; }

int64_t product_struct_size(int64_t which) {
    const int64_t sizes[] = {sizeof(Right), sizeof(Term), sizeof(Part), sizeof(Product)};
    return sizes[which];
}
#endif
