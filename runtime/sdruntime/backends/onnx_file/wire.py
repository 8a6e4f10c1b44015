"""The parts of protobuf's wire format that ONNX files use: https://protobuf.dev/programming-guides/encoding/."""

from __future__ import annotations

import struct
from collections.abc import Iterator


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield each (field number, value) of a protobuf message: an int for varints, else the bytes.

    Raises ValueError if the message is damaged.
    """
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
    """Return the numbers of a packed field."""
    values, at = [], 0
    while at < len(packed):
        value, at = varint(packed, at)
        values.append(value)
    return values


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that starts at byte `at`, and the position after it. Raises ValueError."""
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
    """Encode a varint field."""
    return _packed(field << 3) + _packed(value & (1 << 64) - 1)


def delimited(field: int, value: bytes | memoryview) -> bytes:
    """Encode a length-delimited field: bytes, a string or a message."""
    return b"".join((_packed(field << 3 | 2), _packed(len(value)), value))


def float32(field: int, value: float) -> bytes:
    """Encode a 4-byte float field."""
    return _packed(field << 3 | 5) + struct.pack("<f", value)


def _packed(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
