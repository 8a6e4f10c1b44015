"""Upsampling by two and a 3x3 convolution, as four 2x2 convolutions of the small image: 16 products in place of 36.

After nearest-neighbour upsampling several of a kernel's nine weights meet the same pixel, so they are added beforehand. Which
ones depends on whether the pixel made is an even or an odd one, down and across: hence four kernels, whose results are
interleaved (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?", arXiv:1609.07009). At the borders
the zeros around the small image are the zeros around the large one, so it is the same function, up to the order of the sums.

A UNet has three of these pairs and a VAE's decoder has three, a fifth of its work.
"""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array

# [parity, weight of 2, weight of 3] along one axis; W[p,q] = TAPS[p] @ W @ TAPS[q].T
TAPS: Array = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # parities of row and column, in the order in which DepthToSpace (DCR) takes channels


def pads(row: int, column: int) -> tuple[list[int], list[int]]:
    """The zeros before and after the small image, down and across, for the pixels of these parities."""
    return [1 - row, 1 - column], [row, column]
