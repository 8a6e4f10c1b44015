"""Tensor dimensions: a number, a name whose size each call chooses, or a part or multiple of one: "height/2", "height*8"."""

from __future__ import annotations

import re
from collections.abc import Mapping

_DERIVED = re.compile(r"([^/*]+)([/*])([1-9][0-9]{0,3})")


def named_in(dim: str) -> str:
    """Return the name in a dimension: "height" for "height", "height/2" and "height*8". Raises ValueError."""
    if not is_derived(dim):
        return dim
    if (match := _DERIVED.fullmatch(dim)) is None:
        raise ValueError(f"dimension {dim!r:.100}: expected a name, or a part or multiple of one, such as height/2 or height*8")
    return match[1]


def is_derived(dim: str) -> bool:
    """Return whether a dimension is a part or a multiple of another one."""
    return "/" in dim or "*" in dim


def size_of(dim: int | str, dims: Mapping[str, int]) -> int:
    """Return the size of a dimension for the given `dims`. A fraction is rounded up, as by a convolution of that stride."""
    if isinstance(dim, int):
        return dim
    name = named_in(dim)
    number = int(dim[len(name) + 1 :] or 1)
    return dims[name] * number if "*" in dim else -(-dims[name] // number)


def divisor_of(dim: int | str) -> int:
    """Return 8 for "height/8", and 1 for a dimension that is no part of another one."""
    return int(str(dim).partition("/")[2] or 1)
