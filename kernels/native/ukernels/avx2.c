/* AVX2 and FMA: 16 registers, 6 x 2 accumulators. */
#define ISA avx2
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define EVEN_ROWS 6
#include "families.h"
