/* Tiled products of float32 rows, for kernels with many rows.
 *
 * With PAIRS, rows and right sides are rounded to bfloat16 and multiplied in pairs (`pairs.h`), or with BLOCKS
 * as well in blocks of pairs (`blocks.h`); sums and results are float32 all the same. `float_strips.h` and
 * `pair_strips.h` bring operands into one layout.
 *
 * A block of rows is packed, MR side by side, and stays in the second-level cache. A strip of PANEL
 * outputs of the right side is brought into the first-level cache, whatever its layout and format in
 * memory, and is used for all rows of the block. The blocking is that of Goto and van de Geijn, "Anatomy
 * of High-Performance Matrix Multiplication" (2008). An output is one chain of sums.
 */
#ifndef TILES_H
#define TILES_H
#include "pairs.h"

#ifndef PAIRS
#undef BLOCKS
#endif

#define PANEL (2 * LANES)
#ifndef BLOCKS
/* Rows in a tile. A tile with 12 of them reads a strip half as often, whose vectors come from the second-level
 * cache; with pairs, other limits are reached first. */
#if LANES == 16 && !defined(PAIRS)
#define MR 12
#define EACH_HEIGHT CASES_TO_12
#else
#define MR 6
#define EACH_HEIGHT CASES_TO_6
#endif
#endif
/* Words in a strip for each output: with vectors of 8 a strip fills 18 KiB of the first-level cache, and
 * with vectors of 16 the second-level cache is fast enough. A word is a number, or a pair of them;
 * WORDS(count) are what `count` numbers take in a matrix, PACKED_WORDS(count) what they take in packed rows
 * and strips. */
#define STRIP_WORDS 288
#ifdef PAIRS
typedef uint32_t Word;
#define WORDS(count) (((count) + 1) / 2)
#define STRIP (2 * STRIP_WORDS)
#else
typedef float Word;
#define WORDS(count) (count)
#define STRIP STRIP_WORDS
#endif

#include "quantised.h"
#ifdef BLOCKS
#include "blocks.h"
#define PACKED_WORDS(count) (NUM_BLOCKS(WORDS(count)) * BLOCK)
#define SLICE_STEP (2 * BLOCK) /* inputs: slices end where blocks do */
#else
#define PACKED_WORDS(count) WORDS(count)
#define SLICE_STEP PANEL
INLINE void open_blocks(int64_t rows) { (void)rows; }
INLINE void close_blocks(void) {}
#endif

typedef enum { PANELS, PANELS_TURNED, ROWS, COLUMNS } Layout;

/* The right side of a product, [count, outs]. */
typedef struct {
    const void *at; /* NULL if the term does not add to this part */
    int64_t layout; /* PANELS: packed [panels, stride, PANEL], an output is a row of the matrix (x W');
                     * PANELS_TURNED: the same memory, an output is a column (grad W);
                     * ROWS, COLUMNS: float32 [count, outs] and [outs, count], rows `stride` apart */
    int64_t half;   /* whether a packed matrix is in bfloat16; always with PAIRS */
    int64_t stride;
    int64_t bits; /* 8 or 4 if a packed matrix is quantised (`quantised.h`), 12 if it is compact
                   * (`compact.h`), otherwise 0 */
} Right;

/* One result: y = scale * sum (+ bias) (+ start). */
typedef struct {
    float *y; /* [rows, outs] */
    int64_t stride, outs;
    const float *bias, *start; /* [outs], [rows, outs], or NULL */
    int64_t start_stride;
    float scale;
} Part;

/* Return a quantised panel of a right side. */
INLINE const char *quantised_panel(const Right *right, int64_t panel) {
    return (const char *)right->at + panel * quantised_panel_bytes(right->stride, right->bits);
}

/* Return the cache lines of the numbers in a square block of a quantised panel. */
INLINE int64_t square_lines(const Right *right) {
    return (PANEL * PANEL * right->bits / 8 + 63) / 64;
}

/* The memory that holds a strip of a packed matrix consists of runs of neighbouring cache lines: one, or with
 * PANELS_TURNED a square block of every panel. */
INLINE int64_t source_runs(const Right *right, int64_t count) {
    return right->layout == PANELS ? 1 : (count + PANEL - 1) / PANEL;
}

/* Return run `n` of the memory that holds a quantised strip; see `source_run`. */
INLINE const char *quantised_run(const Right *right, int64_t from, int64_t out, int64_t n) {
#ifdef PAIRS
    if (right->bits == COMPACT_BITS) {
        if (right->layout == PANELS) return unit_of(quantised_panel(right, out / PANEL), from / UNIT);
        return unit_of(quantised_panel(right, from / PANEL + n), out / UNIT);
    }
#endif
    int64_t bytes = block_bytes(right->bits);
    if (right->layout == PANELS) return quantised_panel(right, out / PANEL) + from / GROUP * bytes;
    return quantised_panel(right, from / PANEL + n) + out / GROUP * bytes +
           out % GROUP * PANEL * right->bits / 8;
}

#if defined(__AVX2__)
/* Transpose eight rows of eight; the columns are written `step` floats apart. */
INLINE void turn_8(const __m256 *row, float *to, int64_t step) {
    __m256 pair[8], four[8];
    for (int i = 0; i < 4; i++) {
        pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            four[4 * i + 2 * j] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + 2 + j], 0x44);
            four[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * step, _mm256_permute2f128_ps(four[i], four[4 + i], 0x20));
    }
    for (int i = 0; i < 4; i++)
        _mm256_storeu_ps(to + (4 + i) * step, _mm256_permute2f128_ps(four[i], four[4 + i], 0x31));
}
#endif

/* Transpose: to[j * step + i] = from[i * stride + j] for i < rows, j < columns. */
static void turn(float *to, int64_t step, const float *from, int64_t stride, int64_t rows,
                 int64_t columns) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= rows; i += 8) {
        int64_t j = 0;
        for (; j + 8 <= columns; j += 8) {
            __m256 row[8];
            for (int r = 0; r < 8; r++) row[r] = _mm256_loadu_ps(from + (i + r) * stride + j);
            turn_8(row, to + j * step + i, step);
        }
        for (; j < columns; j++)
            for (int r = 0; r < 8; r++) to[j * step + i + r] = from[(i + r) * stride + j];
    }
#endif
    for (; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[j * step + i] = from[i * stride + j];
}

#ifdef PAIRS
#include "pair_strips.h"
#else
#include "float_strips.h"
#endif

/* Memory of a packed matrix that is being fetched into the cache: the rest of a run, and the next run. */
typedef struct {
    const char *at, *end;
    int64_t run;
} Fetching;

/* Fetch up to `most` cache lines of a strip's memory; return how many of them it did not need. */
INLINE int64_t fetch_lines(Fetching *f, const Right *right, int64_t from, int64_t count, int64_t out,
                           int64_t most) {
    if (right->layout != PANELS && right->layout != PANELS_TURNED) return most;
    for (;;) {
        for (; most > 0 && f->at < f->end; f->at += 64, most--) PREFETCH(f->at);
        if (most == 0 || f->run == source_runs(right, count)) return most;
        f->at = source_run(right, from, out, f->run++);
        f->end = f->at + 64 * run_lines(right, count);
    }
}

/* The place of a tile in its part, and how to finish its sums. */
typedef struct {
    float *y;
    int64_t stride;
    const float *bias, *start; /* at this tile; NULL if there is none or the sums are incomplete */
    int64_t start_stride;
    float scale;
    int first, last;
} Tile;

#ifdef BLOCKS
INLINE void begin_tile(const int R, Sums sum, const Tile *t) {
    for (int r = 0; r < R && !t->first; r++)
        for (int c = 0; c < 2; c++) store(sum[r] + c * LANES, load(t->y + r * t->stride + c * LANES));
    begin_blocks(R, sum, t->first);
}

/* Multiply R rows by PANEL outputs, over one strip. */
INLINE void add_strip(const int R, Sums sum, const Word *x, const Word *w, int64_t words) {
    add_blocks(R, sum, (BlockRows){x, BLOCK, MR * BLOCK}, w, words / BLOCK);
}

INLINE vec sum_of(Sums sum, int r, int c) { return load(sum[r] + c * LANES); }
#else
/* The sums of R rows and PANEL outputs. */
typedef vec Sums[MR][2];

INLINE void begin_tile(const int R, Sums sum, const Tile *t) {
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 2; c++)
            sum[r][c] = t->first ? (vec){0} : load(t->y + r * t->stride + c * LANES);
}

/* Multiply R rows by PANEL outputs, over one strip. */
INLINE void add_strip(const int R, Sums sum, const Word *x, const Word *w, int64_t words) {
    for (int64_t k = 0; k < words; k++, x += MR, w += PANEL) {
        vec w0 = load_word(w), w1 = load_word(w + LANES);
        IN_REGISTER(w0);
        IN_REGISTER(w1);
        for (int r = 0; r < R; r++) {
            vec value = splat_word(x[r]);
            IN_REGISTER(value);
            sum[r][0] = add_product(sum[r][0], value, w0);
            sum[r][1] = add_product(sum[r][1], value, w1);
        }
    }
}

#ifndef PAIRS
/* The same with a panel in bfloat16, which is stored as a strip at `w` for the tiles after this one. */
INLINE void add_half_strip(const int R, Sums sum, const float *x, const uint16_t *half, float *w,
                           int64_t words) {
    for (int64_t k = 0; k < words; k++, x += MR, w += PANEL, half += PANEL) {
        vec pair[2];
        load_pair(half, 0, 1, pair);
        IN_REGISTER(pair[0]);
        IN_REGISTER(pair[1]);
        store(w, pair[0]);
        store(w + LANES, pair[1]);
        for (int r = 0; r < R; r++) {
            vec value = splat(x[r]);
            IN_REGISTER(value);
            sum[r][0] = FUSED(value, pair[0], sum[r][0]);
            sum[r][1] = FUSED(value, pair[1], sum[r][1]);
        }
    }
}
#endif

INLINE vec sum_of(Sums sum, int r, int c) { return sum[r][c]; }
#endif

INLINE void finish_tile(const int R, Sums sum, const Tile *t) {
#ifdef BLOCKS
    end_blocks(R, sum);
#endif
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < 2; c++) {
            vec value = sum_of(sum, r, c);
            if (t->last) {
                value *= splat(t->scale);
                if (t->bias) value += load(t->bias + c * LANES);
                if (t->start) value = load(t->start + r * t->start_stride + c * LANES) + value;
            }
            store(t->y + r * t->stride + c * LANES, value);
        }
    }
}

INLINE void tile(const int R, const Word *x, const Word *w, int64_t words, const Tile *t) {
    Sums sum;
    begin_tile(R, sum, t);
    add_strip(R, sum, x, w, words);
    finish_tile(R, sum, t);
}

static void run_tile(int rows, const Word *x, const Word *w, int64_t words, const Tile *t) {
#ifdef BLOCKS
    tile(rows, x, w, words, t);
#else
    switch (rows) {
#define CASE(R) case R: tile(R, x, w, words, t); break;
        EACH_HEIGHT
#undef CASE
    }
#endif
}

/* Copies of what a tile narrower than PANEL reads and writes. */
typedef struct {
    float y[MR * PANEL], start[MR * PANEL], bias[PANEL];
} Edge;

/* Return a tile that works on copies of what `t` reads: `outs` outputs. */
INLINE Tile copy_edge(Edge *edge, int rows, const Tile *t, int64_t outs) {
    size_t bytes = (size_t)outs * sizeof(float);
    Tile copy = *t;
    memset(edge, 0, sizeof *edge);
    copy.y = edge->y, copy.stride = PANEL;
    if (t->bias) copy.bias = memcpy(edge->bias, t->bias, bytes);
    for (int r = 0; r < rows; r++) {
        if (!t->first) memcpy(edge->y + r * PANEL, t->y + r * t->stride, bytes);
        if (t->start) memcpy(edge->start + r * PANEL, t->start + r * t->start_stride, bytes);
    }
    if (t->start) copy.start = edge->start, copy.start_stride = PANEL;
    return copy;
}

INLINE void write_edge(const Edge *edge, int rows, const Tile *t, int64_t outs) {
    size_t bytes = (size_t)outs * sizeof(float);
    for (int r = 0; r < rows; r++) memcpy(t->y + r * t->stride, edge->y + r * PANEL, bytes);
}

/* Compute a tile that is narrower than PANEL, in a copy. */
static void run_edge_tile(int rows, const Word *x, const Word *w, int64_t words, const Tile *t,
                          int64_t outs) {
    Edge edge;
    Tile copy = copy_edge(&edge, rows, t, outs);
    run_tile(rows, x, w, words, &copy);
    write_edge(&edge, rows, t, outs);
}

/* Multiply one block of rows, packed in `x`, by one slice of a term (at most STRIP high), for one part.
 * Meanwhile the results of the next tiles and the next strip are fetched into the cache. */
static void multiply(const Part *part, const Right *right, const Word *x, Word *space,
                     int64_t row, int64_t rows, int64_t from, int64_t count, int first, int last) {
    int64_t words = PACKED_WORDS(count), lines = source_runs(right, count) * run_lines(right, count);
    int64_t lines_per_tile = lines / ((rows + MR - 1) / MR) + 1;
    for (int64_t out = 0; out < part->outs; out += PANEL) {
        const Word *w = strip(space, right, from, count, out, part->outs);
        int is_last = out + PANEL >= part->outs;
        Fetching next = {0};
        Tile t = {.stride = part->stride, .start_stride = part->start_stride};
        t.scale = part->scale, t.first = first, t.last = last;
        t.bias = last && part->bias ? part->bias + out : 0;
        for (int64_t r = 0; r < rows; r += MR) {
            int num = rows - r < MR ? (int)(rows - r) : MR;
            t.y = part->y + (row + r) * part->stride + out;
            t.start = last && part->start ? part->start + (row + r) * part->start_stride + out : 0;
            for (int64_t i = 0; i < MR; i++)
                __builtin_prefetch(t.y + (MR + i) * part->stride, 1, 3);
            if (!is_last) fetch_lines(&next, right, from, count, out + PANEL, lines_per_tile);
            if (part->outs - out < PANEL)
                run_edge_tile(num, x + r * words, w, words, &t, part->outs - out);
            else if (num == MR)
                tile(MR, x + r * words, w, words, &t);
            else
                run_tile(num, x + r * words, w, words, &t);
        }
    }
}

#endif
