/* The seven tile instructions that amx.c and amx_digits.c use, in plain C, for machines that don't have them: -DFASTCONV_AMX_MODEL=ON.
 *
 * As Intel's manual describes them (Software Developer's Manual, TDPBF16PS, TDPBSSD): even and odd products of a row are two chains of
 * fused multiply-adds that start at zero; their sum is added to the destination. Rounding is to nearest even; subnormal
 * inputs and results are zero. Registers are as large as amx.c configures them.
 */
#ifndef FASTCONV_AMX_MODEL_H
#define FASTCONV_AMX_MODEL_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MODEL_ROWS = 16, MODEL_ROW_BYTES = 64 };

typedef struct {
    int configured;
    char reg[8][MODEL_ROWS][MODEL_ROW_BYTES];
} fc_amx_registers;

extern _Thread_local fc_amx_registers fc_model; /* in amx.c: both tiles have the same */

/* On the machine, an instruction without a configuration is an illegal one. */
static inline void model_check(void)
{
    if (!fc_model.configured)
        abort();
}

static inline void _tile_loadconfig(const void *configuration)
{
    const uint8_t *bytes = configuration;
    memset(&fc_model, 0, sizeof fc_model);
    fc_model.configured = bytes[0] == 1;
    for (int reg = 0; reg < 8; reg++)
        if (bytes[16 + 2 * reg] != MODEL_ROW_BYTES || bytes[48 + reg] != MODEL_ROWS)
            abort();
}

static inline void _tile_release(void) { memset(&fc_model, 0, sizeof fc_model); }

static inline void _tile_zero(int reg)
{
    model_check();
    memset(fc_model.reg[reg], 0, sizeof fc_model.reg[reg]);
}

static inline void _tile_loadd(int reg, const void *base, ptrdiff_t stride)
{
    model_check();
    for (int m = 0; m < MODEL_ROWS; m++)
        memcpy(fc_model.reg[reg][m], (const char *)base + m * stride, MODEL_ROW_BYTES);
}

static inline void _tile_stored(int reg, void *base, ptrdiff_t stride)
{
    model_check();
    for (int m = 0; m < MODEL_ROWS; m++)
        memcpy((char *)base + m * stride, fc_model.reg[reg][m], MODEL_ROW_BYTES);
}

static inline void _tile_dpbssd(int sums, int left, int right)
{
    model_check();
    for (int m = 0; m < MODEL_ROWS; m++) {
        int32_t c[16];
        memcpy(c, fc_model.reg[sums][m], sizeof c);
        for (int k = 0; k < MODEL_ROW_BYTES; k++)
            for (int n = 0; n < 16; n++)
                c[n] += (signed char)fc_model.reg[left][m][k] * (signed char)fc_model.reg[right][k / 4][4 * n + k % 4];
        memcpy(fc_model.reg[sums][m], c, sizeof c);
    }
}

static inline float model_flush(float x) { return x > -FLT_MIN && x < FLT_MIN ? 0 : x; }

static inline float model_widen(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return model_flush(x);
}

static void _tile_dpbf16ps(int sums, int left, int right)
{
    model_check();
    for (int m = 0; m < MODEL_ROWS; m++) {
        float even[16] = {0}, odd[16] = {0}, c[16];
        uint32_t a[16], b[16][16];
        memcpy(a, fc_model.reg[left][m], sizeof a);
        memcpy(b, fc_model.reg[right], sizeof b);
        memcpy(c, fc_model.reg[sums][m], sizeof c);
        for (int k = 0; k < 16; k++) {
            const float a_even = model_widen(a[k] << 16), a_odd = model_widen(a[k] & 0xffff0000);
            for (int n = 0; n < 16; n++) {
                even[n] = model_flush(__builtin_fmaf(a_even, model_widen(b[k][n] << 16), even[n]));
                odd[n] = model_flush(__builtin_fmaf(a_odd, model_widen(b[k][n] & 0xffff0000), odd[n]));
            }
        }
        for (int n = 0; n < 16; n++)
            c[n] = model_flush(model_flush(c[n]) + model_flush(even[n] + odd[n]));
        memcpy(fc_model.reg[sums][m], c, sizeof c);
    }
}

#endif
