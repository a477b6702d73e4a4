/* Tiles of few tokens whose sums are in blocks (`blocks.h`), for decode_kernels.c, which includes this after what it
 * uses. */
#ifndef BLOCK_TILES_H
#define BLOCK_TILES_H

/* Blocks of a panel that are brought into the first-level cache at a time. */
#define CHUNK 8

/* The frozen or low-rank matrix of a product. */
typedef struct {
    const char *panels;
    int64_t in, bits; /* as in Linear */
    int64_t ahead;    /* bytes from a panel in work to the one that is fetched meanwhile, or 0 */
} Matrix;

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* Return the words of `blocks` blocks of a panel from number `first` on, filled up with zeros. They are copied to
 * `to` unless memory has them in this layout. */
static const uint32_t *blocks_of(uint32_t *to, const Matrix *w, int64_t panel, int64_t first, int64_t blocks) {
    int64_t from = first * 2 * BLOCK, count = at_most(w->in - from, blocks * 2 * BLOCK);
    int64_t words = STEPS(count), missing = blocks * BLOCK - words;
    if (w->bits) {
        expand(to, w->panels + panel * quantised_panel_bytes(w->in, w->bits), from, count, w->bits, w->ahead);
    } else {
        const uint32_t *at = (const uint32_t *)(const void *)w->panels;
        at += (panel * STEPS(w->in) + first * BLOCK) * PANEL;
        if (!missing) return at;
        memcpy(to, at, (size_t)(words * PANEL) * sizeof *to);
    }
    if (missing) memset(to + words * PANEL, 0, (size_t)(missing * PANEL) * sizeof *to);
    return to;
}

/* Copy blocks of rows, filled up with zeros: [blocks][num][BLOCK] words. A row has `count` inputs. */
static BlockRows copy_blocks(uint32_t *to, const Input *const *x, int64_t num, int64_t first, int64_t blocks,
                             int64_t count) {
    for (int64_t n = 0; n < blocks; n++) {
        int64_t from = (first + n) * 2 * BLOCK, inputs = at_most(count - from, 2 * BLOCK);
        for (int64_t r = 0; r < num; r++) {
            uint32_t *row = to + (n * num + r) * BLOCK;
            if (inputs < 2 * BLOCK) memset(row, 0, BLOCK * sizeof *row);
            memcpy(row, x[r] + from, (size_t)inputs * sizeof(Input));
        }
    }
    return (BlockRows){to, BLOCK, num * BLOCK};
}

/* Return whether rows are at equal distances in memory, and set the distance in words. */
INLINE int equally_spaced(const Input *const *x, int64_t num, int64_t *stride) {
    int64_t apart = num > 1 ? x[1] - x[0] : 0;
    for (int64_t r = 2; r < num; r++)
        if (x[r] - x[0] != r * apart) return 0;
    *stride = apart / 2;
    return apart % 2 == 0 && (uintptr_t)x[0] % sizeof(uint32_t) == 0;
}

/* Add x . w for one panel, of rows that have as many inputs as the matrix. */
static void add_matrix(int64_t num, Sums sums, const Input *const *x, const Matrix *w, int64_t panel) {
    uint32_t rows[CHUNK * MR * BLOCK] __attribute__((aligned(64)));
    uint32_t words[CHUNK * BLOCK * PANEL] __attribute__((aligned(64)));
    int64_t stride = 0, blocks = NUM_BLOCKS(STEPS(w->in));
    int64_t readable = equally_spaced(x, num, &stride) ? w->in / (2 * BLOCK) : 0; /* without a copy */
    for (int64_t first = 0, count; first < blocks; first += count) {
        count = at_most(blocks - first, CHUNK);
        if (first < readable) count = at_most(count, readable - first);
        BlockRows part = {(const uint32_t *)(const void *)x[0] + first * BLOCK, stride, BLOCK};
        if (first >= readable) part = copy_blocks(rows, x, num, first, count, w->in);
        add_blocks(num, sums, part, blocks_of(words, w, panel, first, count), count);
    }
}

/* Add the low-rank part of tokens [first, end), which share an adapter, to their sums, which begin at sums[0]. */
INLINE void add_low(const Rows *rows, int first, int end, Sums sums, int64_t panel) {
    Matrix b = {.panels = rows->b[first], .in = rows->rank[first]};
    add_matrix(end - first, sums, rows->low + first, &b, panel);
}

/* Add the low-rank parts of tokens with different adapters. Each adapter meets only its own tokens: numbers that
 * are not finite must not reach others. */
static void add_low_parts(int num, const Rows *rows, Sums sums, int64_t panel) {
    for (int first = 0, end; first < num; first = end) {
        for (end = first + 1; end < num && rows->b[end] == rows->b[first];) end++;
        if (!rows->b[first]) continue;
        Sums part;
        size_t bytes = (size_t)(end - first) * sizeof part[0];
        memcpy(part, sums[first], bytes);
        begin_blocks(end - first, part, 0);
        add_low(rows, first, end, part, panel);
        end_blocks(end - first, part);
        memcpy(sums[first], part, bytes);
    }
}

/* Fetch the share of one panel of what `rows` says. */
INLINE void fetch_ahead(const Rows *rows, int64_t in, int64_t number) {
    const char *at = rows->ahead + number * rows->stride;
    for (int64_t n = 0; n < rows->pace * STEPS(in); n += 64) PREFETCH(at + n);
}

/* Compute panels [from, to) of a module for up to MR tokens. */
static void run_block_tiles(int num, const Rows *rows, const Matrix *w, int64_t from, int64_t to,
                            const Finish *finish) {
    open_blocks(num);
    for (int64_t panel = from; panel < to; panel++) {
        Sums sums;
        if (!w->ahead) fetch_ahead(rows, w->in, panel - from);
        begin_blocks(num, sums, 1);
        add_matrix(num, sums, rows->x, w, panel);
        if (rows->lows) await_done(rows->team, rows->lows);
        if (rows->one_adapter && rows->b[0]) add_low(rows, 0, num, sums, panel);
        end_blocks(num, sums);
        if (!rows->one_adapter) add_low_parts(num, rows, sums, panel);
        for (int r = 0; r < num; r++) {
            vec sum[2] = {load(sums[r]), load(sums[r] + LANES)};
            finish_panel(sum, rows->y[r], finish, panel * PANEL);
        }
    }
}

static void run_tiles(int num, int64_t half, const Rows *rows, const void *w, int64_t in, int64_t from,
                      int64_t to, const Finish *finish) {
    (void)half;
    Matrix matrix = {.panels = w, .in = in};
    run_block_tiles(num, rows, &matrix, from, to, finish);
}

/* The same for a module whose panels are expanded on the way. */
static void run_expanding_tiles(int num, int64_t bits, const Rows *rows, const char *w, int64_t in, int64_t from,
                                int64_t to, int64_t skip, const Finish *finish) {
    Matrix matrix = {.panels = w, .in = in, .bits = bits, .ahead = skip * quantised_panel_bytes(in, bits)};
    run_block_tiles(num, rows, &matrix, from, to, finish);
}

#endif
