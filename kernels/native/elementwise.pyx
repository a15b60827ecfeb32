"""Operations on plain arrays, number by number: a few large parts, shared among threads.

Nothing is computed that NumPy would not compute, but in one pass: such arrays come from memory, and go there.
"""

cimport numpy as cnp

from fastconv.kernels.native.blocking cimport ceil_div, run_tasks
from fastconv.kernels.native.machine cimport fc_ukernels, ukernels, usable_threads

cdef enum:
    PART = 1 << 16      # numbers of a task: more than one is worth waking a thread

ctypedef struct Plan:
    const fc_ukernels *kernels
    const char *output
    const char *grad
    char *result
    Py_ssize_t n, item


def relu_backward(cnp.ndarray output, cnp.ndarray grad_output, cnp.ndarray grad_input, options):
    """See ``fastconv.kernels``."""
    cdef Plan plan
    plan.n, plan.item = cnp.PyArray_SIZE(output), cnp.PyArray_ITEMSIZE(output)
    plan.kernels = ukernels(plan.item)
    plan.output, plan.grad = cnp.PyArray_BYTES(output), cnp.PyArray_BYTES(grad_output)
    plan.result = cnp.PyArray_BYTES(grad_input)
    cdef Py_ssize_t tasks = ceil_div(plan.n, PART)
    run_tasks(_relu_task, &plan, tasks, usable_threads(options.threads) if tasks > 1 else 1)


cdef int _relu_task(const void *shared, Py_ssize_t number) noexcept nogil:
    cdef const Plan *plan = <const Plan *>shared
    cdef Py_ssize_t start = number * PART * plan.item, count = min(<Py_ssize_t>PART, plan.n - number * PART)
    plan.kernels.relu_grad(plan.output + start, plan.grad + start, count, plan.result + start)
    return 0
