/* What every machine has: 16-byte vectors (SSE2, NEON, or whatever the compiler makes of them). */
#define ISA scalar
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#define EVEN_ROWS 4
#include "families.h"
