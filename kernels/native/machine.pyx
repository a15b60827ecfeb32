"""The machine as the native engine sees it: the instruction set in use, what else there is, threads, workspace."""

import os

from libc.stdlib cimport free
from libc.string cimport memset

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "ukernels.h" nogil:
    size_t fc_built_isas(const char **names, size_t capacity)
    size_t fc_available_isas(const fc_isa **isas, size_t capacity)
    const fc_isa *fc_select_isa(const char *cap)
    void *fc_arena(int slot, size_t bytes)
    int fc_max_threads()
    int fc_usable_threads(int wanted)
    void fc_fence()

cdef extern from *:
    """
    #ifdef __clang__
    #define FC_COMPILER __VERSION__
    #else
    #define FC_COMPILER "GCC " __VERSION__
    #endif
    """
    const char *FC_COMPILER

cdef enum:
    TAPS = 9        # what run_tile sums over: as a 3x3 convolution of 64 channels
    DEPTH = 64
    MOST_ROWS = 32  # of any tile
    ORDINARY = 0x3c # each byte of a number near 0.01, float32 or bf16

cdef bytes _cap = os.environ.get("FASTCONV_ISA", "").encode()
cdef const fc_isa *_isa = fc_select_isa(_cap)


cdef const fc_ukernels *ukernels(Py_ssize_t item_size) noexcept nogil:
    return _isa.f32 if item_size == 4 else _isa.f64


cdef const fc_ukernels *split_ukernels(Py_ssize_t item_size, int pieces) noexcept nogil:
    """Return the tile that multiplies so many pieces of a number; NULL if there is none."""
    return _isa.split[pieces - 1] if item_size == 4 else NULL


cdef const fc_ukernels *digit_ukernels(Py_ssize_t item_size) noexcept nogil:
    """Return the tile that multiplies digits of numbers; NULL if there is none."""
    return _isa.digits if item_size == 4 else NULL


cdef char *arena(int slot, Py_ssize_t bytes) noexcept nogil:
    return <char *>fc_arena(slot, <size_t>bytes)


cdef class Memory:
    """Memory that outlives a call, for packed weights; what may be read beyond is as in the arena."""

    def __cinit__(self, Py_ssize_t bytes):
        self.data = <char *>aligned_alloc(64, <size_t>(bytes + FC_BEYOND + 63) // 64 * 64)
        if self.data == NULL:
            raise MemoryError("no memory for packed weights")

    def __dealloc__(self):
        free(self.data)


cdef int usable_threads(int wanted) noexcept nogil:
    return fc_usable_threads(wanted)


cdef void fence() noexcept nogil:
    """Let all that this thread has stored come before what it stores from now on."""
    fc_fence()


def isa() -> str:
    """Return the name of the instruction set in use."""
    return _isa.name.decode()


def built_isas() -> list[str]:
    """Return the instruction sets that this build has, whatever the CPU."""
    cdef const char *names[8]
    cdef size_t n = fc_built_isas(names, 8)
    return [names[i].decode() for i in range(n)]


def available_isas() -> list[str]:
    """Return the instruction sets that this build and this CPU have, best last."""
    cdef const fc_isa *found[8]
    cdef size_t n = fc_available_isas(found, 8)
    return [found[i].name.decode() for i in range(n)]


def max_threads() -> int:
    """Return how many threads OpenMP allows a parallel region."""
    return fc_max_threads()


def compiler() -> str:
    """Return the version of the compiler that built this engine."""
    return "built with " + FC_COMPILER.decode()


def tiles() -> list[int]:
    """Return into how many pieces the tiles of float32 split a number; 0 is the tile that does not, 6 to 8 that of digits
    with so many products."""
    return [0] + [pieces for pieces in range(1, 4) if _isa.split[pieces - 1] != NULL] + [6, 7, 8] * (_isa.digits != NULL)


cdef const fc_ukernels *_tile(int pieces) except NULL:
    if pieces not in tiles():
        raise ValueError(f"pieces must be one of {tiles()}, got {pieces}")
    if pieces > 3:
        return _isa.digits
    return split_ukernels(4, pieces) if pieces else _isa.f32


cdef char *_ordinary_numbers(Py_ssize_t size) except NULL:
    """Return so many bytes of workspace, full of numbers whose sums and products are neither subnormal nor infinite."""
    cdef char *memory = arena(FC_ARENA_BLOCK, size)
    if memory == NULL:
        raise MemoryError
    memset(memory, ORDINARY, size)
    return memory


def run_tile(int pieces, Py_ssize_t calls) -> int:
    """Run the register tile of float32, whole and on operands that stay in L1; return the operations that it made.

        image [height][DEPTH]   weights [DEPTH][two vectors], the same for each tap   sums [height][two vectors]
    """
    cdef const fc_ukernels *kernels = _tile(pieces)
    cdef int height = kernels.tile_rows if pieces else kernels.even_rows, width = 2 * kernels.lanes, m
    cdef Py_ssize_t item = kernels.packed if pieces else 4
    cdef Py_ssize_t[TAPS] taps
    cdef Py_ssize_t[MOST_ROWS] rows
    cdef fc_reduction reduction
    cdef fc_scales scales
    cdef float scale = 1
    cdef char *image = _ordinary_numbers((height + width) * DEPTH * item + height * width * 4)
    cdef char *weights = image + height * DEPTH * item
    cdef char *sums = weights + width * DEPTH * item
    memset(taps, 0, sizeof(taps))
    reduction = fc_reduction_over(taps, TAPS, DEPTH)
    for m in range(width if kernels.digits else 0):
        scales.scale[m] = 1
    reduction.scales, reduction.scale, reduction.products = &scales, &scale, pieces
    reduction.b_step = reduction.c_step = width
    for m in range(height):
        rows[m] = m * DEPTH
    with nogil:
        if pieces:
            kernels.enter()
        for _ in range(calls):
            kernels.brgemm(&reduction, image, rows, height, weights, 2, sums, 0)
        if pieces:
            kernels.leave()
    return 2 * calls * height * width * TAPS * DEPTH


def run_ceiling(int pieces, Py_ssize_t rounds) -> int:
    """Run multiply-adds in registers, nothing loaded; return the operations that a tile makes of so many."""
    cdef const fc_ukernels *kernels = _tile(pieces)
    cdef char *sums = _ordinary_numbers(1024)
    cdef Py_ssize_t made
    with nogil:
        if pieces:
            kernels.enter()
        made = kernels.saturate(rounds, sums)
        if pieces:
            kernels.leave()
    return made // (pieces if kernels.digits else max(1, pieces * (pieces + 1) // 2))  # products for each of numbers: 1, 3, 6
