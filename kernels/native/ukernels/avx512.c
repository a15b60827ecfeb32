/* AVX-512 (F, BW, DQ, VL): 32 registers, 14 x 2 accumulators; 8 rows where a pointer to each must fit into a general register. */
#define ISA avx512
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define EVEN_ROWS 14
#include "families.h"
