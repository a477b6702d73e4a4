/* Gradients of low-rank matrices where products are in bfloat16: sums over tokens of outer products,
 *
 *     y[r, n] += sum over t of left[t, r] right[t, n]        or, with `turned`, y[n, r] += the same
 *
 * A's gradient has left = low_grad and right = x; B's is turned, with left = low and right = out_grad.
 * Both operands are rounded to bfloat16; sums are float32, in the order of the tokens, whatever the number
 * of threads. The narrow operand is packed once; panels of the wide one are shared out among threads.
 */
#define PAIRS
#include "tiles.h"

typedef struct {
    const float *left, *right; /* [tokens, rank], [tokens, outs] */
    int64_t left_stride, right_stride, rank, outs;
    float *y;
    int64_t y_stride, turned;
    uint32_t *packed; /* scratch: low_rank_words(tokens, rank) words */
} Job;

#define MAX_JOBS 4
typedef struct {
    int64_t tokens, threads, num_jobs;
    float *scratch;    /* `thread_floats` per thread: a strip and the sums of a panel */
    int64_t thread_floats;
    Job jobs[MAX_JOBS];
} LowRank;

/* Tokens of a strip: so few that the next strip, whose rows are far apart in memory, can be fetched into the
 * second-level cache before it is needed without evicting itself. */
#define SLICE 96

static int64_t num_units(int64_t rank) { return (rank + MR - 1) / MR; }
static int64_t num_panels(int64_t outs) { return (outs + PANEL - 1) / PANEL; }

int64_t low_rank_words(int64_t tokens, int64_t rank) { return num_units(rank) * MR * PACKED_WORDS(tokens); }
int64_t low_rank_scratch(int64_t rank) { return (STRIP_WORDS + num_units(rank) * MR) * PANEL; }
int64_t low_rank_size(int64_t which) { return which ? sizeof(LowRank) : sizeof(Job); }

/* Write MR columns of `left` from `first` on, as pairs of tokens t and t + 1. Missing columns are zeros. */
INLINE void pair_tokens(uint32_t *to, const Job *job, int64_t tokens, int64_t t, int64_t first) {
    int64_t num = job->rank - first < MR ? job->rank - first : MR;
    const float *row = job->left + t * job->left_stride + first;
    if (num == MR && t + 2 + LANES <= tokens && LANES >= MR) { /* loads may run into later rows */
        uvec words = rounded_words(load(row), load(row + job->left_stride));
        memcpy(to, &words, MR * sizeof *to);
        return;
    }
    for (int64_t r = 0; r < MR; r++) {
        uint32_t even = r < num ? round_number(row[r]) : 0, odd = 0;
        if (r < num && t + 1 < tokens) odd = round_number(row[job->left_stride + r]);
        to[r] = even | odd << 16;
    }
}

/* Pack MR columns of `left` as the rows of a product, pairs of tokens. */
static void pack_unit(const Job *job, int64_t tokens, int64_t unit) {
    uint32_t *to = job->packed + unit * MR * PACKED_WORDS(tokens);
#ifdef BLOCKS
    for (int64_t t = 0; t < tokens; t += 2 * BLOCK, to += MR * BLOCK) {
        uint32_t words[BLOCK][MR] = {{0}};
        for (int64_t k = 0; k < BLOCK && t + 2 * k < tokens; k++)
            pair_tokens(words[k], job, tokens, t + 2 * k, unit * MR);
        for (int64_t r = 0; r < MR; r++)
            for (int64_t k = 0; k < BLOCK; k++) to[r * BLOCK + k] = words[k][r];
    }
#else
    for (int64_t t = 0; t < tokens; t += 2, to += MR) pair_tokens(to, job, tokens, t, unit * MR);
#endif
}

/* Add the sums of one panel, which are [rank, PANEL], to y [outs, rank]. */
static void add_turned(const Job *job, const float *sums, int64_t out, int64_t outs) {
    for (int64_t n = 0; n < outs; n++) {
        float *y = job->y + (out + n) * job->y_stride;
        for (int64_t r = 0; r < job->rank; r++) y[r] += sums[r * PANEL + n];
    }
}

/* Fetch what the wide operand has at the given tokens and panel. */
INLINE void fetch_tokens(const Job *job, int64_t token, int64_t end, int64_t out) {
    const float *row = job->right + token * job->right_stride + out;
    for (; token < end; token++, row += job->right_stride)
        for (int64_t c = 0; c < PANEL; c += 16) PREFETCH(row + c);
}

/* Compute one panel. Meanwhile the next slice of its tokens is fetched into the cache, and then the first
 * slice of panel `next`, which this thread will probably take. */
static void run_panel(const Job *job, int64_t tokens, int64_t out, int64_t next, uint32_t *space,
                      float *sums) {
    Right right = {job->right, ROWS, 1, job->right_stride};
    int64_t outs = job->outs - out < PANEL ? job->outs - out : PANEL;
    int64_t slices = (tokens + SLICE - 1) / SLICE, height = (tokens + slices - 1) / slices;
#ifdef BLOCKS
    height = (height + SLICE_STEP - 1) / SLICE_STEP * SLICE_STEP;
#else
    height += height & 1;
#endif
    for (int64_t from = 0; from < tokens; from += height) {
        int64_t count = tokens - from < height ? tokens - from : height;
        const uint32_t *w = strip(space, &right, from, count, out, job->outs);
        int64_t then = from + count < tokens ? from + count : 0, panel = then ? out : next;
        int64_t ahead = tokens - then < height ? tokens - then : height, units = num_units(job->rank);
        for (int64_t unit = 0; unit < units; unit++) {
            if (panel + PANEL <= job->outs)
                fetch_tokens(job, then + ahead * unit / units, then + ahead * (unit + 1) / units, panel);
            int64_t first = unit * MR, num = job->rank - first < MR ? job->rank - first : MR;
            const uint32_t *x = job->packed + (unit * PACKED_WORDS(tokens) + from / 2) * MR;
            Tile t = {.stride = job->y_stride, .scale = 1, .last = from + count == tokens};
            t.y = job->y + first * job->y_stride + out;
            if (job->turned) {
                t.y = sums + first * PANEL, t.stride = PANEL, t.first = from == 0;
                num = MR;
            }
            if (!job->turned && outs < PANEL)
                run_edge_tile((int)num, x, w, PACKED_WORDS(count), &t, outs);
            else if (num == MR)
                tile(MR, x, w, PACKED_WORDS(count), &t);
            else
                run_tile((int)num, x, w, PACKED_WORDS(count), &t);
        }
    }
    if (job->turned) add_turned(job, sums, out, outs);
}

int omp_get_thread_num(void);

void low_rank_gradients(const LowRank *p) {
    int64_t units = 0, panels = 0;
    for (int64_t j = 0; j < p->num_jobs; j++) {
        units += num_units(p->jobs[j].rank);
        panels += num_panels(p->jobs[j].outs);
    }
#pragma omp parallel num_threads((int)p->threads)
    {
        float *space = p->scratch + omp_get_thread_num() * p->thread_floats;
        open_blocks(MR);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < units; n++) {
            const Job *job = p->jobs;
            int64_t unit = n;
            for (; unit >= num_units(job->rank); job++) unit -= num_units(job->rank);
            pack_unit(job, p->tokens, unit);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t n = 0; n < panels; n++) {
            const Job *job = p->jobs;
            int64_t panel = n;
            for (; panel >= num_panels(job->outs); job++) panel -= num_panels(job->outs);
            run_panel(job, p->tokens, panel * PANEL, (panel + p->threads) * PANEL,
                      (uint32_t *)(void *)space, space + STRIP_WORDS * PANEL);
        }
        close_blocks();
    }
}
