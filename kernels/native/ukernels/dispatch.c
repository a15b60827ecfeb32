/* Chooses the instruction set once, from what this build and this CPU have, under the user's cap.
 * To add one: one file like avx2.c, its line in CMakeLists.txt, and one row here, in order of speed.
 */
#include <string.h>

#include "ukernels.h"

typedef struct {
    const fc_isa *isa;
    int present;
} row;

static size_t rows(row out[])
{
    size_t n = 0;
    out[n++] = (row){&fc_isa_scalar, 1};
#ifdef FC_HAVE_AVX2
    out[n++] = (row){&fc_isa_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
#endif
#ifdef FC_HAVE_AVX512
    out[n++] = (row){&fc_isa_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")};
#endif
    return n;
}

size_t fc_available_isas(const fc_isa *isas[], size_t capacity)
{
    row all[8];
    size_t n = rows(all), found = 0;
    for (size_t i = 0; i < n && found < capacity; i++)
        if (all[i].present)
            isas[found++] = all[i].isa;
    return found;
}

const fc_isa *fc_select_isa(const char *cap)
{
    row all[8];
    size_t n = rows(all);
    const fc_isa *best = &fc_isa_scalar;
    for (size_t i = 0; i < n; i++) {
        if (all[i].present)
            best = all[i].isa;
        if (strcmp(cap, all[i].isa->name) == 0)
            break; /* nothing beyond the cap */
    }
    return best;
}
