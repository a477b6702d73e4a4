/* Packing of bfloat16 matrices in 12 bits per number, and reading of their rows; see `compact.h`. Adapters are
 * rounded and packed in one pass, since each checkpoint that is sampled from has a new one. */
#include "vectors.h"
#include <stdlib.h>
#define PANEL (2 * LANES)
#include "compact.h"

#define TABLE 16
/* Numbers of a matrix of an adapter for each exception: with more of them, it is packed in 16 bits. */
#define RARITY 200

INLINE uint32_t exponent_of(uint16_t number) { return number >> 7 & 0xff; }

/* Count the exponents of a panel; return how many numbers have none of the TABLE most frequent ones, which are
 * written to `table`, the most frequent first. */
static int64_t choose_exponents(const uint16_t *numbers, int64_t count, uint32_t *table) {
    int32_t counts[2][256] = {0}; /* neighbours are counted apart: a count does not wait for the one before */
    for (int64_t n = 0; n < count; n++) counts[n & 1][exponent_of(numbers[n])]++;
    int64_t left = count, num = 0;
    uint32_t present[256];
    for (uint32_t e = 0; e < 256; e++) {
        counts[0][e] += counts[1][e];
        if (counts[0][e]) present[num++] = e;
    }
    for (int64_t t = 0; t < TABLE; t++) {
        int64_t best = 0;
        for (int64_t n = 1; n < num; n++)
            if (counts[0][present[n]] > counts[0][present[best]]) best = n;
        uint32_t exponent = num ? present[best] : 0;
        table[t] = exponent;
        left -= counts[0][exponent];
        counts[0][exponent] = 0;
    }
    return left;
}

/* Count the exceptions of each panel of a matrix of pairs [panels, steps, PANEL, 2]. */
void compact_count(const uint16_t *pairs, int64_t panels, int64_t steps, int64_t *exceptions,
                   int64_t threads) {
    int64_t size = steps * 2 * PANEL;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t p = 0; p < panels; p++) {
        uint32_t table[TABLE];
        exceptions[p] = choose_exponents(pairs + p * size, size, table);
    }
}

/* Pack one step of a unit whose bytes are 0. Append its exceptions to the list at `end`; return the new end. */
static uint32_t pack_step(char *unit, int64_t s, const uint16_t *numbers, const int8_t *code_of,
                          uint32_t place, uint32_t *list, uint32_t end) {
    for (int64_t v = 0; v < 2; v++)
        for (int64_t i = 0; i < PANEL; i++) {
            uint16_t number = numbers[v * PANEL + i], codes;
            int code = code_of[exponent_of(number)];
            unit[s * 2 * PANEL + mantissa_at(v, i)] = (char)((number >> 8 & 0x80) | (number & 0x7f));
            if (code < 0)
                list[end++] = (place + (uint32_t)(v * PANEL + i)) << 16 | number;
            else {
                memcpy(&codes, unit + 4 * PANEL + 2 * i, 2);
                codes |= (uint16_t)(code << (8 * s + 4 * v));
                memcpy(unit + 4 * PANEL + 2 * i, &codes, 2);
            }
        }
    return end;
}

/* Return the words of a panel's list of exceptions. */
static int64_t list_words(int64_t inputs, int64_t exceptions) {
    return (inputs + GROUP_INPUTS - 1) / GROUP_INPUTS + 1 + exceptions;
}

/* Pack a panel with a table of `choose_exponents`. */
static void pack_panel(const uint16_t *pairs, int64_t steps, const uint32_t *table, char *panel,
                       uint32_t *list) {
    int8_t code_of[256];
    memset(code_of, -1, sizeof code_of);
    memset(panel, 0, (size_t)compact_panel_bytes(2 * steps));
    CompactHeader *header = (CompactHeader *)(void *)panel;
    for (int t = 0; t < TABLE; t++) {
        code_of[table[t]] = (int8_t)t;
        header->exponents[t] = header->exponents[t + TABLE] = (uint16_t)(table[t] << 7);
    }
    header->exceptions = (const char *)list - panel;
    uint32_t end = (uint32_t)list_words(2 * steps, 0);
    list[0] = end;
    for (int64_t k = 0; k < steps; k++) {
        int64_t group = 2 * k / GROUP_INPUTS;
        uint32_t place = (uint32_t)((2 * k - group * GROUP_INPUTS) * PANEL);
        char *unit = (char *)unit_of(panel, 2 * k / UNIT);
        end = pack_step(unit, k % 2, pairs + k * 2 * PANEL, code_of, place, list, end);
        list[group + 1] = end;
    }
}

/* Pack a matrix of pairs. `lists` has the byte offset of each panel's list of exceptions in `to`. */
void compact_pack(const uint16_t *pairs, int64_t panels, int64_t steps, char *to,
                  const int64_t *lists, int64_t threads) {
    int64_t bytes = compact_panel_bytes(2 * steps);
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t p = 0; p < panels; p++) {
        const uint16_t *numbers = pairs + p * steps * 2 * PANEL;
        uint32_t table[TABLE];
        choose_exponents(numbers, steps * 2 * PANEL, table);
        pack_panel(numbers, steps, table, to + p * bytes, (uint32_t *)(void *)(to + lists[p]));
    }
}

/* A matrix of an adapter, which is rounded and packed. */
typedef struct {
    const float *from; /* [rows, inputs] */
    int64_t rows, inputs;
    int64_t bits;  /* COMPACT_BITS, if that is wanted and then if it was chosen; 0 for 16 bits */
    int64_t bytes; /* of the packed matrix */
    char *to;
} Source;

INLINE int64_t panels_of(const Source *source) { return (source->rows + PANEL - 1) / PANEL; }
INLINE int64_t numbers_of(const Source *source) { return (source->inputs + 1) / 2 * 2 * PANEL; }

/* Round to the nearest bfloat16, ties to even. Numbers that are not finite remain so. */
INLINE uvec rounded_vector(vec x) {
    uvec is_nan = (uvec)(x != x);
    return (is_nan & 0x7fc0u) | (~is_nan & round_bits(x));
}

/* Write a row of a matrix to row `i` of a panel of pairs [steps, PANEL]. */
static void round_to_panel(uint32_t *to, int64_t i, const float *row, int64_t inputs) {
    for (int64_t k = 0; k < inputs; k += LANES) {
        float rest[LANES] = {0};
        int64_t count = inputs - k < LANES ? inputs - k : LANES;
        if (count < LANES) memcpy(rest, row + k, (size_t)count * sizeof(float));
        uvec numbers = rounded_vector(load(count < LANES ? rest : row + k));
        uint32_t *column = to + k / 2 * PANEL + i;
        for (int64_t n = 0; n < count; n += 2) column[n / 2 * PANEL] = numbers[n] | numbers[n + 1] << 16;
    }
}

/* Round panel `p` to pairs [steps, PANEL, 2]; what is not in the matrix is 0. */
static void round_panel(const Source *source, int64_t p, uint16_t *to) {
    int64_t inputs = source->inputs, rows = source->rows - p * PANEL;
    rows = rows < PANEL ? rows : PANEL;
    if (rows < PANEL) memset(to, 0, (size_t)numbers_of(source) * sizeof *to);
    for (int64_t i = 0; i < rows; i++)
        round_to_panel((uint32_t *)(void *)to, i, source->from + (p * PANEL + i) * inputs, inputs);
}

/* Choose how a matrix is packed: in 16 bits, if 12 are not wanted, need too many exceptions, or save nothing. */
static void plan_matrix(Source *source, uint16_t *numbers) {
    int64_t panels = panels_of(source), count = numbers_of(source), exceptions = 0;
    source->bytes = panels * count * 2;
    if (!source->bits) return;
    for (int64_t p = 0; p < panels; p++) {
        uint32_t table[TABLE];
        round_panel(source, p, numbers);
        exceptions += choose_exponents(numbers, count, table);
    }
    int64_t bytes = panels * (compact_panel_bytes(source->inputs) + 4 * list_words(source->inputs, 0));
    bytes += 4 * exceptions;
    if (exceptions * RARITY > panels * count || bytes >= source->bytes)
        source->bits = 0;
    else
        source->bytes = bytes;
}

/* Pack a matrix as `plan_matrix` chose. */
static void pack_matrix(const Source *source, uint16_t *numbers) {
    int64_t panels = panels_of(source), count = numbers_of(source);
    int64_t bytes = compact_panel_bytes(source->inputs);
    uint32_t *list = (uint32_t *)(void *)(source->to + panels * bytes);
    for (int64_t p = 0; p < panels; p++) {
        if (!source->bits) {
            round_panel(source, p, (uint16_t *)(void *)source->to + p * count);
            continue;
        }
        uint32_t table[TABLE];
        round_panel(source, p, numbers);
        int64_t exceptions = choose_exponents(numbers, count, table);
        pack_panel(numbers, count / (2 * PANEL), table, source->to + p * bytes, list);
        list += list_words(source->inputs, exceptions);
    }
}

/* Plan (`to_pack` 0) or pack matrices. Return 0 if there is no memory. */
int64_t compact_sources(Source *sources, int64_t count, int64_t to_pack, int64_t threads) {
    int64_t most = 0, missing = 0;
    for (int64_t n = 0; n < count; n++) most = numbers_of(&sources[n]) > most ? numbers_of(&sources[n]) : most;
#pragma omp parallel num_threads((int)threads)
    {
        uint16_t *numbers = malloc((size_t)most * sizeof *numbers);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < count; n++) {
            if (!numbers)
                __atomic_store_n(&missing, 1, __ATOMIC_RELAXED);
            else if (to_pack)
                pack_matrix(&sources[n], numbers);
            else
                plan_matrix(&sources[n], numbers);
        }
        free(numbers);
    }
    return !missing;
}

/* Read row `lane` of a panel. */
static void read_row(const char *panel, int64_t lane, int64_t inputs, float *to) {
    const uint32_t *list = exceptions_of(panel);
    int64_t v = lane / LANES, i = lane % LANES * 2;
    for (int64_t k = 0; k < inputs; k++) {
        const char *unit = unit_of(panel, k / UNIT);
        uint32_t bits = number_of(unit, header_of(panel)->exponents, k % UNIT / 2, v, i + k % 2);
        bits <<= 16;
        memcpy(to + k, &bits, sizeof bits);
    }
    for (int64_t g = 0; g * GROUP_INPUTS < inputs; g++)
        for (uint32_t n = list[g]; n < list[g + 1]; n++) {
            int64_t place = list[n] >> 16, step = place / (2 * PANEL), at = place % (2 * PANEL);
            int64_t k = g * GROUP_INPUTS + 2 * step + at % 2;
            uint32_t bits = list[n] << 16;
            if (at / 2 == lane && k < inputs) memcpy(to + k, &bits, sizeof bits);
        }
}

/* Read rows of a packed matrix: [count, inputs] in float32. */
void compact_rows(const char *panels, int64_t inputs, const int64_t *rows, int64_t count, float *to) {
    for (int64_t n = 0; n < count; n++)
        read_row(panels + rows[n] / PANEL * compact_panel_bytes(inputs), rows[n] % PANEL, inputs,
                 to + n * inputs);
}

/* Return whether these kernels read the A of adapters in 12 bits. */
int64_t expands_adapters(void) {
#if defined(FAST_UNITS) || defined(BLOCKS)
    return 1;
#else
    return 0;
#endif
}

int64_t compact_bytes(int64_t inputs) { return compact_panel_bytes(inputs); }
int64_t compact_groups(int64_t inputs) { return (inputs + GROUP_INPUTS - 1) / GROUP_INPUTS; }
