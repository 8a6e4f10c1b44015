"""Which numbers of an unrolled table grid.npz keeps."""

from __future__ import annotations

import numpy as np


def kept_rows(calls: int) -> list[int]:
    return sorted({row for row in (1, 2, 3, 4, 5, calls // 2, calls - 1, calls) if 1 <= row <= calls})


def kept_columns(row: int, draws: np.ndarray) -> list[int]:
    """Columns of an unrolled row that can hold anything, thinned out: x[0], m before the row, n drawn before it."""
    calls, drawn = len(draws), int(draws[:row].sum())
    return [
        *range(min(row + 1, 4)),
        *thinned(4, 1 + row),
        *range(1 + calls, 1 + calls + min(drawn, 2)),
        *thinned(3 + calls, 1 + calls + drawn),
    ]


def thinned(low: int, high: int) -> list[int]:
    """Up to 8 columns from low to high: the last four and four between."""
    if high - low <= 8:
        return list(range(low, high))
    return [*np.linspace(low, high - 5, 4).astype(int).tolist(), *range(high - 4, high)]
