/* Threads that run the phases of a forward pass together, for decode_kernels.c.
 *
 * A phase is a list of tasks that threads take in turns. Phases of a pass with few tokens take microseconds, so
 * a barrier of OpenMP between them would cost too much: here threads spin while they wait, and fetch what the
 * next phase reads. The last thread to arrive at a barrier may do small work before it lets the others go. */
#ifndef TEAM_H
#define TEAM_H
#include "vectors.h"
#include <sched.h>

int omp_get_thread_num(void);
int omp_get_num_threads(void);

typedef struct {
    int64_t next_task; /* of this phase */
    char padding[56];  /* counters that are polled have cache lines for themselves */
    int64_t done;      /* tasks of this phase that others wait for and that are done */
    char more_padding[56];
    int64_t arrived;    /* threads at the barrier */
    int64_t generation; /* number of barriers so far */
    char last_padding[48];
} Team;

/* Spins before a waiting thread lets other programs run, about 0.1 ms. */
#define SPINS 4000
/* Bytes of the next phase's matrix that a waiting thread fetches at most. */
#define BYTES_AHEAD 131072

INLINE void pause_spinning(int64_t turn) {
    if (turn > SPINS) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Return the number of the next task of this phase; it may not exist. */
INLINE int64_t take_task(Team *team) { return __atomic_fetch_add(&team->next_task, 1, __ATOMIC_RELAXED); }

INLINE void count_done(Team *team) { __atomic_fetch_add(&team->done, 1, __ATOMIC_RELEASE); }

/* Wait until `count` tasks of this phase are counted as done. */
INLINE void await_done(const Team *team, int64_t count) {
    for (int64_t turn = 0; __atomic_load_n(&team->done, __ATOMIC_ACQUIRE) < count; turn++)
        pause_spinning(turn);
}

/* Begin the next phase: let the threads at the barrier go. */
INLINE void release(Team *team) {
    team->arrived = team->next_task = team->done = 0;
    __atomic_fetch_add(&team->generation, 1, __ATOMIC_RELEASE);
}

/* Return 1 at once to the last thread that arrives, which calls `release`; others wait for that and get 0.
 * Meanwhile they fetch memory from `ahead` on, unless it is NULL. */
INLINE int last_to_arrive(Team *team, const char *ahead) {
    int64_t generation = __atomic_load_n(&team->generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) return 1;
    for (int64_t turn = 0; __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == generation; turn++) {
        if (ahead && turn * 64 < BYTES_AHEAD)
            PREFETCH(ahead + turn * 64);
        else
            pause_spinning(turn);
    }
    return 0;
}

INLINE void meet(Team *team, const char *ahead) {
    if (last_to_arrive(team, ahead)) release(team);
}

#endif
