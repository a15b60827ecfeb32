/* AVX-512 (F, BW, DQ, VL): 32 registers; 8 rows and not 14, for a pointer to each row must fit into a general register. */
#define ISA avx512
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define EVEN_ROWS 14
#include "families.h"
