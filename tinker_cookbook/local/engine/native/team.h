/* Threads that run the phases of a forward pass together, for decode_kernels.c.
 *
 * A phase is a list of tasks that threads take in turns. Phases of a pass with few tokens take microseconds, so
 * barriers of OpenMP between them would cost too much: they wake all threads through the kernel each time. Here
 * a thread that waits fetches what the next phase reads, and the last thread to arrive may do small work before
 * it lets the others go. */
#ifndef TEAM_H
#define TEAM_H
#include "vectors.h"
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* A number that threads wait for. It has a cache line for itself. */
typedef struct {
    uint32_t value, sleepers;
    char padding[56];
} Signal;

typedef struct {
    int64_t next_task, arrived; /* of this phase; threads at the barrier */
    char padding[48];
    Signal done;       /* tasks of this phase that others wait for, and that are done */
    Signal generation; /* number of barriers so far */
} Team;

/* Spins before a waiting thread sleeps, so that other programs can run: about 0.2 ms. */
#define SPINS 20000
/* Bytes of the next phase's matrix that a waiting thread fetches at most. */
#define BYTES_AHEAD 131072

INLINE uint32_t value_of(const Signal *signal) { return __atomic_load_n(&signal->value, __ATOMIC_ACQUIRE); }

/* Add 1 to a signal and wake the threads that sleep. */
INLINE void count_up(Signal *signal) {
    __atomic_fetch_add(&signal->value, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&signal->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &signal->value, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
}

/* Wait until a signal no longer has the value `seen`. Meanwhile fetch memory from `ahead` on, unless it is
 * NULL. */
static void await_change(Signal *signal, uint32_t seen, const char *ahead) {
    for (int64_t turn = 0; turn < SPINS; turn++) {
        if (value_of(signal) != seen) return;
        if (ahead && turn * 64 < BYTES_AHEAD) {
            PREFETCH(ahead + turn * 64);
            continue;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    __atomic_fetch_add(&signal->sleepers, 1, __ATOMIC_SEQ_CST);
    while (value_of(signal) == seen)
        syscall(SYS_futex, &signal->value, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
    __atomic_fetch_sub(&signal->sleepers, 1, __ATOMIC_SEQ_CST);
}

/* Return the number of the next task of this phase; it may not exist. */
INLINE int64_t take_task(Team *team) { return __atomic_fetch_add(&team->next_task, 1, __ATOMIC_RELAXED); }

/* Wait until `count` tasks of this phase are counted as done. */
INLINE void await_done(Team *team, int64_t count) {
    for (uint32_t seen = value_of(&team->done); seen < count; seen = value_of(&team->done))
        await_change(&team->done, seen, 0);
}

/* Begin the next phase: let the threads at the barrier go. */
INLINE void release(Team *team) {
    team->arrived = team->next_task = 0;
    __atomic_store_n(&team->done.value, 0, __ATOMIC_RELAXED);
    count_up(&team->generation);
}

/* Return 1 at once to the last thread that arrives, which calls `release`; others wait for that and get 0.
 * Meanwhile they fetch memory from `ahead` on, unless it is NULL. */
INLINE int last_to_arrive(Team *team, const char *ahead) {
    uint32_t generation = value_of(&team->generation);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) return 1;
    await_change(&team->generation, generation, ahead);
    return 0;
}

INLINE void meet(Team *team, const char *ahead) {
    if (last_to_arrive(team, ahead)) release(team);
}

#endif
