"""Numbers in fixed point, for a tile that multiplies digits: which layers, what scale, and how many digits are enough.

An image's channel block, and a filter's, have one scale each, that of the largest number. What digits miss of a product of
numbers x and w that are rounded to 24 bits of the largest, X and W, has a mean square of

    (X^2 w^2 + W^2 x^2) / 3     rounding, in units of 2^-48                (x^2, w^2: the mean squares)
    1/9 X^2 W^2                 each product of digits that is dropped: none of 8, one if 7 are made, two if 6

and adds up like noise: n such products miss n times that. Adding up n float32 numbers one after another rounds ever larger sums,
and misses 0.0864 n^2 x^2 w^2; less if many of them are zeros, by both densities, or if some channel blocks, of an image or
of a few filters that are tried, are far above the others, by their evenness. So "highest" asks for

    (X^2/x^2 + W^2/w^2) / 3 + dropped / 9 X^2/x^2 W^2/w^2  <=  0.0864 n density(x) density(w) / MARGIN

of each channel block and panel: long sums of numbers none of which is far above the others. What a few filters say of the weights decides
unless it is near: then all are asked, for a filter that refuses when others are computed has them computed in vain. Six products are made where that is
enough, else seven or eight; where they aren't, the image is left to another tile. What decides is the image and the weights alone.

The constants come from the distributions: a rounding error of a unit is 1/sqrt(12) of it, two digits of the same product are
independent, and a float32 sum is off by 0.42 units of 2^-24 on average. ``tests/test_precision.py`` holds them to it.
"""

from itertools import groupby

import numpy as np

cimport numpy as cnp
from libc.string cimport memset

from fastconv.kernels.native.blocking cimport Conv, View, ceil_div, run_tasks, taps_continue
from fastconv.kernels.native.machine cimport FC_ARENA_WEIGHTS, arena, digit_ukernels, fc_spread, fc_tally, fc_ukernels

cdef enum:
    FEW_CHANNELS = 40       # that fill enough of a step of 64
    SUMMED = 200            # products of a sum: with fewer, even normal numbers need more than 8 products of digits, often enough
    TRIED = 4               # filters
    PARTS = 4               # of a channel block's numbers, unless these are ...
    SMALL = 1 << 14         # ... fewer, about
    TOGETHER = 256          # channel blocks
    LANES = 16              # of a tally
    MOST_TAPS = 400         # sums of a channel block's products fit int32

cdef double ROUNDING = 1 / 3.0
cdef double DROPPED = 1 / 9.0
cdef double PLAIN = 0.0864
cdef double MARGIN = 1.2
cdef double NEAR = 0.6

# What all tasks of one call share.
ctypedef struct Plan:
    const Conv *c
    const View *x               # what is counted, ``channels`` in a group
    Py_ssize_t channels, width, channel_blocks
    Py_ssize_t top, step        # rows of it that are seen
    Py_ssize_t parts            # that a channel block is counted in, for threads to share
    fc_tally *tallies
    Py_ssize_t *counted         # numbers of each part
    Py_ssize_t first            # of the channel blocks that are counted together


def by_forms(convolve, cnp.ndarray input, output, Py_ssize_t summed, rest):
    """Convolve with the tile for digits, for sums of so many products that there may be one, or pieces; refused images with
    the next."""
    cdef bint digits = summed >= SUMMED and digit_ukernels(cnp.PyArray_ITEMSIZE(input)) != NULL
    _by_forms(convolve, input, output, DIGITS if digits else PIECES, rest)


def _by_forms(convolve, input, output, form, rest):
    refused = convolve(input, output, form, *rest)
    if not refused:  # nearly always, and a call should take microseconds
        return
    for _, run in groupby(enumerate(refused), lambda item: item[1] - item[0]):
        images = [image for _, image in run]  # neighbours are left together
        some = slice(images[0], images[0] + len(images))
        _by_forms(convolve, input[some], output[some], form - 1, rest)


cdef const fc_ukernels *digit_tile(const Conv *c, str precision, Py_ssize_t summed):
    """Return the tile that multiplies digits; NULL where there is none, or sums of so many products would be refused."""
    cdef const fc_ukernels *kernels = digit_ukernels(c.item)
    if kernels == NULL or precision != "highest" or c.channels < FEW_CHANNELS or summed < SUMMED:
        return NULL
    if c.taps > MOST_TAPS or c.out[1] * c.out[2] < kernels.tile_rows or (c.x.stride[4] != 1 and c.x.stride[1] != 1):
        return NULL
    return kernels


cdef Scales measure(const Conv *c, const View *x, Py_ssize_t channels, Py_ssize_t width, Py_ssize_t summed,
                    unsigned char *refused):
    """Measure each image's channel blocks, ``width`` of a group's ``channels``; refuse those for which a few weights won't do."""
    cdef Plan plan
    cdef Scales scales = Scales()
    cdef cnp.ndarray memory
    cdef Py_ssize_t blocks, some_blocks, number, first
    cdef fc_spread some, every
    cdef const fc_spread *judge
    cdef float *squares
    cdef double even
    cdef bint tried = False
    plan.c, plan.x, plan.channels, plan.width = c, x, channels, width
    plan.channel_blocks = ceil_div(channels, width)
    plan.step = c.stride[1] if x == &c.x and c.kernel[1] == 1 else 1
    plan.top = (plan.step - c.pad[1] % plan.step) % plan.step
    plan.parts = PARTS if width * x.size[3] * x.size[4] >= SMALL else 1  # whatever the number of threads
    blocks = c.batch * c.groups * plan.channel_blocks
    scales.memory = memory = np.empty((4, blocks), np.float32)
    scales.scale = <float *>cnp.PyArray_DATA(memory)
    scales.spread = <fc_spread *>(scales.scale + blocks)
    squares = scales.scale + 3 * blocks
    some_blocks = min(blocks, <Py_ssize_t>TOGETHER)  # workspace doesn't grow with the batch
    plan.tallies = <fc_tally *>arena(FC_ARENA_WEIGHTS, some_blocks * plan.parts * (sizeof(fc_tally) + sizeof(Py_ssize_t)))
    if plan.tallies == NULL:
        raise MemoryError("no memory for workspace")
    plan.counted = <Py_ssize_t *>(plan.tallies + some_blocks * plan.parts)
    some.peak = some.density = even = 1
    every = some
    if x == &c.x:
        even = _try_weights(c, width, TRIED, &some)
    for number in range(blocks):
        if number % some_blocks == 0:
            plan.first = number
            run_tasks(_measure_task, &plan, min(some_blocks, blocks - number) * plan.parts, c.threads)
        scales.scale[number] = _sum_up(&plan, number - plan.first, &scales.spread[number], &squares[number])
    for number in range(blocks):
        first = number - number % plan.channel_blocks
        scales.spread[number].density *= even * _evenness(&squares[first], plan.channel_blocks)
        judge = &some
        if x == &c.x and _is_near(&scales.spread[number], &some, summed):
            if not tried:
                tried = True
                _try_weights(c, width, c.groups * c.filters, &every)
            judge = &every  # this image's alone: what becomes of one has nothing to do with others
        if scales.scale[number] == 0 or products(&scales.spread[number], judge, summed) == 0:
            refused[number // (c.groups * plan.channel_blocks)] = 1
    return scales


cdef double _evenness(const float *squares, Py_ssize_t blocks) noexcept nogil:
    """Return which part of a sum's products it seems to have, if channel blocks have such mean squares: 1 where all are alike."""
    cdef double total = 0, fourth = 0
    cdef Py_ssize_t b
    for b in range(blocks):
        total += squares[b]
        fourth += <double>squares[b] * squares[b]
    return total * total / (blocks * fourth) if fourth > 0 else 1


cdef float _sum_up(const Plan *plan, Py_ssize_t block, fc_spread *spread, float *squares) noexcept nogil:
    """Return the scale of a channel block, from its parts in their order, and its mean square."""
    cdef const fc_tally *parts = plan.tallies + block * plan.parts
    cdef const Py_ssize_t *counted = plan.counted + block * plan.parts
    cdef fc_tally all = parts[0]
    cdef Py_ssize_t count = counted[0], part, i
    for part in range(1, plan.parts):
        count += counted[part]
        for i in range(LANES):
            all.sum[i] += parts[part].sum[i]
            all.squares[i] += parts[part].squares[i]
            if parts[part].largest[i] > all.largest[i] or parts[part].largest[i] != parts[part].largest[i]:
                all.largest[i] = parts[part].largest[i]
    squares[0] = _sum(all.squares) / max(<Py_ssize_t>1, count)
    spread.peak, spread.density = 0, 1
    return plan.c.kernels.spread(&all, max(<Py_ssize_t>1, count), spread)


cdef double _try_weights(const Conv *c, Py_ssize_t width, Py_ssize_t count, fc_spread *spread) noexcept nogil:
    """Find the worst spread of so many filters, before all are packed in vain, and return the worst evenness of their channel
    blocks; if their weights are neighbours."""
    cdef const View *w = &c.w
    cdef Py_ssize_t filters = c.groups * c.filters, i, first, n
    cdef const char *filter
    cdef double worst = 1, total, fourth, square
    cdef fc_tally tally
    if w.stride[1] * (c.channels > 1) not in (0, c.taps) or not taps_continue(c) or (c.taps > 1 and w.stride[4] != 1):
        return worst
    for i in range(count):
        filter = w.data + filters * i // count * w.stride[0] * c.item
        total = fourth = 0
        for first from 0 <= first < c.channels by width:
            n = min(width, c.channels - first) * c.taps
            memset(&tally, 0, sizeof(tally))
            c.kernels.tally(filter + first * c.taps * c.item, 1, 0, n, &tally)
            c.kernels.spread(&tally, n, spread)
            square = _sum(tally.squares) / n
            total += square
            fourth += square * square
        if fourth > 0:
            worst = min(worst, total * total / (ceil_div(c.channels, width) * fourth))
    return worst


cdef double _sum(const float *lanes) noexcept nogil:
    cdef double total = 0
    cdef int i
    for i in range(LANES):
        total += lanes[i]
    return total


cdef int _measure_task(const void *shared, Py_ssize_t number) noexcept nogil:
    """Count a part of a channel block: some channels, or columns where channels are neighbours."""
    cdef const Plan *plan = <const Plan *>shared
    cdef const Conv *c = plan.c
    cdef const View *x = plan.x
    cdef Py_ssize_t part = number % plan.parts, block = plan.first + number // plan.parts
    cdef Py_ssize_t b = block % plan.channel_blocks, group = block // plan.channel_blocks % c.groups
    cdef Py_ssize_t channels = min(plan.width, plan.channels - b * plan.width), first = 0, end = channels, i, d, h
    cdef Py_ssize_t left = 0, columns = x.size[4], step = plan.step, rows = ceil_div(max(0, x.size[3] - plan.top), step)
    cdef const char *plane
    cdef fc_tally *tally = &plan.tallies[number]
    if x.stride[4] == 1:
        first, end = channels * part // plan.parts, channels * (part + 1) // plan.parts
    else:
        left, columns = x.size[4] * part // plan.parts, x.size[4] * (part + 1) // plan.parts
        columns -= left
    memset(tally, 0, sizeof(tally[0]))
    for d in range(x.size[2]):
        plane = x.data + (
            block // (plan.channel_blocks * c.groups) * x.stride[0] + (group * plan.channels + b * plan.width) * x.stride[1]
            + d * x.stride[2] + plan.top * x.stride[3] + left * x.stride[4]
        ) * c.item
        if x.stride[4] != 1:
            for h in range(rows):
                c.kernels.tally(plane + h * step * x.stride[3] * c.item, columns, x.stride[4], channels, tally)
            continue
        if x.stride[3] == columns and step == 1 and x.stride[1] == rows * columns:  # channels continue one another, too
            c.kernels.tally(plane + first * x.stride[1] * c.item, 1, 0, (end - first) * rows * columns, tally)
            continue
        for i in range(first, end):
            if x.stride[3] == columns and step == 1:
                c.kernels.tally(plane + i * x.stride[1] * c.item, 1, 0, rows * columns, tally)
            else:
                c.kernels.tally(plane + i * x.stride[1] * c.item, rows, step * x.stride[3], columns, tally)
    plan.counted[number] = (end - first) * x.size[2] * rows * columns
    return 0


cdef inline double _allowed(const fc_spread *image, const fc_spread *weights, Py_ssize_t summed) noexcept nogil:
    """The error that plain sums of so many numbers have, less a margin."""
    return PLAIN / MARGIN * summed * image.density * weights.density


cdef inline double _rounding(const fc_spread *image, const fc_spread *weights) noexcept nogil:
    """The error of rounding numbers to digits."""
    return ROUNDING * (image.peak + weights.peak)


cdef bint _is_near(const fc_spread *image, const fc_spread *weights, Py_ssize_t summed) noexcept nogil:
    """Whether a few filters leave it open whether digits are enough for all."""
    cdef double allowed = _allowed(image, weights, summed), rounding = _rounding(image, weights)
    return NEAR * allowed < rounding <= allowed


cdef int products(const fc_spread *image, const fc_spread *weights, Py_ssize_t summed) noexcept nogil:
    """Return how many products of digits are enough for sums of so many numbers: 6, 7, 8, or 0 if more were needed."""
    cdef double allowed = _allowed(image, weights, summed), rounding = _rounding(image, weights)
    cdef double dropped = DROPPED * image.peak * weights.peak
    if rounding + 2 * dropped <= allowed:
        return 6
    if rounding + dropped <= allowed:
        return 7
    return 8 if rounding <= allowed else 0
