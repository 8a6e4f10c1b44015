"""Hostile inputs for the readers of a checkpoint: documents and bytes that were changed at random, the same for a seed."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 255, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**9, 10**23, 10**400,
    0.0, -0.0, 0.5, 1.5, 1e-320, 1e23, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "x", "0", "-1", "1e9", "\x00", "\ud800", "é" * 50, "a b", "../x", "/dev/zero", "fp16", "x" * 5000,
    [], {}, [[]], [0], [1, 2], [1, 2, 3, 4], ["x"], [None], [1.5], [10**30], {"x": 1}, {"content": "x"}, {"": {}},
)  # fmt: skip


def changed(rng: random.Random, document: Any) -> Any:
    """A copy of a JSON document with one to four nodes replaced, removed, moved or repeated."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        owners = [node for node in _nodes(document) if isinstance(node, (dict, list)) and node]
        if not owners:
            return rng.choice(VALUES)
        owner = rng.choice(owners)
        key = rng.choice(list(owner)) if isinstance(owner, dict) else rng.randrange(len(owner))
        kind = rng.random()
        if kind < 0.55:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.7:
            del owner[key]
        elif kind < 0.8:
            owner[key] = copy.deepcopy(rng.choice(list(_nodes(document))))
        elif kind < 0.9 and isinstance(owner, dict):
            owner[str(rng.choice(VALUES))[:100]] = owner[key]
        elif isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
    return document


def _nodes(document: Any) -> Iterator[Any]:
    yield document
    for node in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from _nodes(node)


def encoded(rng: random.Random, document: Any) -> bytes:
    """A document as bytes of JSON; now and then cut, with a twin key, nested deeply, or with bytes that are no text."""
    data = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return changed_bytes(rng, data) if rng.random() < 0.15 else data


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) + 1)
        kind = rng.random()
        if kind < 0.3:
            data = data[:place]
        elif kind < 0.6 and data:
            place = min(place, len(data) - 1)
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind < 0.8:
            end = min(len(data), place + rng.randrange(64))
            data = data[:end] + data[place:end] + data[end:]
        else:
            data = (
                data[:place] + rng.choice((b"{", b"[" * 3000, b'"', b",", b"\xff", b"\x00", b"1" * 5000, b"NaN")) + data[place:]
            )
    return data


def changed_pickle(rng: random.Random, data: bytes, call: bytes) -> bytes:
    """A pickle with some bytes, operations or numbers changed, repeated or moved, and now and then a `call` of its own."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, kind = rng.randrange(2, len(data)), rng.random()
        if kind < 0.4:
            data = (
                data[:place] + bytes([rng.choice(_OPERATIONS) if rng.random() < 0.5 else rng.randrange(256)]) + data[place + 1 :]
            )
        elif kind < 0.6:
            data = data[:place] + bytes(rng.choices(_OPERATIONS, k=rng.randint(1, 4))) + data[place:]
        elif kind < 0.75:
            end = min(len(data), place + rng.randrange(1, 40))
            data = data[:place] + (data[place:end] * rng.choice((0, 2, 2, 50))) + data[end:]
        elif kind < 0.9:
            data = data[:place] + call + rng.choice((b")R", b"N\x85R", b"0", b"}\x81", b"]b")) + data[place:]
        else:
            data = (
                data[:place]
                + rng.choice((b"J\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"\x8a\xff" + b"\xff" * 255))
                + data[place:]
            )
    return data


_OPERATIONS = b".NKMJGUTXCB])}teasubqrhjcRQ(0120\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8d\x8f\x90\x91\x92\x93\x94\x95\x96"


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)
