"""Engine "numba": the convolutions in Python that Numba compiles, for reading and for machines without a C compiler.

Read them in this order; each file stands on those before it::

    compile.py       jit and kernel: Numba, with a cache that no edit of this folder escapes
    tile.py          the register tile: C += sum over taps of A * B, where all the arithmetic happens
    blocking.py      how a convolution is cut into boxes, blocks and panels that fit the caches
    threads.py       tasks on threads, and each thread's workspace
    packing.py       between strided arrays and the tile's packed form, and the epilogue
    weight_grad.py   the half that all gradients of weights share
    winograd_tiles.py  weight_winograd.py   Winograd's transforms, and its gradient of the weights
    conv_direct.py   conv_im2col.py   conv_winograd.py   conv_planar.py   max_pool.py: see ``fastconv.kernels``
"""
