"""Rewrite a 2x upsampling followed by a 3x3 convolution as four 2x2 convolutions of the small image: 16 products instead of 36.

After nearest-neighbour upsampling, several of the kernel's nine weights apply to the same pixel, so they are added in advance.
Which ones depends on whether the output pixel's row and column are even or odd: hence four kernels, whose results are interleaved
(Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?", arXiv:1609.07009). Zero padding of the small
image equals zero padding of the large one, so the result is the same up to the order of summation.

A UNet has three of these pairs; a VAE decoder has three as well, which are a fifth of its work.
"""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array

# [parity, index in the 2-tap kernel, index in the 3-tap kernel] along one axis; W[p,q] = TAPS[p] @ W @ TAPS[q].T
TAPS: Array = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # parities of row and column, in the channel order of DepthToSpace (DCR)


def pads(row: int, column: int) -> tuple[list[int], list[int]]:
    """Return the zero padding (begin and end, each [rows, columns]) of the small image for output pixels of these parities."""
    return [1 - row, 1 - column], [row, column]
