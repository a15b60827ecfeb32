cimport numpy as cnp

from fastconv.kernels.native.blocking cimport Block, Conv
from fastconv.kernels.native.weight_chunks cimport WeightPlan, WeightTask

cdef enum:
    UNITS = 16                  # that are packed at a time, at most

# How taps along one axis see phases.
ctypedef struct Axis:
    Py_ssize_t period, step     # tap h sees phase h % period, h // period * step cells further on
    Py_ssize_t phases, reach    # that there are; cells from the first to the last tap, of a phase

# What all tasks of one call share.
ctypedef struct Plan:
    WeightPlan base
    Axis axes[3]
    Py_ssize_t pitch            # cells from row to row
    Py_ssize_t pixels           # of a unit, gaps included: a multiple of the tile's depth
    Py_ssize_t cells            # of a phase
    Py_ssize_t plane            # elements of a piece of a vector of channels
    Py_ssize_t copy_bytes       # of a block of channels of a phase
    Py_ssize_t phase_bytes      # with its copies
    Py_ssize_t block_bytes      # of a block of channels
    Py_ssize_t grad_row         # bytes of a filter's gradients
    Py_ssize_t grad_bytes       # of a panel of gradients
    Py_ssize_t float_bytes      # of numbers to be split
    Py_ssize_t together         # units that are packed at a time

# How large the packed numbers of a unit are.
ctypedef void (*SizeFunction)(Plan *plan) noexcept nogil

cdef int split_weight_grad(cnp.ndarray input, cnp.ndarray grad_output, cnp.ndarray grad_weight, grad_bias, dims,
                           options) except -1
cdef bint plan_units(Plan *plan, SizeFunction size, grad_bias) except -1
cdef void size_rows(Plan *plan, Py_ssize_t align) noexcept nogil
cdef Py_ssize_t lay_cells(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t channel, Py_ssize_t d,
                          Py_ssize_t h, Py_ssize_t w, Py_ssize_t first, Py_ssize_t count, char *out, char *row) noexcept nogil
cdef int split_panel(const Plan *plan, const WeightTask *t, const Block *block, Py_ssize_t panel, float scale, char *floats,
                     char *out) noexcept nogil
cdef Py_ssize_t phase_of(const Plan *plan, Py_ssize_t d, Py_ssize_t h, Py_ssize_t w, Py_ssize_t *shift) noexcept nogil
