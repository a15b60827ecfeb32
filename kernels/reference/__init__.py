"""Engine "numpy": plain NumPy, always there.

naive.py        the textbook loops: what every other kernel is tested and timed against
conv_im2col.py  convolution as matrix products of gathered columns: the best that plain NumPy has
max_pool.py     max pooling by shifted views of the whole image
"""
