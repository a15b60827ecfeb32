from fastconv.kernels.native.blocking cimport Block, Blocks, Conv
from fastconv.kernels.native.machine cimport fc_padding, fc_planes

# Where pieces of numbers are multiplied:
cdef enum:
    FEW_CHANNELS = 4            # at most: more fill the tile in other drivers
    SPLIT_PRODUCTS = 49         # of a sum, at least: of shorter ones, storing or turning takes longer than products

# What all tasks of one call share: how planes lie, and, of ``conv_planar``, the rest.
ctypedef struct Plan:
    Conv c
    Blocks blocks
    Py_ssize_t groups           # that a task has
    Py_ssize_t together         # channels whose products are added up by themselves
    Py_ssize_t ahead            # groups whose planes are copied before any is read: a load waits for what was just stored
    Py_ssize_t high             # rows of a plane
    Py_ssize_t plane            # elements from one to the next
    fc_padding padding          # what is the same for all planes, ...
    fc_planes planes            # ... and all blocks
    bint one                    # filter in a group, by columns of taps
    bint in_place               # pixels are neighbours in the output, too, or two apart
    Py_ssize_t group_weights    # bytes of a group's packed weights
    const char *weights
    const char *bias
    Py_ssize_t columns          # pixels of a row of sums that are not in place
    Py_ssize_t strands          # phases of the output, each with taps of its own; 0: there is but one
    Py_ssize_t count[3]         # the same along each axis, ...
    Py_ssize_t step[3]          # ... and cells from one of a phase to the next
    const Py_ssize_t *phase     # of each: its first tap, and how many, (d, h, w)
    const Py_ssize_t *seen      # of each tap: the cell that it sees, (d, h, w), and its number in the filter
    unsigned char *refused      # images with numbers that can't be split; the last one stands for the weights


cdef void lay_out(Plan *plan) noexcept nogil
cdef Py_ssize_t tap_cell(const Plan *plan, Py_ssize_t channel, Py_ssize_t d, Py_ssize_t w) noexcept nogil
cdef void write_taps(const Plan *plan, Py_ssize_t *taps) noexcept nogil
cdef void pad_planes(const Plan *plan, const Block *block, Py_ssize_t first, Py_ssize_t count, char *out) noexcept nogil
cdef void fill_gaps(const Plan *plan, Py_ssize_t count, char *cells) noexcept nogil
