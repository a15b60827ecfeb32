"""Max pooling, forward and backward.

    output[o]     = max over cells t of the window  of  input[o * stride + t * dilation - padding]
    grad_input[i] = sum over windows o that have i as their cell t and winner  of  grad_output[o]

Forward, ``max_pool_rows`` pools any image row by row, and ``max_pool_planes`` channels-first ones whose rows are short or see
padding. Backward gathers: cells of the input that are a stride apart make up a class, and are seen by windows at the same distance from
them. The classes of a row are stored together, so that every cell is written once and never read: ``max_pool_planes`` and
``max_pool_channels``. Where windows are large, gradients are scattered to their winners instead: ``max_pool_scatter``. Either way a sum runs
over the windows in their order.
"""

from fastconv.kernels.native.blocking cimport ceil_div, round_up
from fastconv.kernels.native.max_pool_channels cimport gather_along_channels
from fastconv.kernels.native.max_pool_planes cimport gather_in_planes, gathers_in_planes, pool_in_planes, pools_in_planes
from fastconv.kernels.native.max_pool_rows cimport number_rows, pool_by_rows
from fastconv.kernels.native.max_pool_scatter cimport scatter
from fastconv.kernels.native.pooling cimport Pool, make_pool

cdef enum:
    GATHER_CLASSES = 16         # with more classes of cells, gradients are scattered, ...
    SHORT = 4                   # ... and in images of fewer channels; of less than a vector, if windows overlap


def max_pool_forward(input, output, winners, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    make_pool(&pool, input, output, winners, dims, options)
    number_rows(&pool)
    if pools_in_planes(&pool):
        pool_in_planes(&pool)
    else:
        pool_by_rows(&pool)


def max_pool_backward(grad_output, winners, grad_input, dims, options):
    """See ``fastconv.kernels``."""
    cdef Pool pool
    cdef Pool *p = &pool
    make_pool(p, grad_input, grad_output, winners, dims, options)
    if _is_large(p) or <double>p.stride[0] * p.stride[1] * p.stride[2] > GATHER_CLASSES:
        scatter(p)
    elif not p.along_channels and gathers_in_planes(p):
        gather_in_planes(p)
    elif p.along_channels and _can_gather(p):
        gather_along_channels(p)
    else:
        scatter(p)


cdef bint _is_large(const Pool *p) noexcept nogil:
    """Whether a gradient is scattered in less time than all cells that may have won it take to look there."""
    cdef Py_ssize_t lanes = p.kernels.lanes, vector = lanes * p.item, cells = ceil_div(p.x.size[4], p.stride[2])
    cdef double looks = p.taps
    if not p.along_channels:
        looks *= round_up(cells, lanes) / <double>cells  # a short row leaves a part of its vectors empty
    if vector < 32:
        return looks > 2
    return looks > (16 if vector == 64 and p.item == 4 else 36)  # where 16 winners are looked up at once, or not


cdef bint _can_gather(const Pool *p) noexcept nogil:
    """Whether there are channels enough, and the outputs' gradients and winners are contiguous in the same way."""
    cdef int axis
    cdef Py_ssize_t fewest = min(<Py_ssize_t>p.kernels.lanes, SHORT)
    for axis in range(5):
        if p.y.stride[axis] != p.winners.stride[axis]:
            return False
    for axis in range(3):
        if (p.kernel[axis] - 1) * p.dilation[axis] >= p.stride[axis]:
            fewest = p.kernels.lanes
    return p.y.stride[1] == 1 and p.y.size[1] >= fewest
