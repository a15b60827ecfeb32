"""The machine as the native engine sees it: the instruction set in use, what else there is, threads, workspace."""

import os

from libc.stdlib cimport free

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "ukernels.h" nogil:
    size_t fc_built_isas(const char **names, size_t capacity)
    size_t fc_available_isas(const fc_isa **isas, size_t capacity)
    const fc_isa *fc_select_isa(const char *cap)
    void *fc_arena(int slot, size_t bytes)
    int fc_max_threads()
    int fc_usable_threads(int wanted)

cdef extern from *:
    """
    #ifdef __clang__
    #define FC_COMPILER __VERSION__
    #else
    #define FC_COMPILER "GCC " __VERSION__
    #endif
    """
    const char *FC_COMPILER

cdef bytes _cap = os.environ.get("FASTCONV_ISA", "").encode()
cdef const fc_isa *_isa = fc_select_isa(_cap)


cdef const fc_ukernels *ukernels(Py_ssize_t item_size) noexcept nogil:
    return _isa.f32 if item_size == 4 else _isa.f64


cdef const fc_ukernels *split_ukernels(Py_ssize_t item_size, int pieces) noexcept nogil:
    """Return the tile that multiplies so many pieces of a number; NULL if there is none."""
    return _isa.split[pieces - 1] if item_size == 4 else NULL


cdef char *arena(int slot, Py_ssize_t bytes) noexcept nogil:
    return <char *>fc_arena(slot, <size_t>bytes)


cdef class Memory:
    """Memory that outlives a call, 64-byte aligned, for packed weights."""

    def __cinit__(self, Py_ssize_t bytes):
        self.data = <char *>aligned_alloc(64, <size_t>(bytes + 63) // 64 * 64)
        if self.data == NULL:
            raise MemoryError("no memory for packed weights")

    def __dealloc__(self):
        free(self.data)


cdef int usable_threads(int wanted) noexcept nogil:
    return fc_usable_threads(wanted)


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
