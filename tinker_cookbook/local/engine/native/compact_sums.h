/* Sums over compact matrices (`compact.h`) of few tokens, for decode_kernels.c, which includes this after what it
 * uses. Panels are expanded in registers while they are multiplied. */
#ifndef COMPACT_SUMS_H
#define COMPACT_SUMS_H

/* Tiles of more tokens have one panel, whose weights stay in registers. */
#define TALL(R) ((R) > 6)

/* Multiply R tokens by groups of P compact panels with exceptions, which are expanded in memory: at `kept`, or, if
 * that is NULL, in this function. */
INLINE void add_expanded(const int R, const int P, const Input *const *x, const char *w, int64_t bytes,
                         int64_t first, int64_t last, uint32_t *kept, vec sum[][8]) {
    uint32_t own[GROUP_INPUTS / 2 * PANEL], *expanded = kept ? kept : own;
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

#ifdef FAST_UNITS
/* Bytes from a unit that is multiplied to the one that is fetched meanwhile (measured). */
#define UNITS_AHEAD 4096

/* Where the first of several tiles keeps the panels that it expands, for the others: [STEPS(in), PANEL] each. */
typedef uint32_t *Kept;

/* Return whether group `g` of P panels has no exceptions. */
INLINE int is_plain(const int P, const char *w, int64_t bytes, int64_t g) {
    int plain = 1;
    for (int p = 0; p < P; p++) {
        const uint32_t *list = exceptions_of(w + p * bytes);
        plain &= list[g] == list[g + 1];
    }
    return plain;
}

/* Multiply R tokens by one step of a compact unit. */
INLINE void add_unit_step(const int R, const Input *const *x, int64_t k, const vec *column, vec sum[][8]) {
    for (int r = 0; r < R; r++) {
        vec value = splat_step(x[r], k);
        IN_REGISTER(value);
        for (int v = 0; v < 2; v++) sum[r][v] = add_step(sum[r][v], value, column[v]);
    }
}

/* Expand one step of a unit. */
INLINE void expand_step(const char *unit, __m512i codes, __m512i table, const int s, vec *column) {
    __m512i both = _mm512_loadu_si512(unit + s * 2 * PANEL);
    for (int v = 0; v < 2; v++) column[v] = unit_vector(both, codes, table, s, v);
}

/* Multiply R tokens by the inputs of one group of a compact panel. The expanded panel is stored at `kept`, and
 * memory is fetched as in `tile`. */
INLINE void add_kept_units(const int R, const Rows *rows, const char *w, int64_t first, int64_t last,
                           const char *ahead, Kept kept, vec sum[][8]) {
    __m512i table = _mm512_loadu_si512(w);
    for (int64_t k = first; k < last; k += 2) {
        const char *unit = unit_of(w, k / 2);
        __m512i codes = _mm512_loadu_si512(unit + 4 * PANEL);
        for (int s = 0; s < 2; s++) {
            if (s && k + 1 >= last) continue;
            fetch(ahead + (k + s) * rows->pace, rows->pace, 1);
            vec column[2];
            expand_step(unit, codes, table, s, column);
            for (int v = 0; v < 2; v++) {
                IN_REGISTER(column[v]);
                *(uvec_any *)(kept + (k + s) * PANEL + v * LANES) = (uvec)column[v];
            }
            add_unit_step(R, rows->x, k + s, column, sum);
        }
    }
}

/* The same for P panels (one if R is tall), without keeping. With `ahead`, later units are fetched meanwhile. */
INLINE void add_units(const int R, const int P, const int ahead, const Input *const *x, const char *w,
                      int64_t bytes, int64_t first, int64_t last, vec sum[][8]) {
    __m512i table[4];
    for (int p = 0; p < P; p++) table[p] = _mm512_loadu_si512(w + p * bytes);
    for (int64_t k = first; k < last; k += 2) {
        for (int p = 0; p < P; p++) {
            const char *unit = unit_of(w + p * bytes, k / 2);
            for (int64_t at = 0; at < UNIT_BYTES && ahead; at += 64) PREFETCH(unit + UNITS_AHEAD + at);
            __m512i codes = _mm512_loadu_si512(unit + 4 * PANEL);
            for (int s = 0; s < 2; s++) {
                if (s && k + 1 >= last) continue;
                vec column[2];
                expand_step(unit, codes, table[p], s, column);
                if (TALL(R)) {
                    for (int v = 0; v < 2; v++) IN_REGISTER(column[v]);
                    add_unit_step(R, x, k + s, column, sum);
                    continue;
                }
                for (int v = 0; v < 2; v++)
                    for (int r = 0; r < R; r++)
                        sum[r][2 * p + v] = add_step(sum[r][2 * p + v], splat_step(x[r], k + s), column[v]);
            }
        }
    }
}
#endif

/* Multiply R tokens by P panels of a compact matrix that is in the cache: B of an adapter. */
INLINE void add_compact(const int R, const int P, const Input *const *x, const char *w, int64_t in,
                        vec sum[][8]) {
    const int64_t bytes = compact_panel_bytes(in), steps = STEPS(in), step = GROUP_INPUTS / 2;
    for (int64_t first = 0; first < steps; first += step) {
        int64_t last = first + step < steps ? first + step : steps;
#ifdef FAST_UNITS
        if (is_plain(P, w, bytes, first / step)) {
            add_units(R, P, 0, x, w, bytes, first, last, sum);
            continue;
        }
#endif
        add_expanded(R, P, x, w, bytes, first, last, 0, sum);
    }
}

#endif
