/* Workspace that outlives the call but not the thread. Where there is much of it, it is asked for in huge pages: of ordinary
 * ones a large layer's weights would fill the TLB several times over, and each takes a while to be cleared. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "ukernels.h"

enum { ALIGNMENT = 64, HUGE_PAGE = 1 << 21 };

typedef struct {
    void *memory[FC_ARENA_SLOTS];
    size_t bytes[FC_ARENA_SLOTS];
} arena;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *pointer)
{
    arena *a = pointer;
    for (int slot = 0; slot < FC_ARENA_SLOTS; slot++)
        free(a->memory[slot]);
    free(a);
}

static void make_key(void) { pthread_key_create(&key, release); }

void *fc_arena(int slot, size_t bytes)
{
    pthread_once(&once, make_key);
    arena *a = pthread_getspecific(key);
    if (!a) {
        a = calloc(1, sizeof *a);
        if (!a || pthread_setspecific(key, a)) {
            free(a);
            return NULL;
        }
    }
    if (bytes > SIZE_MAX - HUGE_PAGE - FC_BEYOND)
        return NULL;
    bytes += FC_BEYOND;
    if (a->bytes[slot] < bytes || !a->memory[slot]) {
        free(a->memory[slot]);
        const size_t alignment = bytes < HUGE_PAGE ? ALIGNMENT : HUGE_PAGE;
        if (posix_memalign(&a->memory[slot], alignment, bytes))
            a->memory[slot] = NULL;
        a->bytes[slot] = a->memory[slot] ? bytes : 0;
#ifdef MADV_HUGEPAGE
        if (a->memory[slot] && alignment == HUGE_PAGE)
            madvise(a->memory[slot], bytes, MADV_HUGEPAGE); /* advice: without them all works as well */
#endif
    }
    return a->memory[slot];
}
