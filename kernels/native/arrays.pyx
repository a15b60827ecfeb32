"""See ``reference/arrays.py``."""

from cpython.ref cimport Py_INCREF, PyObject
from libc.stdint cimport uintptr_t

cimport numpy as cnp

from fastconv.kernels.reference import arrays
from fastconv.kernels.reference.arrays import DTYPES

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(
        type, cnp.PyArray_Descr *, int, const cnp.npy_intp *, const cnp.npy_intp *, void *, int, PyObject *
    )

cdef enum:
    MOST_AXES = 5
    LINE = 64       # bytes
    SMALL = 1 << 10 # bytes: too few for where they begin to matter


def is_ordinary(array):
    """See ``reference/arrays.py``."""
    if not cnp.PyArray_CheckExact(array) or not cnp.PyArray_ISCARRAY(<cnp.ndarray>array):
        return False
    return cnp.PyArray_TYPE(<cnp.ndarray>array) in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE)


def is_frozen(tuple values):
    """See ``reference/arrays.py``; of tuples of tuples of tuples it says no."""
    return _is_frozen(values, 2)


cdef bint _is_frozen(tuple values, int depth):
    for value in values:
        if type(value) is int or value is None or type(value) is str:
            continue
        if depth == 0 or type(value) is not tuple or not _is_frozen(value, depth - 1):
            return False
    return True


def empty_below(Py_ssize_t limit, tuple shape, dtype):
    """See ``reference/arrays.py``; of at most five axes."""
    cdef cnp.npy_intp[MOST_AXES] size
    cdef cnp.npy_intp bytes = _size(shape, dtype, limit, size)
    if bytes >= limit:
        return None
    if bytes < SMALL:
        return _array(shape, dtype, size, NULL)
    bytes += LINE
    return _from_line(shape, dtype, size, cnp.PyArray_SimpleNew(1, &bytes, cnp.NPY_UINT8))


def from_line(tuple shape, dtype, cnp.ndarray memory):
    """See ``reference/arrays.py``; of at most five axes."""
    cdef cnp.npy_intp[MOST_AXES] size
    cdef Py_ssize_t room = cnp.PyArray_NBYTES(memory) - LINE
    if _size(shape, dtype, room + 1, size) > room:
        raise ValueError(f"memory of {room} bytes and a line is too small for an array of shape {shape}")
    return _from_line(shape, dtype, size, memory)


cdef Py_ssize_t _size(tuple shape, dtype, Py_ssize_t limit, cnp.npy_intp *size) except -1:
    """Take a shape apart, and count its bytes; those beyond the limit are not counted, which might be more than there are numbers."""
    cdef Py_ssize_t bytes = (<cnp.dtype>dtype).itemsize, length
    cdef int i
    for i in range(<int>len(shape)):
        length = size[i] = shape[i]
        bytes = bytes * length if length == 0 or bytes <= limit // length else limit
    return min(bytes, limit)


cdef object _from_line(tuple shape, dtype, const cnp.npy_intp *size, cnp.ndarray memory):
    cdef char *data = <char *>cnp.PyArray_DATA(memory)
    array = _array(shape, dtype, size, data + <Py_ssize_t>(-<uintptr_t>data % LINE))
    cnp.set_array_base(array, memory)
    return array


cdef object _array(tuple shape, dtype, const cnp.npy_intp *size, char *data):
    """Return an array of numbers that are somewhere, or, with NULL, in memory of its own."""
    Py_INCREF(dtype)  # the array's own
    return PyArray_NewFromDescr(
        cnp.ndarray, <cnp.PyArray_Descr *>dtype, <int>len(shape), size, NULL, data, cnp.NPY_ARRAY_CARRAY if data else 0, NULL
    )


def arrange(cnp.ndarray array, tuple axes):
    """See ``reference/arrays.py``; of at most five axes."""
    cdef cnp.npy_intp[MOST_AXES] size
    cdef cnp.npy_intp[MOST_AXES] stride
    cdef cnp.PyArray_Descr *dtype = cnp.PyArray_DESCR(array)
    cdef int count = <int>len(axes), i, axis
    for i in range(count):
        axis = axes[i]
        size[i] = cnp.PyArray_DIM(array, axis) if axis >= 0 else 1
        stride[i] = cnp.PyArray_STRIDE(array, axis) if axis >= 0 else 0
    Py_INCREF(<object>dtype)  # the view's own
    view = PyArray_NewFromDescr(
        cnp.ndarray, dtype, count, size, stride, cnp.PyArray_DATA(array),
        cnp.PyArray_FLAGS(array) & cnp.NPY_ARRAY_WRITEABLE, NULL,
    )
    cnp.set_array_base(view, array)
    return view


def highest(cnp.ndarray array):
    """See ``reference/arrays.py``."""
    if cnp.PyArray_TYPE(array) != cnp.NPY_UINT8 or not cnp.PyArray_IS_C_CONTIGUOUS(array):
        return arrays.highest(array)
    cdef const unsigned char *number = <const unsigned char *>cnp.PyArray_DATA(array)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(array), half = n // 2, i
    cdef unsigned char some = number[n - 1], others = some
    for i in range(half):  # one maximum would wait for itself
        some = max(some, number[i])
        others = max(others, number[half + i])
    return max(some, others)
