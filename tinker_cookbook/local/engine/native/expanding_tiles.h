/* Tiles of few tokens whose panels are expanded in registers, for decode_kernels.c, which includes this after what
 * it uses: compact panels (`compact.h`) and quantised ones (`quantised.h`). Where memory limits the speed, they
 * are as much faster as they are smaller. */
#ifndef EXPANDING_TILES_H
#define EXPANDING_TILES_H

#ifdef FAST_UNITS
/* Bytes from a unit that is multiplied to the one that is fetched meanwhile (measured). */
#define UNITS_AHEAD 4096

/* Where the first of several tiles keeps the panels that it expands, for the others: [STEPS(in), PANEL] each. */
typedef uint32_t *Kept;

/* Multiply R tokens by one step of a compact unit. */
INLINE void add_unit_step(const int R, const Input *const *x, int64_t k, const vec *column, vec sum[][8]) {
    for (int r = 0; r < R; r++) {
        vec value = splat_step(x[r], k);
        IN_REGISTER(value);
        for (int v = 0; v < 2; v++) sum[r][v] = add_step(sum[r][v], value, column[v]);
    }
}

/* Multiply R tokens by the inputs of one group of a compact panel, whose units are expanded in registers.
 * With `keep`, the expanded panel is stored at `kept`, and memory is fetched as in `tile`. */
INLINE void add_tall_units(const int R, const int keep, const Rows *rows, const char *w, int64_t first,
                           int64_t last, const char *ahead, Kept kept, vec sum[][8]) {
    __m512i table = _mm512_loadu_si512(w);
    for (int64_t k = first; k < last; k += 2) {
        const char *unit = unit_of(w, k / 2);
        for (int64_t at = 0; at < UNIT_BYTES && !keep; at += 64) PREFETCH(unit + UNITS_AHEAD + at);
        __m512i codes = _mm512_loadu_si512(unit + 4 * PANEL);
        for (int s = 0; s < 2; s++) {
            if (s && k + 1 >= last) continue;
            if (keep) fetch(ahead + (k + s) * rows->pace, rows->pace, 1);
            __m512i both = _mm512_loadu_si512(unit + s * 2 * PANEL);
            vec column[2];
            for (int v = 0; v < 2; v++) {
                column[v] = unit_vector(both, codes, table, s, v);
                IN_REGISTER(column[v]);
                if (keep) *(uvec_any *)(kept + (k + s) * PANEL + v * LANES) = (uvec)column[v];
            }
            add_unit_step(R, rows->x, k + s, column, sum);
        }
    }
}

/* The same for few tokens and P panels, without keeping: weights are multiplied from memory. */
INLINE void add_units(const int R, const int P, const Rows *rows, const char *w, int64_t bytes,
                      int64_t first, int64_t last, vec sum[][8]) {
    const Input *const *x = rows->x;
    __m512i table[4];
    for (int p = 0; p < P; p++) table[p] = _mm512_loadu_si512(w + p * bytes);
    for (int64_t k = first; k < last; k += 2) {
        for (int p = 0; p < P; p++) {
            const char *unit = unit_of(w + p * bytes, k / 2);
            for (int64_t at = 0; at < UNIT_BYTES; at += 64) PREFETCH(unit + UNITS_AHEAD + at);
            __m512i codes = _mm512_loadu_si512(unit + 4 * PANEL);
            for (int s = 0; s < 2; s++) {
                if (s && k + 1 >= last) continue;
                __m512i both = _mm512_loadu_si512(unit + s * 2 * PANEL);
                for (int v = 0; v < 2; v++) {
                    vec column = unit_vector(both, codes, table[p], s, v);
                    for (int r = 0; r < R; r++)
                        sum[r][2 * p + v] = add_step(sum[r][2 * p + v], splat_step(x[r], k + s), column);
                }
            }
        }
    }
}

/* The same for groups with exceptions: they are expanded in memory. */
INLINE void add_expanded(const int R, const int P, const int keep, const Rows *rows, const char *w,
                         int64_t bytes, int64_t first, int64_t last, Kept kept, vec sum[][8]) {
    uint32_t own[GROUP_INPUTS / 2 * PANEL], *expanded = keep ? kept + first * PANEL : own;
    for (int p = 0; p < P; p++) {
        expand_compact(expanded, w + p * bytes, 2 * first, 2 * (last - first), 0);
        for (int64_t k = first; k < last; k++)
            for (int v = 0; v < 2; v++) {
                vec column = load_pairs(expanded + (k - first) * PANEL + v * LANES);
                for (int r = 0; r < R; r++)
                    sum[r][2 * p + v] = add_step(sum[r][2 * p + v], splat_step(rows->x[r], k), column);
            }
    }
}

/* Tiles of more tokens have one panel, whose weights stay in registers. */
#define TALL(R) ((R) > 6)
#define COMPACT_PANELS_FOR(R) ((R) <= 2 ? 4 : (R) <= 4 ? 2 : 1)

/* Multiply R tokens by P compact panels; see `tile`. `w` points to the first panel. With `keep` (only for one
 * panel), the expanded panel is stored at `kept`. */
INLINE void compact_tile(const int R, const int P, const int keep, const Rows *rows, const char *w,
                         int64_t in, int64_t panel, const char *ahead, Kept kept, const Finish *finish) {
    const int64_t bytes = compact_panel_bytes(in), steps = STEPS(in), step = GROUP_INPUTS / 2;
    const int64_t lines = rows->one_adapter ? 0 : lines_per_group(R, P, rows, in);
    if (rows->one_adapter) fetch_adapters(R, P, rows, panel, 0, INT32_MAX);
    vec sum[MAX_ROWS][8];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 2 * P; c++) sum[r][c] = (vec){0};
    const uint32_t *list[4];
    for (int p = 0; p < P; p++) list[p] = exceptions_of(w + p * bytes);
    for (int64_t first = 0, g = 0; first < steps; first += step, g++) {
        int64_t last = first + step < steps ? first + step : steps;
        if (lines) fetch_adapters(R, P, rows, panel, g * lines, lines);
        fetch_later(rows->later, rows->later_lines);
        int plain = 1;
        for (int p = 0; p < P; p++) plain &= list[p][g] == list[p][g + 1];
        if (!plain)
            add_expanded(R, P, keep, rows, w, bytes, first, last, kept, sum);
        else if (keep || TALL(R))
            add_tall_units(R, keep, rows, w, first, last, ahead, kept, sum);
        else
            add_units(R, P, rows, w, bytes, first, last, sum);
    }
    add_adapter(R, P, rows, panel, sum);
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            finish_panel(&sum[r][2 * p], rows->y[r], finish, (panel + p) * PANEL);
}

/* Compute panels [from, to) of a compact module, which begins at `w`, for R tokens. */
INLINE void compact_tiles(const int R, const Rows *rows, const char *w, int64_t in, int64_t from,
                          int64_t to, const Finish *finish) {
    int64_t bytes = compact_panel_bytes(in);
    for (; to - from >= COMPACT_PANELS_FOR(R); from += COMPACT_PANELS_FOR(R))
        compact_tile(R, COMPACT_PANELS_FOR(R), 0, rows, w + from * bytes, in, from, 0, 0, finish);
    if (COMPACT_PANELS_FOR(R) == 1) return;
    for (; from < to; from++)
        compact_tile(R, 1, 0, rows, w + from * bytes, in, from, 0, 0, finish);
}

static void run_compact_tiles(int num, const Rows *rows, const char *w, int64_t in, int64_t from,
                              int64_t to, const Finish *finish) {
    switch (num) {
#define CASE(R) case R: compact_tiles(R, rows, w, in, from, to, finish); break;
        EACH_NUMBER_OF_ROWS
#undef CASE
    }
}

#if MAX_ROWS == 10
#define KEEPS_PANELS
/* The same, and store the expanded panels at `kept`; only for the longest of several tiles. */
static void run_keeping_tiles(int num, const Rows *rows, const char *w, int64_t in, int64_t from,
                              int64_t to, Kept kept, const Finish *finish) {
    const char *ahead = rows->ahead;
    for (w += from * compact_panel_bytes(in); from < to; from++) {
        switch (num) {
#define CASE(R) case R: compact_tile(R, 1, 1, rows, w, in, from, ahead, kept, finish); break;
            CASE(6) CASE(7) CASE(8) CASE(9) CASE(10)
#undef CASE
        }
        w += compact_panel_bytes(in), ahead += rows->stride, kept += STEPS(in) * PANEL;
    }
}
#endif
#endif

/* Add `count` inputs of one block of a quantised panel to the sums of R tokens; x begins at the block. */
INLINE void add_block(const int R, const int bits, const Input **x, const char *block,
                      const int count, const Cutter *cutter, vec sum[][8]) {
    Scales scales[2];
    for (int c = 0; c < 2; c++) load_scales(block + 2 * c * LANES, bits, &scales[c]);
    for (int k = 0; k < count; k += RUN(bits)) {
        uvec words[2][2];
        for (int c = 0; c < 2; c++) load_run(block, k / RUN(bits), c * LANES, words[c]);
#pragma GCC unroll 8
        for (int j = 0; j < RUN(bits) / 2; j++) {
            if (k + 2 * j >= count) break;
            vec column[2];
            for (int c = 0; c < 2; c++) column[c] = (vec)weight_pairs(words[c], j, bits, cutter, &scales[c]);
            for (int r = 0; r < R; r++) {
                vec value = splat_step(x[r], k / 2 + j);
                for (int c = 0; c < 2; c++) sum[r][c] = add_step(sum[r][c], value, column[c]);
            }
        }
    }
}

/* Multiply R tokens by a quantised panel, number `panel` of its module, while it is expanded. */
INLINE void quantised_tile(const int R, const int bits, const Rows *rows, const char *at, int64_t in,
                           int64_t panel, int64_t ahead, const Finish *finish) {
    vec sum[MAX_ROWS][8];
    const Input *x[MAX_ROWS];
    for (int r = 0; r < R; r++) {
        x[r] = rows->x[r];
        for (int c = 0; c < 2; c++) sum[r][c] = (vec){0};
    }
    Cutter cutter;
    set_cutter(&cutter, bits);
    fetch_all_adapters(R, 1, rows, panel);
    int64_t k = 0;
    for (; k + GROUP <= in; k += GROUP, at += block_bytes(bits)) {
        for (int64_t line = 0; line < block_bytes(bits); line += 64) PREFETCH(at + ahead + line);
        add_block(R, bits, x, at, GROUP, &cutter, sum);
        for (int r = 0; r < R; r++) x[r] += GROUP;
    }
    if (k < in) add_block(R, bits, x, at, (int)(in - k), &cutter, sum);
    add_adapter(R, 1, rows, panel, sum);
    for (int r = 0; r < R; r++) finish_panel(sum[r], rows->y[r], finish, panel * PANEL);
}

/* Compute panels [from, to) of a quantised module that begins at `w`. Meanwhile the panels that are `skip`
 * panels later are fetched. */
static void run_quantised(int num, int64_t bits, const Rows *rows, const char *w, int64_t in,
                          int64_t from, int64_t to, int64_t skip, const Finish *finish) {
    int64_t bytes = quantised_panel_bytes(in, bits);
    for (; from < to; from++) {
        const char *at = w + from * bytes;
        switch (num * 2 + (bits == 4)) {
#define CASE(R)                                                                                \
    case R * 2: quantised_tile(R, 8, rows, at, in, from, skip * bytes, finish); break;         \
    case R * 2 + 1: quantised_tile(R, 4, rows, at, in, from, skip * bytes, finish); break;
            EACH_NUMBER_OF_ROWS
#undef CASE
        }
    }
}

/* Compute panels [from, to) of a compact or quantised module for up to MAX_ROWS tokens. */
static void run_expanding_tiles(int num, int64_t bits, const Rows *rows, const char *w, int64_t in,
                                int64_t from, int64_t to, int64_t skip, const Finish *finish) {
#ifdef FAST_UNITS
    if (bits == COMPACT_BITS) {
        run_compact_tiles(num, rows, w, in, from, to, finish);
        return;
    }
#endif
    run_quantised(num, bits, rows, w, in, from, to, skip, finish);
}

#endif
