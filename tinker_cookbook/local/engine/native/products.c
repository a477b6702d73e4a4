/* Products of many rows with frozen packed matrices and low-rank adapters, in float32 or, with PAIRS, of
 * rows and matrices in bfloat16 (`pair_products.c`).
 *
 * A call computes parts (results) as sums over terms: part = sum over terms of term.x . term.right[part].
 * The first terms read rows that are given, later ones read a part that has no other terms than the first.
 * So one call computes
 *
 *     forward:   low = scale x A'                y = x W' + low B'           (per stacked module)
 *     backward:  low_grad = scale y_grad B       x_grad = y_grad W + low_grad A
 *
 * In a first phase, threads pack rows and compute the parts that later terms read. In a second one they
 * share out the other parts by blocks of rows and ranges of panels: many rows use each strip of a matrix,
 * and an output stays in registers over all terms, or over as many as the caches hold.
 *
 * One copy of a matrix serves both directions; in bfloat16 it needs half the memory traffic. An output is
 * one chain of sums in the order of the terms, as in `decode_kernels.c`: its bits do not depend on how rows
 * are grouped.
 */
#include "tiles.h"

#define MAX_TERMS 4
#define MAX_PARTS 4
/* Units of MR rows in a block. */
#define MAX_UNITS ((LANES >= 16 ? 240 : 504) / MR)
/* Words of a row that a block reads before it turns to the next panel: as many as the second-level cache
 * holds for all its rows. With vectors of 8, strips should stay in the first-level cache. */
#define GROUP_WORDS (LANES >= 16 ? 640 : 352)
#define MAX_SEGMENTS 8
/* Several threads cut the second phase into at least so many tasks each. They take tasks in turns, so that
 * a thread that another program interrupts does not hold up the others for long. */
#define TASKS_PER_THREAD 24
/* Units in a task of the first phase. */
#define PACK_UNITS ((60 + MR - 1) / MR)
/* Words that are packed at a time, for all threads together. */
#define SHARED_WORDS (1 << 21)
/* Units that are packed at a time even if they exceed that. */
#define LEAST_AT_ONCE (480 / MR)

typedef struct {
    const float *x; /* [rows, count] */
    int64_t stride, count;
    Right right[MAX_PARTS];
} Term;

typedef struct {
    int64_t rows, threads, num_terms, num_parts;
    int64_t num_given; /* terms that read no part */
    float *scratch;    /* product_scratch() or product_pairs_scratch() floats */
    Term terms[MAX_TERMS];
    Part parts[MAX_PARTS];
} Product;

/* Some units of the rows that are packed at a time. */
typedef struct {
    const Product *p;
    Word *packed;     /* [terms, slices, units, words, MR] */
    int64_t units;    /* that are packed at a time */
    int64_t row;      /* the first of them */
    int64_t unit, end; /* the task's units, counted from that row */
    int64_t from, to; /* inputs that are packed at a time; only a single term is cut */
    Word *space;      /* of this thread */
} Work;

/* One slice of a term, as a task reads it. */
typedef struct {
    const Word *x, *w; /* w: its strip for the panel in work */
    const uint16_t *half; /* if not NULL, the first tile fills the strip from here */
    const Right *right;
    int64_t from, count, words;
} Segment;

typedef struct {
    Segment of[MAX_SEGMENTS];
    int64_t num, words;
    int first, last; /* whether the group begins and completes its outputs */
} Group;

/* Return the height of a term's slices: at most STRIP. */
INLINE int64_t slice_height(const Term *term) {
    int64_t slices = (term->count + STRIP - 1) / STRIP;
    return ((term->count + slices - 1) / slices + SLICE_STEP - 1) / SLICE_STEP * SLICE_STEP;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t num_panels(int64_t outs) { return (outs + PANEL - 1) / PANEL; }

/* Return the packed rows of a term from its input `from` on. */
INLINE Word *packed_at(const Work *work, int64_t term, int64_t from) {
    int64_t words = PACKED_WORDS(from - work->from);
    for (int64_t n = 0; n < term; n++) words += PACKED_WORDS(work->p->terms[n].count);
    return work->packed + work->units * MR * words;
}

/* Return the row after the task's last one, counted like `unit`. */
INLINE int64_t last_row(const Work *work) {
    return least(work->end * MR, work->p->rows - work->row);
}

static void pack_term(const Work *work, int64_t n) {
    const Term *term = &work->p->terms[n];
    int64_t first = work->unit * MR, height = slice_height(term);
    const float *x = term->x + (work->row + first) * term->stride;
    for (int64_t from = work->from; from < least(term->count, work->to); from += height) {
        int64_t count = least(term->count - from, height);
        pack_rows(packed_at(work, n, from) + first * PACKED_WORDS(count), x + from, term->stride,
                  last_row(work) - first, count);
    }
}

/* Compute a tile; with `fills`, strips are filled as well. */
INLINE void tile_of(const int R, const int fills, const Group *group, int64_t row, const Tile *t) {
    Sums sum;
    begin_tile(R, sum, t);
    for (int64_t i = 0; i < group->num; i++) {
        const Segment *s = &group->of[i];
        const Word *x = s->x + row * s->words;
#ifndef PAIRS
        if (fills && s->half) {
            add_half_strip(R, sum, x, s->half, (float *)s->w, s->words);
            continue;
        }
#endif
        add_strip(R, sum, x, s->w, s->words);
    }
    finish_tile(R, sum, t);
}

static void run_tile_of(int rows, const Group *group, int64_t row, const Tile *t) {
#ifdef BLOCKS
    tile_of(rows, 0, group, row, t);
#else
    switch (rows) {
#define CASE(R) case R: tile_of(R, 0, group, row, t); break;
        EACH_HEIGHT
#undef CASE
    }
#endif
}

/* What is fetched into the cache of the panel after the one in work. */
typedef struct {
    Fetching fetching;
    int64_t segment, lines_per_tile;
} Ahead;

INLINE void fetch_ahead(const Group *group, Ahead *ahead, int64_t out) {
    int64_t left = ahead->lines_per_tile;
    for (; ahead->segment < group->num; ahead->segment++) {
        const Segment *s = &group->of[ahead->segment];
        left = fetch_lines(&ahead->fetching, s->right, s->from, s->count, out, left);
        if (!left) return;
        ahead->fetching = (Fetching){0};
    }
}

/* Return the tile of a part at the given row and output. */
INLINE Tile tile_at(const Part *part, const Group *group, int64_t row, int64_t out) {
    return (Tile){.y = part->y + row * part->stride + out,
                  .stride = part->stride,
                  .bias = group->last && part->bias ? part->bias + out : 0,
                  .start = group->last && part->start ? part->start + row * part->start_stride + out : 0,
                  .start_stride = part->start_stride,
                  .scale = part->scale,
                  .first = group->first,
                  .last = group->last};
}

/* Multiply the task's rows by one panel. Meanwhile the results of the next tiles and the next panel are
 * fetched into the cache. */
static void run_panel(const Work *work, const Part *part, Group *group, int64_t out) {
    Word *space = work->space;
    int fills = last_row(work) - work->unit * MR >= MR && part->outs - out >= PANEL;
    Ahead ahead = {.lines_per_tile = 2 * group->words * PANEL / 16 / (work->end - work->unit) + 1};
    for (int64_t i = 0; i < group->num; i++) {
        Segment *s = &group->of[i];
        s->half = fills ? half_strip(s->right, s->from, out) : 0;
        s->w = s->half ? space : strip(space, s->right, s->from, s->count, out, part->outs);
        space += s->words * PANEL;
    }
    if (out + PANEL >= part->outs) ahead.segment = group->num;
    for (int64_t row = work->unit * MR, end = last_row(work); row < end; row += MR) {
        int num = (int)least(end - row, MR);
        Tile t = tile_at(part, group, work->row + row, out);
        for (int64_t i = 0; i < MR; i++) __builtin_prefetch(t.y + (MR + i) * part->stride, 1, 3);
        fetch_ahead(group, &ahead, out + PANEL);
        if (part->outs - out < PANEL) {
            Edge edge;
            Tile copy = copy_edge(&edge, num, &t, part->outs - out);
            run_tile_of(num, group, row, &copy);
            write_edge(&edge, num, &t, part->outs - out);
        } else if (fills) {
            tile_of(MR, 1, group, row, &t);
            fills = 0;
        } else if (num == MR) {
            tile_of(MR, 0, group, row, &t);
        } else {
            run_tile_of(num, group, row, &t);
        }
    }
}

/* Compute the task's rows of one part, panels [panel, end). */
static void run_part(const Work *work, int64_t number, int64_t panel, int64_t end) {
    const Product *p = work->p;
    Group group = {.first = work->from == 0};
    int64_t last = p->num_terms - 1;
    while (last >= 0 && !p->terms[last].right[number].at) last--;
    for (int64_t n = 0; n <= last; n++) {
        const Term *term = &p->terms[n];
        if (!term->right[number].at) continue;
        int64_t height = slice_height(term);
        for (int64_t from = work->from; from < least(term->count, work->to); from += height) {
            int64_t count = least(term->count - from, height), words = PACKED_WORDS(count);
            if (group.num == MAX_SEGMENTS || (group.num && group.words + words > GROUP_WORDS)) {
                for (int64_t i = panel; i < end; i++)
                    run_panel(work, &p->parts[number], &group, i * PANEL);
                group.num = group.words = group.first = 0;
            }
            group.of[group.num++] = (Segment){.x = packed_at(work, n, from),
                                              .right = &term->right[number],
                                              .from = from,
                                              .count = count,
                                              .words = words};
            group.words += words;
        }
    }
    group.last = work->to >= p->terms[last].count;
    for (int64_t i = panel; i < end; i++) run_panel(work, &p->parts[number], &group, i * PANEL);
}

/* Return whether later terms read a part: it has none of them itself. */
INLINE int is_early(const Product *p, int64_t part) {
    for (int64_t n = p->num_given; n < p->num_terms; n++)
        if (p->terms[n].right[part].at) return 0;
    return p->num_given < p->num_terms;
}

/* Pack the task's rows and compute the parts that later terms read. */
static void prepare(const Work *work) {
    const Product *p = work->p;
    for (int64_t n = 0; n < p->num_given; n++) pack_term(work, n);
    for (int64_t i = 0; i < p->num_parts; i++)
        if (is_early(p, i)) run_part(work, i, 0, num_panels(p->parts[i].outs));
    for (int64_t n = p->num_given; n < p->num_terms; n++) pack_term(work, n);
}

/* Compute panels [panel, end) of the other parts, counted over all of them. */
static void run_panels(const Work *work, int64_t panel, int64_t end) {
    const Product *p = work->p;
    for (int64_t i = 0; i < p->num_parts; i++) {
        if (is_early(p, i)) continue;
        int64_t num = num_panels(p->parts[i].outs);
        if (panel < num && end > 0) run_part(work, i, panel > 0 ? panel : 0, least(end, num));
        panel -= num, end -= num;
    }
}

static int64_t count_panels(const Product *p) {
    int64_t panels = 0;
    for (int64_t i = 0; i < p->num_parts; i++)
        if (!is_early(p, i)) panels += num_panels(p->parts[i].outs);
    return panels;
}

#define SPACE_WORDS (GROUP_WORDS * PANEL)

/* Return the words of one packed unit. */
INLINE int64_t unit_words(const Product *p) {
    int64_t words = 0;
    for (int64_t n = 0; n < p->num_terms; n++) words += PACKED_WORDS(p->terms[n].count);
    return words * MR;
}

/* Return how many units are packed at a time. */
static int64_t units_at_once(const Product *p) {
    int64_t units = (p->rows + MR - 1) / MR, most = SHARED_WORDS / unit_words(p);
    if (most < LEAST_AT_ONCE) most = LEAST_AT_ONCE;
    int64_t rounds = (units + most - 1) / most;
    return rounds ? (units + rounds - 1) / rounds : 0;
}

/* Return how many inputs are packed at a time: whole slices of a single term, or all. */
static int64_t inputs_at_once(const Product *p) {
    int64_t words = SHARED_WORDS / (units_at_once(p) * MR + 1), height = slice_height(p->terms);
    int64_t slices = words / PACKED_WORDS(height);
    if (p->num_terms > 1) return INT64_MAX / 2;
    return (slices > 0 ? slices : 1) * height;
}

static int64_t packed_words(const Product *p) {
    int64_t words = unit_words(p);
    if (p->num_terms == 1) words = least(words, PACKED_WORDS(inputs_at_once(p)) * MR);
    return units_at_once(p) * words;
}

/* Compute the packed units; all threads call it. */
static void run_units(Work work, int64_t units) {
    int64_t threads = work.p->threads, panels = count_panels(work.p);
    int64_t blocks = (units + MAX_UNITS - 1) / MAX_UNITS;
    int64_t packs = (units + PACK_UNITS - 1) / PACK_UNITS;
    int64_t ranges = threads > 1 ? (threads * TASKS_PER_THREAD + blocks - 1) / blocks : 1;
    if (ranges > panels) ranges = panels;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < packs; n++) {
        work.unit = units * n / packs, work.end = units * (n + 1) / packs;
        prepare(&work);
    }
    /* Tasks with the same panels are neighbours, so that threads find them in a shared cache. */
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < blocks * ranges; n++) {
        int64_t block = n % blocks, range = n / blocks;
        work.unit = units * block / blocks, work.end = units * (block + 1) / blocks;
        run_panels(&work, panels * range / ranges, panels * (range + 1) / ranges);
    }
}

int omp_get_thread_num(void);

#ifdef PAIRS
void product_pairs(const Product *p) {
#else
void product(const Product *p) {
#endif
    int64_t units = (p->rows + MR - 1) / MR, each = units_at_once(p), step = inputs_at_once(p);
#pragma omp parallel num_threads((int)least(p->threads, units))
    {
        Word *space = (Word *)(void *)p->scratch + omp_get_thread_num() * SPACE_WORDS;
        Word *packed = (Word *)(void *)p->scratch + p->threads * SPACE_WORDS;
        open_blocks(MR);
        for (int64_t unit = 0; unit < units; unit += each) {
            Work work = {.p = p, .packed = packed, .units = each, .row = unit * MR, .space = space};
            do {
                work.to = work.from + step;
                run_units(work, least(units - unit, each));
                work.from = work.to;
            } while (p->num_terms == 1 && work.from < p->terms->count);
        }
        close_blocks();
    }
}

/* Return the floats of scratch memory for a call; a word of pairs is as large as a float. */
#ifdef PAIRS
int64_t product_pairs_scratch(const Product *p) {
#else
int64_t product_scratch(const Product *p) {
#endif
    return p->threads * SPACE_WORDS + packed_words(p);
}

#ifndef PAIRS
int64_t panel_width(void) { return PANEL; }

int64_t product_struct_size(int64_t which) {
    const int64_t sizes[] = {sizeof(Right), sizeof(Term), sizeof(Part), sizeof(Product)};
    return sizes[which];
}
#endif
