"""Engine "cython": drivers in Cython (blocking, packing, threads) around microkernels in plain C (``ukernels/``).

=================  ====================================================================================
``machine``        the instruction set in use, what else there is, threads; the tile, bare, to time it
``blocking``       what the drivers share: views, packing, the store of a finished chunk
``weight_chunks``  how the gradient of the weights is shared out
``conv_direct``    convolution on packed channel blocks; depthwise; weight gradient
``conv_im2col``    convolution by way of patches, for few channels; weight gradient
``conv_winograd``  tiles of outputs by fewer multiplications: 16 instead of 36 for 2x2 of 3x3 filters
``max_pool``       max pooling
=================  ====================================================================================
"""
