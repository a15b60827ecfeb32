/* How many threads a parallel region may take, and what they see of one another. */
#include <pthread.h>
#include <stdatomic.h>

#include "ukernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

static atomic_int forked;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void in_child(void) { atomic_store(&forked, 1); }
static void watch_fork(void) { pthread_atfork(NULL, NULL, in_child); }

int fc_max_threads(void)
{
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* A child of fork() has one thread but OpenMP's records of its parent's team; waiting for that team would take for ever. */
int fc_usable_threads(int wanted)
{
    pthread_once(&once, watch_fork);
#ifdef _OPENMP
    return atomic_load(&forked) || wanted < 1 ? 1 : wanted;
#else
    (void)wanted;
    return 1;
#endif
}

void fc_fence(void) { __sync_synchronize(); }
