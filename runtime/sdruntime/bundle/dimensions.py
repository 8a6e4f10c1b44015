"""Tensor dimensions: a number, a name whose size each call chooses, or a fraction of one, such as "height/2"."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PART = re.compile(r"([^/]+)/([1-9][0-9]{0,3})")


def named_in(dim: str) -> str:
    """Return the name in a dimension: "height" for "height" and for "height/2". Raises ValueError."""
    if "/" not in dim:
        return dim
    if (match := _PART.fullmatch(dim)) is None:
        raise ValueError(f"dimension {dim!r:.100}: expected a name, or a name, a slash and a number, such as height/2")
    return match[1]


def size_of(dim: int | str, dims: Mapping[str, int]) -> int:
    """Return the size of a dimension for the given `dims`. A fraction is rounded up, as by a convolution of that stride."""
    if isinstance(dim, int):
        return dim
    name = named_in(dim)
    return -(-dims[name] // int(dim[len(name) + 1 :] or 1))
