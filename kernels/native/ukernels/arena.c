/* Workspace that outlives the call but not the thread. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "ukernels.h"

enum { ALIGNMENT = 64 };

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
    if (bytes > SIZE_MAX - ALIGNMENT)
        return NULL;
    if (a->bytes[slot] < bytes || !a->memory[slot]) {
        free(a->memory[slot]);
        size_t rounded = (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
        a->memory[slot] = aligned_alloc(ALIGNMENT, rounded);
        a->bytes[slot] = a->memory[slot] ? rounded : 0;
    }
    return a->memory[slot];
}
