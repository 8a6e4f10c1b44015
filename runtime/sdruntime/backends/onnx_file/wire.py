"""Protobuf's wire format, as far as an ONNX file uses it: https://protobuf.dev/programming-guides/encoding/."""

from __future__ import annotations

import struct
from collections.abc import Iterator


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message: an int for numbers, the bytes for everything that has a length."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        if key >> 32:
            raise ValueError(f"not a protobuf message: field {key >> 3} at byte {at}")
        if key & 7 == 0:
            value, at = varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = varint(message, at)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {key & 7} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"cut short: {size} bytes are missing from byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def varints(packed: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = varint(packed, at)
        values.append(value)
    return values


def varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"not a protobuf message: no number at byte {at}")


def number(field: int, value: int) -> bytes:
    """A field that holds an int."""
    return _packed(field << 3) + _packed(value & (1 << 64) - 1)


def delimited(field: int, value: bytes | memoryview) -> bytes:
    """A field that holds bytes: a text or another message."""
    return b"".join((_packed(field << 3 | 2), _packed(len(value)), value))


def float32(field: int, value: float) -> bytes:
    """A field that holds a float of 4 bytes."""
    return _packed(field << 3 | 5) + struct.pack("<f", value)


def _packed(value: int) -> bytes:
    taken = bytearray()
    while value > 127:
        taken.append(value & 127 | 128)
        value >>= 7
    taken.append(value)
    return bytes(taken)
