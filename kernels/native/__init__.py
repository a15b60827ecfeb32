"""Engine "cython": drivers in Cython (blocking, packing, threads) around microkernels in plain C (``ukernels/``).

Modules in brackets do a part of the work of the one before them.

===================  ================================================================================================
``conv_direct``      convolution on packed blocks of channels (``depthwise``: channels as lanes; ``digits``: whether
                     numbers are multiplied as 8-bit digits, here and elsewhere)
``conv_im2col``      convolution by way of patches (``patches``, which gathers them; ``pointwise``: 1x1 filters, where
                     nothing is gathered; ``input_columns``: the gradient of the input; ``few_pixels``: layers whose
                     weights outnumber their pixels by far)
``conv_planar``      convolution with pixels as lanes, for few channels or few filters (``planes``, which lays them out)
``conv_winograd``    tiles of outputs by fewer multiplications (``winograd_tiles``: where they are)
``weight_direct``    the gradient of the weights by ``conv_direct``: packed blocks
``weight_im2col``    ... by ``conv_im2col``: patches
``weight_planar``    ... by ``conv_planar``: planes
``weight_winograd``  ... by ``conv_winograd``: tiles
``weight_pieces``    ... by AMX's tile of bf16 pieces of numbers, for ``weight_direct``
``weight_digits``    ... by AMX's tile of 8-bit digits, for ``weight_direct``
``weight_taps``      ... of few channels by AMX's tile of pieces, for ``weight_planar``
``weight_chunks``    how the gradient of the weights is cut into tasks: the same bits for any number of threads
``max_pool``         max pooling, forward and backward: row by row (``max_pool_rows``), channels first
                     (``max_pool_planes``), channels last (``max_pool_channels``), large windows
                     (``max_pool_scatter``); ``pooling`` is what these share
``arrays``           what every call asks of its arrays, and memory for results
``elementwise``      the gradient of ReLU
``machine``          the instruction set in use, what else there is, threads; the tile, bare, to time it
``blocking``         what the drivers share: views, packing, the store of a finished chunk
===================  ================================================================================================
"""
