"""The kernels of fastconv, and the contract that every one of them keeps.

A kernel family is one algorithm in one engine, one module::

    reference/   engine "numpy"    naive.py (oracle and baseline), conv_im2col.py (the best plain NumPy)
    jit/         engine "numba"    conv_direct.py  conv_im2col.py  conv_winograd.py  conv_planar.py  max_pool.py
    native/      engine "cython"   the same, and what they share; on ukernels/

Beside these folders is what several engines, or kernels and the choice between them, share: ``interleave`` (the
gradient of the input as convolutions of stride 1), ``exchange`` (the gradient of the weights with image and gradients
exchanged), ``few_pixels`` (which layers have few pixels for their weights), ``winograd`` (the tile, and what it costs),
``averages`` (of whole images, and gradients of windows that don't overlap, in NumPy).

The same algorithm has the same file name and the same function names in each engine::

    conv_forward(input, weight, bias, output, dims, options)
    conv_input_grad(grad_output, weight, bias, grad_input, dims, options)
    conv_weight_grad(input, grad_output, grad_weight, grad_bias, dims, options)
    max_pool_forward(input, output, winners, dims, options)
    max_pool_backward(grad_output, winners, grad_input, dims, options)

The native and the reference engine have ``elementwise``, too, for contiguous arrays of one shape, whatever it is::

    relu_backward(output, grad_output, grad_input, options)     the gradient where the output is positive, 0 elsewhere

and ``arrays``, which has no kernels: what every call asks of its arrays before and after, whatever its engine is.

The contract
------------
- **Three spatial dimensions, always.** ``input`` is (N, C, D, H, W), ``weight`` (K, C/groups, KD, KH, KW), ``output``
  (N, K, OD, OH, OW), ``bias`` (K,) or None. 1-D and 2-D problems have leading ones.
- **A layout is only strides.** Arrays come as views with any element strides: NCHW, NHWC, reversed (negative
  strides), broadcast (stride 0), read-only. They are float32 or float64, all of one type, aligned, in native byte
  order.
- **Everything is validated before a kernel sees it**; a kernel checks nothing and raises nothing (but MemoryError).
- **Results are preallocated and overwritten completely**, whatever they held. They overlap no input.
- ``dims`` is a ``ConvDims`` or ``PoolDims`` (plain named tuples of ints and 3-tuples). Sizes may be zero for the
  batch only.
- ``options`` is ``Options(activation, precision, threads, packed)``. ``activation`` is None or "relu" and is applied,
  after the bias, in the same pass that stores the result. ``threads`` is the largest number of threads to use.
  ``packed`` is None, or a dict that comes with every call that has the same weights: a kernel may keep them there as it
  has packed them, under a key that tells the form.
- ``bias`` of ``conv_input_grad`` is (C,): a transposed convolution is the gradient of the input plus a bias.
  ``grad_bias`` is (K,) or None where nobody wants it.
- ``winners`` holds each maximum's position in its window, ``(kd * KH + kh) * KW + kw``, as uint8 (uint16 when the
  window has more than 256 cells), or None where nobody wants it. The first maximum in that order wins a tie; a NaN
  wins over numbers (the last NaN of the window over earlier ones, as PyTorch has it); cells in the padding never win.
- **The same bits every time**: an output element depends neither on the number of threads, nor on the batch size, nor
  on its position in the batch.
- The GIL is released in compiled engines. Workspace does not grow with the batch: at most 8 MB a thread, beside the
  packed weights.
- Nothing here imports anything of fastconv outside this folder.
"""
