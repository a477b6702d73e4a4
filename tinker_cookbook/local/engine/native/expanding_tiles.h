/* Tiles of few tokens whose panels are expanded in registers, for decode_kernels.c, which includes this after what
 * it uses: compact panels (`compact.h`) and quantised ones (`quantised.h`). Where memory limits the speed, they
 * are as much faster as they are smaller. */
#ifndef EXPANDING_TILES_H
#define EXPANDING_TILES_H

#ifdef FAST_UNITS
/* Bytes from a unit that is multiplied to the one that is fetched meanwhile (measured). */
#define UNITS_AHEAD 4096

/* Multiply R tokens by the inputs of one group of P compact panels, whose units are expanded in registers. */
INLINE void add_units(const int R, const int P, const Input *const *x, const char *w, int64_t bytes,
                      int64_t first, int64_t last, vec sum[][8]) {
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
INLINE void add_expanded(const int R, const int P, const Input *const *x, const char *w, int64_t bytes,
                         int64_t first, int64_t last, vec sum[][8]) {
    uint32_t expanded[GROUP_INPUTS / 2 * PANEL];
    for (int p = 0; p < P; p++) {
        expand_compact(expanded, w + p * bytes, 2 * first, 2 * (last - first), 0);
        for (int64_t k = first; k < last; k++)
            for (int v = 0; v < 2; v++) {
                vec column = load_pairs(expanded + (k - first) * PANEL + v * LANES);
                for (int r = 0; r < R; r++)
                    sum[r][2 * p + v] = add_step(sum[r][2 * p + v], splat_step(x[r], k), column);
            }
    }
}

/* Multiply R tokens by P compact panels; see `tile`. `w` points to the first panel. */
INLINE void compact_tile(const int R, const int P, const Rows *rows, const char *w, int64_t in,
                         int64_t panel, const Finish *finish) {
    const int64_t bytes = compact_panel_bytes(in), steps = STEPS(in), step = GROUP_INPUTS / 2;
    vec sum[MAX_ROWS][8];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 2 * P; c++) sum[r][c] = (vec){0};
    const uint32_t *list[4];
    for (int p = 0; p < P; p++) list[p] = exceptions_of(w + p * bytes);
    for (int64_t first = 0, g = 0; first < steps; first += step, g++) {
        int64_t last = first + step < steps ? first + step : steps;
        int plain = 1;
        for (int p = 0; p < P; p++) plain &= list[p][g] == list[p][g + 1];
        if (plain)
            add_units(R, P, rows->x, w, bytes, first, last, sum);
        else
            add_expanded(R, P, rows->x, w, bytes, first, last, sum);
    }
    add_adapter(R, P, rows, panel, sum);
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            finish_panel(&sum[r][2 * p], rows->y[r], finish, (panel + p) * PANEL);
}

#define COMPACT_PANELS_FOR(R) ((R) <= 2 ? 4 : (R) <= 4 ? 2 : 1)

/* Compute panels [from, to) of a compact module, which begins at `w`, for R tokens. */
INLINE void compact_tiles(const int R, const Rows *rows, const char *w, int64_t in, int64_t from,
                          int64_t to, const Finish *finish) {
    int64_t bytes = compact_panel_bytes(in);
    for (; to - from >= COMPACT_PANELS_FOR(R); from += COMPACT_PANELS_FOR(R))
        compact_tile(R, COMPACT_PANELS_FOR(R), rows, w + from * bytes, in, from, finish);
    for (; from < to; from++)
        compact_tile(R, 1, rows, w + from * bytes, in, from, finish);
}

static void run_compact_tiles(int num, const Rows *rows, const char *w, int64_t in, int64_t from,
                              int64_t to, const Finish *finish) {
    switch (num) {
#define CASE(R) case R: compact_tiles(R, rows, w, in, from, to, finish); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}
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
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
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
