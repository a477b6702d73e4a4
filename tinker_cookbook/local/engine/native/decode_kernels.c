/* The decoder's forward pass for sampling on a CPU: weights in float32 or bfloat16, all else in float32.
 * With PAIRS (`pair_decode.c`), the rows and matrices of all products are rounded to bfloat16, as are keys
 * and values, and every result has the bits of training's forward pass in that format.
 *
 * The block is that of `model/transformer.py`, whose docstring has its formulas. One call runs all
 * blocks over a batch of tokens: decoding sequences (one token each) and prompt chunks, mixed. The order
 * of every sum depends only on the token and the weights, so a token's result has the same bits in any
 * batch, chunk or order.
 *
 * A projection with its adapter is one accumulation over [x | scale x A'] . [W | B]'. Matrices are packed
 * (see `model/packed_matrix.py`): a vector holds neighbouring outputs, and an output is summed in one
 * chain from the first input to the last, whatever the tile.
 * This is plain C with GCC vector extensions and OpenMP; `build.py` compiles it, and
 * `sampling/native_decoder.py` declares the same structs.
 */
#include "decode_attention.h"
#include "rows.h"
#include "team.h"

#ifndef PAIRS
#undef BLOCKS
#endif

/* Number of neighbouring outputs in a panel of a packed matrix [panels, in, PANEL]; the last panel of a
 * module is filled up with zeros. */
#define PANEL (2 * LANES)

/* A quantised matrix is expanded to words: numbers, or pairs of them; `count` numbers take WORDS. */
#ifdef PAIRS
typedef uint32_t Word;
#define WORDS(count) (((count) + 1) / 2)
#else
typedef float Word;
#define WORDS(count) (count)
#endif
#include "quantised.h"
#ifdef BLOCKS
#include "blocks.h"
#else
INLINE void close_blocks(void) {}
#endif

#ifdef PAIRS
#define STEPS(count) (((count) + 1) / 2) /* steps of a sum over `count` inputs */
typedef uint16_t Input;                   /* a number in a row that is multiplied */
#else
#define STEPS(count) (count)
typedef float Input;
#endif
/* Return row `t` of a scratch buffer of rows that are multiplied. */
INLINE Input *input_row(float *buffer, int64_t size, int64_t t) {
    return (Input *)(void *)buffer + t * STEPS(size) * (int64_t)(4 / sizeof(Input));
}

typedef struct {
    const void *weight; /* packed, module after module */
    const float *bias;  /* [out] or NULL */
    int64_t half;       /* whether `weight` is in bfloat16 */
    int64_t bits;       /* 8 or 4 if `weight` is quantised (`quantised.h`), 12 if it is compact
                         * (`compact.h`), otherwise 0 */
    int64_t in, out;
    int64_t num_modules;
    int64_t module_out[3]; /* rows of each stacked module */
} Linear;

typedef struct {
    const void *a;    /* [modules * rank, in], packed as one module; NULL if not adapted */
    const void *b[3]; /* [out, rank] for each module, packed */
    int64_t a_bits;   /* 12 if `a` is compact (`compact.h`), otherwise 0 */
} Lora;

typedef struct {
    Linear qkv, o, gate_up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm; /* the last two may be NULL */
} Layer;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, inner;
    float eps;
    const Layer *layers;
    const float *final_norm;
    Linear head;
} Model;

typedef struct {
    int64_t first, count; /* range of `order` */
    int64_t rank;
    float scale;
    const Lora *projections; /* [num_layers * 4 + 1], the head last; NULL for the base model */
} Group;

typedef struct {
    int64_t num_tokens, num_groups, num_threads, max_position;
    const int64_t *order;    /* tokens sorted by adapter */
    const int64_t *group_of; /* group of each entry of `order` */
    const Group *groups;
    const int64_t *positions;
    int64_t num_spans;
    const int64_t *spans;       /* first token of each span, then num_tokens; a span attends together */
    Stored *const *kv;          /* per token: its sequence's [kv_heads, 2, C, D] of layer 0 */
    const int64_t *kv_stride;   /* per token: numbers from one layer to the next */
    const int64_t *capacity;    /* per token: its sequence's C */
    const int64_t *same_as;     /* per token: another token, whose sequence begins with the same */
    const int64_t *same_length; /* `same_length` tokens; 0 if no such sequence is known */
    const float *cos, *sin;     /* [P, D] */
    float *x;                   /* [N, hidden]: embeddings in, hidden states out */
    float *normed, *wide, *act; /* scratch: [N, hidden], [N, max out], [N, max in] */
    float *low;                 /* scratch [N, 3 * max rank] */
    float *low_rounded;         /* scratch [N, 3 * max rank + 2], in bfloat16; for PAIRS */
    float *expanded;            /* scratch [threads, expanded_size]: panels of a quantised matrix */
    int64_t expanded_size;      /* at least one panel of every matrix; 0 without such matrices */
    float *scores;              /* scratch [threads, SPAN * SPAN_HEADS, max_position + 1 + LANES] */
} Batch;

#ifdef BLOCKS
#define MAX_ROWS MR
/* Tall tiles pay where a product takes one instruction, since they expand a weight for more tokens. */
#elif defined(PAIRS) && LANES == 16 && defined(__AVX512BF16__)
#define MAX_ROWS 10
#define EACH_NUMBER_OF_ROWS CASES_TO_10
#elif !defined(PAIRS) && LANES == 16
#define MAX_ROWS 12
#define EACH_NUMBER_OF_ROWS CASES_TO_12
#else
#define MAX_ROWS 6
#define EACH_NUMBER_OF_ROWS CASES_TO_6
#endif
#if LANES == 16 || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
/* Panels in a tile of R tokens: as many sums as fit into registers, and at least 8 to hide latency. */
#define PANELS_FOR(R) \
    (REGISTERS == 32 ? (R <= 3 ? 4 : R == 4 ? 3 : R <= 6 ? 2 : 1) \
                     : (R == 1 ? 4 : R == 2 ? 3 : R == 3 ? 2 : 1))

INLINE int64_t num_panels(int64_t out) { return (out + PANEL - 1) / PANEL; }

#ifdef FAST_UNITS
#include "later.h"
#else
typedef void Later;
#endif

/* Up to MAX_ROWS tokens of one product. */
typedef struct {
    const Input *x[MAX_ROWS];
    float *y[MAX_ROWS]; /* at the module's first output */
    const Input *low[MAX_ROWS];
    const char *b[MAX_ROWS]; /* packed B of the module; NULL without an adapter */
    int64_t rank[MAX_ROWS];
    int one_adapter;   /* whether `b` is the same for all */
    Team *team;        /* `low` is complete when `lows` tasks are done */
    int64_t lows;
    const char *ahead; /* memory to fetch into the cache meanwhile, for the first panel */
    int64_t stride;    /* bytes from there to that for the next panel */
    int64_t pace;      /* bytes of it to fetch for each step of the sum, for every panel */
    Later *later;      /* what compact panels fetch for the next product */
    int64_t later_lines;
} Rows;

/* How the sums of one module are finished: y = scale * sum (+ bias) (+ y). */
typedef struct {
    const float *bias;
    int64_t out;
    float scale;
    int add;
} Finish;

#ifdef PAIRS
#define PAIRED 1
#define MATRIX_BYTES(half) 4 /* of one output and step */
INLINE vec splat_step(const Input *x, int64_t k) {
    uint32_t word;
    memcpy(&word, x + 2 * k, 4);
    return splat_pair(word);
}
INLINE vec add_step(vec sum, vec x, vec w) { return add_pair(sum, x, w); }
INLINE void load_step(const void *w, int64_t index, const int half, vec *pair) {
    (void)half;
    pair[0] = load_pairs((const uint32_t *)w + index);
    pair[1] = load_pairs((const uint32_t *)w + index + LANES);
}
#else
#define PAIRED 0
#define MATRIX_BYTES(half) ((half) ? 2 : 4)
INLINE vec splat_step(const Input *x, int64_t k) { return splat(x[k]); }
INLINE vec add_step(vec sum, vec x, vec w) { return FUSED(x, w, sum); }
INLINE void load_step(const void *w, int64_t index, const int half, vec *pair) {
    load_pair(w, index, half, pair);
}
#endif

INLINE void finish_panel(const vec *sum, float *y, const Finish *finish, int64_t first) {
    int64_t count = finish->out - first;
    if (count >= PANEL) {
        for (int c = 0; c < 2; c++) {
            int64_t at = first + c * LANES;
            vec value = sum[c] * splat(finish->scale);
            if (finish->bias) value += load(finish->bias + at);
            store(y + at, finish->add ? load(y + at) + value : value);
        }
        return;
    }
    float values[PANEL];
    memcpy(values, sum, sizeof values);
    for (int64_t i = 0; i < count; i++) {
        float value = values[i] * finish->scale;
        if (finish->bias) value += finish->bias[first + i];
        y[first + i] = finish->add ? y[first + i] + value : value;
    }
}

#ifdef BLOCKS
#include "block_tiles.h"
#else
/* Fetch cache lines [first, first + count) of each adapter's rows for P panels, for `add_adapter` at the end of a
 * tile. */
INLINE void fetch_adapters(const int R, const int P, const Rows *rows, int64_t panel, int64_t first,
                           int64_t count) {
    for (int r = 0; r < R; r++) {
        if (r && rows->one_adapter) return;
        if (!rows->b[r]) continue;
        int64_t bytes = STEPS(rows->rank[r]) * PANEL * 4, end = (first + count) * 64;
        if (end > P * bytes) end = P * bytes;
        for (int64_t at = first * 64; at < end; at += 64) PREFETCH(rows->b[r] + panel * bytes + at);
    }
}

/* Fetch all of it at once, for tokens with different adapters. */
INLINE void fetch_all_adapters(const int R, const int P, const Rows *rows, int64_t panel) {
    if (!rows->one_adapter) fetch_adapters(R, P, rows, panel, 0, INT32_MAX);
}

#ifdef FAST_UNITS
/* Return the cache lines of each adapter to fetch for each group of inputs of P compact panels. Few at a time:
 * a thread has to wait if more of them are on their way than the processor can track. */
INLINE int64_t lines_per_group(const int R, const int P, const Rows *rows, int64_t in) {
    int64_t most = 0, groups = (in + GROUP_INPUTS - 1) / GROUP_INPUTS;
    for (int r = 0; r < R; r++) {
        int64_t bytes = rows->b[r] ? STEPS(rows->rank[r]) * PANEL * 4 : 0;
        most = bytes > most ? bytes : most;
    }
    return (P * most + groups * 64 - 1) / (groups * 64);
}
#endif

/* Fetch the cache lines of `bytes` bytes, which are at most those of one step of a panel. */
INLINE void fetch(const char *at, int64_t bytes, const int half) {
    PREFETCH(at);
    if (PANEL * MATRIX_BYTES(half) > 64 && bytes > 64) PREFETCH(at + 64);
}

/* Add the low-rank part for tokens with different adapters, for P panels. */
INLINE void add_adapters(const int R, const int P, const Rows *rows, int64_t panel, vec sum[][8]) {
    int64_t longest = 0;
    for (int r = 0; r < R; r++) {
        if (!rows->b[r]) continue;
        int64_t steps = STEPS(rows->rank[r]);
        longest = steps > longest ? steps : longest;
    }
    for (int64_t k = 0; k < longest; k++) {
        for (int r = 0; r < R; r++) { /* tokens take turns, so no sum waits for its own last step */
            int64_t steps = STEPS(rows->rank[r]);
            if (!rows->b[r] || k >= steps) continue;
            vec value = splat_step(rows->low[r], k);
            for (int p = 0; p < P; p++) {
                vec column[2];
                load_step(rows->b[r], ((panel + p) * steps + k) * PANEL, 0, column);
                for (int c = 0; c < 2; c++)
                    sum[r][2 * p + c] = add_step(sum[r][2 * p + c], value, column[c]);
            }
        }
    }
}

INLINE void add_adapter(const int R, const int P, const Rows *rows, int64_t panel, vec sum[][8]) {
    const int C = 2 * P;
    if (rows->lows) await_done(rows->team, rows->lows);
    if (rows->one_adapter) {
        if (!rows->b[0]) return;
        int64_t steps = STEPS(rows->rank[0]);
        for (int64_t k = 0; k < steps; k++) {
            vec column[8];
            for (int p = 0; p < P; p++)
                load_step(rows->b[0], ((panel + p) * steps + k) * PANEL, 0, column + 2 * p);
            for (int c = 0; c < C; c++)
                if (R > 3) IN_REGISTER(column[c]);
            for (int r = 0; r < R; r++) {
                vec value = splat_step(rows->low[r], k);
                IN_REGISTER(value);
                for (int c = 0; c < C; c++) sum[r][c] = add_step(sum[r][c], value, column[c]);
            }
        }
        return;
    }
    vec spilled[MAX_ROWS][8]; /* `sum` itself must stay in registers */
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) spilled[r][c] = sum[r][c];
    add_adapters(R, P, rows, panel, spilled);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = spilled[r][c];
}

/* Multiply R tokens by P panels. `w` points to the first panel, number `panel` of its module. */
INLINE void tile(const int R, const int P, const int half, const Rows *rows, const void *w,
                 int64_t in, int64_t panel, const char *ahead, const Finish *finish) {
    const int C = 2 * P;
    const int64_t pace = rows->pace;
    vec sum[MAX_ROWS][8];
    const Input *x[MAX_ROWS];
    for (int r = 0; r < R; r++) {
        x[r] = rows->x[r];
        for (int c = 0; c < C; c++) sum[r][c] = (vec){0};
    }
    fetch_all_adapters(R, P, rows, panel);
    int64_t steps = STEPS(in), step = steps * PANEL;
    for (int64_t k = 0; k < steps; k++) {
        if (R > 3) {
            vec column[8];
            for (int p = 0; p < P; p++) {
                fetch(ahead + p * rows->stride + k * pace, pace, half);
                load_step(w, p * step + k * PANEL, half, column + 2 * p);
            }
            for (int c = 0; c < C; c++) IN_REGISTER(column[c]);
            for (int r = 0; r < R; r++) {
                vec value = splat_step(x[r], k);
                IN_REGISTER(value);
                for (int c = 0; c < C; c++) sum[r][c] = add_step(sum[r][c], value, column[c]);
            }
        } else {
            vec value[MAX_ROWS];
            for (int r = 0; r < R; r++) {
                value[r] = splat_step(x[r], k);
                IN_REGISTER(value[r]);
            }
            for (int p = 0; p < P; p++) {
                vec column[2];
                fetch(ahead + p * rows->stride + k * pace, pace, half);
                load_step(w, p * step + k * PANEL, half, column);
                for (int c = 0; c < 2; c++) {
                    if (R > 1) IN_REGISTER(column[c]);
                    for (int r = 0; r < R; r++)
                        sum[r][2 * p + c] = add_step(sum[r][2 * p + c], value[r], column[c]);
                }
            }
        }
    }
    add_adapter(R, P, rows, panel, sum);
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            finish_panel(&sum[r][2 * p], rows->y[r], finish, (panel + p) * PANEL);
}

/* Compute panels [from, to) of a module for R tokens. */
INLINE void tiles(const int R, const int half, const Rows *rows, const void *w, int64_t in,
                  int64_t from, int64_t to, const Finish *finish) {
    int64_t bytes = STEPS(in) * PANEL * MATRIX_BYTES(half);
    const char *at = (const char *)w + from * bytes, *ahead = rows->ahead;
    for (; to - from >= PANELS_FOR(R); from += PANELS_FOR(R)) {
        tile(R, PANELS_FOR(R), half, rows, at, in, from, ahead, finish);
        at += PANELS_FOR(R) * bytes;
        ahead += PANELS_FOR(R) * rows->stride;
    }
    if (PANELS_FOR(R) == 1) return;
    for (; from < to; from++, at += bytes, ahead += rows->stride)
        tile(R, 1, half, rows, at, in, from, ahead, finish);
}

static void run_tiles(int num, int64_t half, const Rows *rows, const void *w, int64_t in,
                      int64_t from, int64_t to, const Finish *finish) {
#ifdef PAIRS
    (void)half;
    switch (num) {
#define CASE(R) case R: tiles(R, 1, rows, w, in, from, to, finish); break;
#else
    switch (num * 2 + (half != 0)) {
#define CASE(R)                                                            \
    case R * 2: tiles(R, 0, rows, w, in, from, to, finish); break;         \
    case R * 2 + 1: tiles(R, 1, rows, w, in, from, to, finish); break;
#endif
        EACH_NUMBER_OF_ROWS
#undef CASE
    }
}

#ifdef PAIRS
#include "expanding_tiles.h"
#endif
#endif

/* Return the panels that a thread takes at a time: enough for a tile, but many tasks per thread. */
INLINE int64_t panels_per_task(int64_t panels, int64_t threads) {
    int64_t share = panels / (threads * 6);
    return share < 1 ? 1 : share > 4 ? 4 : share;
}

/* How rows are cut into tiles: evenly, since a tile with few rows costs more per row. */
typedef struct {
    int64_t tiles, shortest, longer; /* the first `longer` tiles have one row more than `shortest` */
} Cut;

INLINE Cut cut_rows(int64_t rows) {
    int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    return (Cut){tiles, tiles ? rows / tiles : 0, tiles ? rows % tiles : 0};
}

INLINE int rows_of(const Cut *cut, int64_t number) {
    return (int)(cut->shortest + (number < cut->longer));
}

typedef struct {
    float *x; /* a scratch buffer of rows that are multiplied, `x_size` numbers each */
    int64_t x_size;
    float *y;
    int64_t y_stride;
    int add;
} Operands;

#ifdef PAIRS
/* Return a token's low-rank values; two zeros follow them, so that an odd rank ends in a pair. */
INLINE Input *low_of(const Batch *batch, int64_t token, int64_t low_stride) {
    return (Input *)(void *)batch->low_rounded + token * (low_stride + 2);
}

/* Round one panel of a token's low-rank values. */
INLINE void round_low(const Batch *batch, int64_t token, int64_t low_stride, int64_t panel,
                      int64_t out) {
    const float *from = batch->low + token * low_stride;
    Input *to = low_of(batch, token, low_stride);
    int64_t k = panel * PANEL, end = k + PANEL < out ? k + PANEL : out;
    for (; k < end; k++) to[k] = round_number(from[k]);
    if (end == out) to[out] = to[out + 1] = 0;
}
#else
INLINE Input *low_of(const Batch *batch, int64_t token, int64_t low_stride) {
    return batch->low + token * low_stride;
}
#endif

/* Return the panels of the adapter with most of them in a product with A. */
static int64_t most_low_panels(const Linear *linear, const Batch *batch) {
    int64_t most = 0;
    for (int64_t g = 0; g < batch->num_groups; g++) {
        int64_t panels = num_panels(batch->groups[g].rank * linear->num_modules);
        most = panels > most ? panels : most;
    }
    return most;
}

/* Compute one panel of low = scale x A' for the tokens of one adapter. */
static void project_down(const Linear *linear, int64_t which, const Batch *batch, const Operands *ops,
                         int64_t low_stride, const Group *group, int64_t panel) {
    const Lora *lora = group->projections ? &group->projections[which] : 0;
    int64_t out = group->rank * linear->num_modules;
    if (!lora || !lora->a || panel >= num_panels(out)) return;
    Finish finish = {0, out, group->scale, 0};
    const Cut cut = cut_rows(group->count);
    for (int64_t turn = 0, first = 0; turn < cut.tiles; first += rows_of(&cut, turn++)) {
        int num = rows_of(&cut, turn);
        Rows rows = {.one_adapter = 1, .ahead = (const char *)lora->a};
        if (turn == 0 && !lora->a_bits) { /* fetch the panel itself, some steps before they are multiplied */
            rows.pace = PANEL * 4;
            rows.ahead += panel * STEPS(linear->in) * PANEL * 4 + 32 * rows.pace;
        }
        for (int r = 0; r < num; r++) {
            int64_t token = batch->order[group->first + first + r];
            rows.x[r] = input_row(ops->x, ops->x_size, token);
            rows.y[r] = batch->low + token * low_stride;
        }
#ifdef PAIRS
        if (lora->a_bits)
            run_expanding_tiles(num, lora->a_bits, &rows, lora->a, linear->in, panel, panel + 1, 0, &finish);
        else
#endif
            run_tiles(num, 0, &rows, lora->a, linear->in, panel, panel + 1, &finish);
#ifdef PAIRS
        for (int r = 0; r < num; r++)
            round_low(batch, batch->order[group->first + first + r], low_stride, panel, out);
#endif
    }
}

/* Return this thread's scratch memory for panels of a quantised matrix. */
INLINE Word *own_panels(const Batch *batch) {
    return (Word *)(void *)(batch->expanded + omp_get_thread_num() * batch->expanded_size);
}

/* Expand panels [from, to) of a quantised module, which begins at `module`; see `expand` for `ahead`. */
static void expand_panels(Word *to_words, const Linear *linear, const char *module, int64_t from,
                          int64_t to, int64_t ahead) {
    int64_t bytes = quantised_panel_bytes(linear->in, linear->bits);
    for (int64_t p = from; p < to; p++)
        expand(to_words + (p - from) * WORDS(linear->in) * PANEL, module + p * bytes, 0, linear->in,
               linear->bits, ahead);
}

/* How a product reads a quantised matrix. */
typedef enum {
    AS_IT_IS,      /* the matrix is not quantised */
    EXPAND_FIRST,  /* into scratch memory */
    EXPAND_DIRECT, /* in registers; a second tile would expand it again */
    EXPAND_KEEP,   /* in registers by the first tile, which writes it to scratch memory for the others */
} Expanding;

INLINE Expanding expanding_of(const Linear *linear, const Cut *cut) {
    if (!linear->bits) return AS_IT_IS;
#ifdef PAIRS
    int is_compact = linear->bits == COMPACT_BITS;
#ifdef KEEPS_PANELS
    if (is_compact && cut->tiles > 1) return EXPAND_KEEP;
#endif
#ifdef FAST_UNITS
    is_compact = 0; /* they are expanded like others */
#endif
    if (cut->tiles <= 1 && !is_compact) return EXPAND_DIRECT;
#endif
    (void)cut;
    return EXPAND_FIRST;
}

/* Compute panels [from, to) of a module for a tile of `num` tokens, number `turn`. `w` points to the module's
 * first panel; `kept` to scratch memory. */
static void run_tile(int num, int64_t turn, Expanding expanding, const Linear *linear, const Rows *rows,
                     const char *w, Word *kept, int64_t from, int64_t to, int64_t skip,
                     const Finish *finish) {
    int64_t in = linear->in;
#ifdef PAIRS
    if (expanding == EXPAND_DIRECT) {
        run_expanding_tiles(num, linear->bits, rows, w, in, from, to, skip, finish);
        return;
    }
#endif
#ifdef KEEPS_PANELS
    if (expanding == EXPAND_KEEP && turn == 0) {
        run_keeping_tiles(num, rows, w, in, from, to, kept, finish);
        return;
    }
#endif
    (void)turn, (void)skip;
    if (expanding != AS_IT_IS) w = (const char *)(kept - from * WORDS(in) * PANEL);
    run_tiles(num, linear->half, rows, w, in, from, to, finish);
}

/* The products with A, whose results are added at the end of the other products of the same phase. */
typedef struct {
    Team *team;
    int64_t stride, tasks;
    Later *later; /* those of the next phase */
    int64_t later_lines;
} Lows;

/* Set the operands of a tile: entries [first, first + num) of the batch's `order`, and a module that begins at
 * output `out`. With one adapter, only the first row of `rows` names it. */
INLINE void set_rows(Rows *rows, int num, int64_t first, int64_t which, int64_t module, int64_t out,
                     const Batch *batch, const Operands *ops, int64_t low_stride) {
    const Group *group = 0;
    for (int r = 0; r < num; r++) {
        int64_t token = batch->order[first + r];
        if (r == 0 || !rows->one_adapter) {
            group = &batch->groups[batch->group_of[first + r]];
            const Lora *lora = group->projections ? &group->projections[which] : 0;
            rows->b[r] = lora && lora->a ? lora->b[module] : 0;
            rows->rank[r] = group->rank;
        }
        rows->x[r] = input_row(ops->x, ops->x_size, token);
        rows->y[r] = ops->y + token * ops->y_stride + out;
        rows->low[r] = low_of(batch, token, low_stride) + module * group->rank;
    }
}

/* Compute panels [from, to) of one module for all tokens. Meanwhile the panels that this thread will
 * probably take next, `skip` panels later, are fetched from memory. */
static void project_panels(const Linear *linear, int64_t which, int64_t module, const Batch *batch,
                           const Operands *ops, const Lows *lows, int64_t from, int64_t to,
                           int64_t skip) {
    int64_t row = 0, panel = 0;
    for (int64_t m = 0; m < module; m++) {
        row += linear->module_out[m];
        panel += num_panels(linear->module_out[m]);
    }
    int64_t steps = STEPS(linear->in), bytes = steps * PANEL * MATRIX_BYTES(linear->half);
    if (linear->bits) bytes = quantised_panel_bytes(linear->in, linear->bits);
    const Cut cut = cut_rows(batch->num_tokens);
    const char *w = (const char *)linear->weight + panel * bytes;
    Expanding expanding = expanding_of(linear, &cut);
    Word *kept = own_panels(batch);
    /* The next panels are fetched during the steps of all tiles; in float32, where expanding takes so long
     * that memory keeps up with it, while panels are expanded. */
    int fetched = linear->bits && !PAIRED;
    if (expanding == EXPAND_FIRST)
        expand_panels(kept, linear, w, from, to, fetched ? skip * bytes : 0);
    int64_t parts = cut.tiles * steps;
    Finish finish = {linear->bias ? linear->bias + row : 0, linear->module_out[module], 1, ops->add};
    for (int64_t turn = 0, first = 0; turn < cut.tiles; first += rows_of(&cut, turn++)) {
        int num = rows_of(&cut, turn);
        Rows rows = {.one_adapter = batch->group_of[first] == batch->group_of[first + num - 1],
                     .team = lows->team,
                     .later = lows->later,
                     .later_lines = lows->later_lines,
                     .lows = lows->tasks};
        rows.pace = fetched ? 0 : (bytes + parts - 1) / parts;
        rows.stride = fetched ? 0 : bytes;
        rows.ahead = w + (fetched ? from : from + skip) * bytes + turn * rows.pace * steps;
        set_rows(&rows, num, first, which, module, row, batch, ops, lows->stride);
        run_tile(num, turn, expanding, linear, &rows, w, kept, from, to, skip, &finish);
    }
}

/* Compute y = [x | low] . [W | B]', with all threads. The products with A come first; other tasks wait for
 * them before they add the adapter's part. `next` is the product after this one, or NULL. */
static void project(Team *team, const Linear *linear, int64_t which, const Batch *batch,
                    const Operands *ops, const Linear *next) {
    Lows lows = {.team = team};
#ifdef FAST_UNITS
    /* One adapter is so small that fetching it ahead takes longer than it saves. */
    Later later = {.batch = batch, .which = which + 1, .group = -1};
    if (batch->num_groups > 1) later.linear = next;
    lows.later = &later;
    lows.later_lines = later_lines(linear, &later);
#else
    (void)next;
#endif
    for (int64_t g = 0; g < batch->num_groups; g++)
        if (batch->groups[g].rank * 3 > lows.stride) lows.stride = batch->groups[g].rank * 3;
    int64_t most = lows.stride ? most_low_panels(linear, batch) : 0;
    lows.tasks = most * batch->num_groups;
    int64_t tasks[3] = {0}, step[3], total = lows.tasks;
    for (int64_t m = 0; m < linear->num_modules; m++) {
        int64_t panels = num_panels(linear->module_out[m]);
        step[m] = panels_per_task(panels, batch->num_threads);
        if (linear->bits) {
            int64_t room = batch->expanded_size / (WORDS(linear->in) * PANEL);
            step[m] = step[m] > room ? room : step[m];
        }
        tasks[m] = (panels + step[m] - 1) / step[m];
        total += tasks[m];
    }
    for (int64_t task = take_task(team); task < total; task = take_task(team)) {
        if (task < lows.tasks) {
            const Group *group = &batch->groups[task / most];
            project_down(linear, which, batch, ops, lows.stride, group, task % most);
            count_up(&team->done);
            continue;
        }
        int64_t module = 0, index = task - lows.tasks;
        while (index >= tasks[module]) index -= tasks[module++];
        int64_t from = index * step[module], to = from + step[module];
        int64_t panels = num_panels(linear->module_out[module]);
        project_panels(linear, which, module, batch, ops, &lows, from, to < panels ? to : panels,
                       step[module] * batch->num_threads);
    }
}

/* What the work on single tokens reads. */
typedef struct {
    const Model *model;
    const Layer *layer;
    int64_t index; /* of the layer */
    const float *norm;
    const Batch *batch;
} Place;

typedef void TokenWork(const Place *place, int64_t t);

/* Up to so many tokens are one thread's work: a second barrier would take longer. */
#define FEW_TOKENS 4

/* End a phase, do `work` for each token, and begin the next phase, whose matrix is `next`. */
static void each_token(Team *team, const Place *place, TokenWork *work, const void *next) {
    int64_t count = place->batch->num_tokens, threads = omp_get_num_threads();
    if (count <= FEW_TOKENS) {
        if (!last_to_arrive(team, next)) return;
        for (int64_t t = 0; t < count; t++) work(place, t);
        release(team);
        return;
    }
    meet(team, 0);
    int64_t share = (count + threads - 1) / threads, t = omp_get_thread_num() * share;
    for (int64_t end = t + share < count ? t + share : count; t < end; t++) work(place, t);
    meet(team, next);
}

/* Norm a row of batch->x for the next product. */
static void norm_token(const Place *place, int64_t t) {
    const int64_t size = place->model->hidden;
    const float *x = place->batch->x + t * size, *weight = place->norm;
    Input *out = input_row(place->batch->normed, size, t);
    float inverse = inverse_rms_of(x, size, place->model->eps);
#ifdef PAIRS
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES)
        store_rounded(out + k, load(x + k) * splat(inverse) * load(weight + k));
    for (; k < size; k++) out[k] = round_number(x[k] * inverse * weight[k]);
    if (size & 1) out[size] = 0;
#else
    norm_row(out, x, weight, inverse, size);
#endif
}

#ifndef PAIRS
static void rotate(float *head, const float *cos, const float *sin, int64_t dim) {
    int64_t half = dim / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        vec first = load(head + i), second = load(head + i + half);
        store(head + i, first * load(cos + i) - second * load(sin + i));
        store(head + i + half, second * load(cos + i + half) + first * load(sin + i + half));
    }
    for (; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}
#endif

/* Return the keys of a head that a token attends to; its values begin C rows later. */
INLINE Stored *keys_of(const Model *model, const Batch *batch, int64_t index, int64_t t, int64_t h) {
    return batch->kv[t] + index * batch->kv_stride[t] + h * 2 * batch->capacity[t] * model->head_dim;
}

INLINE void store_head(Stored *to, const float *from, int64_t dim) {
#ifdef PAIRS
    round_row(to, from, dim);
#else
    memcpy(to, from, (size_t)dim * sizeof(float));
#endif
}

/* Norm and rotate the queries and keys of a token; write keys and values into the cache. */
static void store_keys(const Place *place, int64_t t) {
    const Model *model = place->model;
    const Batch *batch = place->batch;
    int64_t dim = model->head_dim, heads = model->heads, kv_heads = model->kv_heads;
    float *row = batch->wide + t * (heads + 2 * kv_heads) * dim;
    int64_t position = batch->positions[t];
    const float *cos = batch->cos + position * dim, *sin = batch->sin + position * dim;
    for (int64_t h = 0; h < heads + kv_heads; h++) {
        float *head = row + h * dim;
        const float *norm = h < heads ? place->layer->q_norm : place->layer->k_norm;
        if (norm) norm_row(head, head, norm, inverse_rms_of(head, dim, model->eps), dim);
#ifdef PAIRS
        float scale = h < heads ? 1.0f / sqrtf((float)dim) : 1.0f;
        turn_head(head, head, cos, sin, dim / 2, scale, 1.0f);
#else
        rotate(head, cos, sin, dim);
#endif
    }
    for (int64_t h = 0; h < kv_heads; h++) {
        Stored *keys = keys_of(model, batch, place->index, t, h) + position * dim;
        store_head(keys, row + (heads + h) * dim, dim);
        store_head(keys + batch->capacity[t] * dim, row + (heads + kv_heads + h) * dim, dim);
    }
}

static Past past_of(const Model *model, const Batch *batch, int64_t index, int64_t t, int64_t h) {
    int64_t dim = model->head_dim, split = batch->same_length[t];
    int64_t source = split ? batch->same_as[t] : t;
    const Stored *keys = keys_of(model, batch, index, t, h);
    const Stored *begin = keys_of(model, batch, index, source, h);
    return (Past){.begin_keys = begin,
                  .begin_values = begin + batch->capacity[source] * dim,
                  .keys = keys,
                  .values = keys + batch->capacity[t] * dim,
                  .split = split};
}

/* Let the tokens of a span fetch the keys of another task's tokens, which may not exist: those that no other
 * token reads. */
static void look_ahead(Looking *tokens, int64_t count, const Model *model, int64_t index,
                       const Batch *batch, int64_t task) {
    int64_t h = task / batch->num_spans, span = task % batch->num_spans;
    if (h >= model->kv_heads) return;
    int64_t first = batch->spans[span], next = batch->spans[span + 1] - first;
    for (int64_t i = 0; i < count && i < next; i++) {
        int64_t t = first + i;
        if (t && batch->kv[t] == batch->kv[t - 1]) continue; /* of the same sequence */
        tokens[i].ahead = keys_of(model, batch, index, t, h);
        tokens[i].ahead_from = batch->same_length[t];
        tokens[i].ahead_to = batch->positions[t] + 1;
    }
}

static void attend_all(Team *team, const Model *model, int64_t index, const Batch *batch) {
    int64_t dim = model->head_dim, heads = model->heads, kv_heads = model->kv_heads;
    int64_t shared = heads / kv_heads, width = (heads + 2 * kv_heads) * dim;
    int64_t stride = batch->max_position + 1 + LANES;
#ifdef PAIRS
    float factor = 1; /* the queries are scaled already, as in training */
#else
    float factor = 1.0f / sqrtf((float)dim);
#endif
    float *scores = batch->scores + omp_get_thread_num() * SPAN * SPAN_HEADS * stride;
    int64_t tasks = batch->num_spans * kv_heads;
    for (int64_t task = take_task(team); task < tasks; task = take_task(team)) {
        /* Head by head, so that sequences with the same beginning read it from the cache. */
        int64_t span = task % batch->num_spans, h = task / batch->num_spans;
        int64_t first = batch->spans[span], count = batch->spans[span + 1] - first;
        Looking tokens[SPAN];
        for (int64_t i = 0; i < count; i++) {
            int64_t t = first + i;
            float *q = batch->wide + t * width + h * shared * dim;
            Input *out = input_row(batch->act, heads * dim, t) + h * shared * dim;
#ifdef PAIRS
            tokens[i] = (Looking){.q = q, .out = q, .rounded = out};
#else
            tokens[i] = (Looking){.q = q, .out = out};
#endif
            tokens[i].past = past_of(model, batch, index, t, h);
            tokens[i].length = batch->positions[t] + 1;
            int same = i && batch->kv[t] == batch->kv[t - 1]; /* then the token before fetches them */
            tokens[i].fetch_from = same ? tokens[i].length : batch->same_length[t];
        }
        look_ahead(tokens, count, model, index, batch, task + batch->num_threads);
        attend_group(tokens, count, shared, dim, factor, scores, stride);
    }
}

static void gate(const Place *place, int64_t t) {
    int64_t inner = place->model->inner, k = 0;
    const float *g = place->batch->wide + t * 2 * inner, *up = g + inner;
    Input *out = input_row(place->batch->act, inner, t);
#ifdef PAIRS
    for (; k + LANES <= inner; k += LANES)
        store_rounded(out + k, swiglu(load(g + k), load(up + k)));
    for (; k < inner; k++) out[k] = round_number(swiglu_of_one(g[k], up[k]));
    if (inner & 1) out[inner] = 0;
#else
    for (; k + LANES <= inner; k += LANES) {
        vec value = load(g + k);
        ivec negative = value < (vec){0};
        vec minus_abs = (vec)((negative & (ivec)value) | (~negative & (ivec)(-value)));
        vec e = exp_vec(minus_abs); /* sigmoid without overflow on either side */
        vec top = (vec)((negative & (ivec)e) | (~negative & (ivec)splat(1.0f)));
        store(out + k, value * top / (splat(1.0f) + e) * load(up + k));
    }
    for (; k < inner; k++) out[k] = swiglu_of_one(g[k], up[k]);
#endif
}

#ifdef PAIRS
#define forward_blocks forward_blocks_pairs
#define forward_head forward_head_pairs
#define forward_to_logits forward_to_logits_pairs
#endif

/* Run layer `index`, whose input is normed; norm that of the next one. Called by all threads. */
static void run_layer(Team *team, const Model *model, const Batch *batch, int64_t index) {
    const Layer *layer = &model->layers[index];
    int64_t hidden = model->hidden, dim = model->head_dim, inner = model->inner;
    int64_t q_size = model->heads * dim, qkv = q_size + 2 * model->kv_heads * dim;
    const Linear *following = index + 1 < model->num_layers ? &layer[1].qkv : &model->head;
    Place place = {model, layer, index, layer->post_norm, batch};
    Operands ops = {batch->normed, hidden, batch->wide, qkv, 0};
    project(team, &layer->qkv, index * 4, batch, &ops, &layer->o);
    each_token(team, &place, store_keys, 0);
    attend_all(team, model, index, batch);
    meet(team, layer->o.weight);
    ops = (Operands){batch->act, q_size, batch->x, hidden, 1};
    project(team, &layer->o, index * 4 + 1, batch, &ops, &layer->gate_up);
    each_token(team, &place, norm_token, layer->gate_up.weight);
    ops = (Operands){batch->normed, hidden, batch->wide, 2 * inner, 0};
    project(team, &layer->gate_up, index * 4 + 2, batch, &ops, &layer->down);
    each_token(team, &place, gate, layer->down.weight);
    ops = (Operands){batch->act, inner, batch->x, hidden, 1};
    project(team, &layer->down, index * 4 + 3, batch, &ops, following);
    if (index + 1 == model->num_layers) return;
    place.norm = layer[1].input_norm;
    each_token(team, &place, norm_token, layer[1].qkv.weight);
}

/* Run all blocks. Called by all threads. */
static void run_blocks(Team *team, const Model *model, const Batch *batch) {
    Place first = {model, model->layers, 0, model->layers->input_norm, batch};
    each_token(team, &first, norm_token, model->layers->qkv.weight);
    for (int64_t index = 0; index < model->num_layers; index++) run_layer(team, model, batch, index);
}

/* Run the final norm and the head. Called by all threads. */
static void run_head(Team *team, const Model *model, const Batch *batch, float *logits) {
    Place place = {model, 0, 0, model->final_norm, batch};
    each_token(team, &place, norm_token, model->head.weight);
    Operands ops = {batch->normed, model->hidden, logits, model->head.out, 0};
    project(team, &model->head, model->num_layers * 4, batch, &ops, 0);
}

/* Run all blocks: batch->x holds embeddings before, and hidden states without final norm after. */
void forward_blocks(const Model *model, const Batch *batch) {
    Team team = {0};
#pragma omp parallel num_threads((int)batch->num_threads)
    {
        run_blocks(&team, model, batch);
        close_blocks();
    }
}

/* Run the final norm and the head: from batch->x [N, hidden] to logits [N, V]. */
void forward_head(const Model *model, const Batch *batch, float *logits) {
    Team team = {0};
#pragma omp parallel num_threads((int)batch->num_threads)
    {
        run_head(&team, model, batch, logits);
        close_blocks();
    }
}

/* Run all blocks and the head: threads are woken once for both. */
void forward_to_logits(const Model *model, const Batch *batch, float *logits) {
    Team team = {0};
#pragma omp parallel num_threads((int)batch->num_threads)
    {
        run_blocks(&team, model, batch);
        run_head(&team, model, batch, logits);
        close_blocks();
    }
}

#ifndef PAIRS
int64_t span_tokens(void) { return SPAN; }
int64_t span_heads(void) { return SPAN_HEADS; }

int64_t struct_size(int64_t which) {
    const int64_t sizes[] = {sizeof(Linear), sizeof(Lora), sizeof(Layer),
                             sizeof(Model),  sizeof(Group), sizeof(Batch)};
    return sizes[which];
}
#endif
