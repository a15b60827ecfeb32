/* Chooses the instruction set once, from what this build and this CPU have, under the user's cap.
 * To add one: one row here, in order of speed, and what CONTRIBUTING.md lists under "an instruction set".
 */
#include <string.h>

#include "ukernels.h"

#if defined(FC_HAVE_AMX) && !defined(FC_AMX_MODEL)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Each returns its instruction set, or NULL where the CPU lacks it; `below` is the best of those before it. */
static const fc_isa *scalar(const fc_isa *below)
{
    (void)below;
    return &fc_isa_scalar;
}

#ifdef FC_HAVE_AVX2
static const fc_isa *avx2(const fc_isa *below)
{
    (void)below;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &fc_isa_avx2 : NULL;
}
#endif

#ifdef FC_HAVE_AVX512
static const fc_isa *avx512(const fc_isa *below)
{
    (void)below;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? &fc_isa_avx512
               : NULL;
}
#endif

#ifdef FC_HAVE_AMX
static const fc_isa *amx(const fc_isa *below)
{
#ifndef FC_AMX_MODEL /* Linux lends the tile registers to a process that asks */
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    unsigned a, b, c, d;
    if (strcmp(below->name, "avx512") != 0 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) ||
        !(d & AMX_TILE) || !(d & AMX_INT8) || syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) != 0)
        return NULL;
#endif
    return fc_start_amx(below);
}
#endif

static const struct {
    const char *name;
    const fc_isa *(*start)(const fc_isa *below);
} rows[] = {
    {"scalar", scalar},
#ifdef FC_HAVE_AVX2
    {"avx2", avx2},
#endif
#ifdef FC_HAVE_AVX512
    {"avx512", avx512},
#endif
#ifdef FC_HAVE_AMX
    {"amx", amx},
#endif
};
enum { N_ROWS = sizeof rows / sizeof *rows };

size_t fc_built_isas(const char *names[], size_t capacity)
{
    size_t n = 0;
    for (; n < N_ROWS && n < capacity; n++)
        names[n] = rows[n].name;
    return n;
}

size_t fc_available_isas(const fc_isa *isas[], size_t capacity)
{
    size_t found = 0;
    for (size_t i = 0; i < N_ROWS && found < capacity; i++) {
        const fc_isa *isa = rows[i].start(found ? isas[found - 1] : NULL);
        if (isa)
            isas[found++] = isa;
    }
    return found;
}

const fc_isa *fc_select_isa(const char *cap)
{
    const fc_isa *best = NULL;
    for (size_t i = 0; i < N_ROWS; i++) {
        const fc_isa *isa = rows[i].start(best);
        best = isa ? isa : best;
        if (strcmp(cap, rows[i].name) == 0)
            break; /* nothing beyond the cap is even tried */
    }
    return best;
}
