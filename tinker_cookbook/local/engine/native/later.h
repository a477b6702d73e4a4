/* Memory that threads fetch for the next product while they compute one, for decode_kernels.c, which includes this
 * after what it uses. With few tokens per adapter, products with A only wait for memory, but most of the other
 * products wait for the processor. */
#ifndef LATER_H
#define LATER_H

/* One thread's share of the matrices A that the next product reads. */
typedef struct {
    const Batch *batch;
    const Linear *linear; /* of the next product; NULL if nothing is left to fetch */
    int64_t which;
    int64_t group; /* the one whose A is fetched */
    const char *at, *end;
} Later;

/* Return the bytes of the matrix A of one group for a product; 0 if it has none. */
static int64_t bytes_of_a(const Linear *linear, const Group *group, int64_t which) {
    const Lora *lora = group->projections ? &group->projections[which] : 0;
    if (!lora || !lora->a) return 0;
    int64_t panel = lora->a_bits ? compact_panel_bytes(linear->in) : STEPS(linear->in) * PANEL * 4;
    return num_panels(group->rank * linear->num_modules) * panel;
}

/* Turn to the next matrix A; return 0 if there is none. */
static int turn_to_next(Later *later) {
    const Batch *batch = later->batch;
    while (later->linear && ++later->group < batch->num_groups) {
        const Group *group = &batch->groups[later->group];
        int64_t bytes = bytes_of_a(later->linear, group, later->which);
        if (!bytes) continue;
        int64_t share = (bytes / batch->num_threads + 63) / 64 * 64;
        later->at = (const char *)group->projections[later->which].a + omp_get_thread_num() * share;
        later->end = later->at + share;
        return 1;
    }
    later->linear = 0;
    return 0;
}

INLINE void fetch_later(Later *later, int64_t lines) {
    for (int64_t n = 0; n < lines; n++) {
        if (later->at == later->end && !turn_to_next(later)) return;
        PREFETCH(later->at);
        later->at += 64;
    }
}

/* Return the cache lines to fetch for each group of inputs of a panel, so that a product fetches what the next
 * one reads. */
static int64_t later_lines(const Linear *linear, const Later *later) {
    if (!later->linear) return 0;
    int64_t bytes = 0, panels = 0;
    for (int64_t g = 0; g < later->batch->num_groups; g++)
        bytes += bytes_of_a(later->linear, &later->batch->groups[g], later->which);
    for (int64_t m = 0; m < linear->num_modules; m++) panels += num_panels(linear->module_out[m]);
    int64_t pieces = panels * ((linear->in + GROUP_INPUTS - 1) / GROUP_INPUTS) * 64;
    return (bytes + pieces - 1) / pieces;
}

#endif
