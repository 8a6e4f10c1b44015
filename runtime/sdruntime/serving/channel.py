"""Messages with blobs over a Unix socket, between a host process and the service's worker. The host's side is `runtime/capi/src`.

A frame, little-endian: u32 length of the JSON, u32 flags, u64 length of the blob, the JSON in UTF-8, then the blob. With flag 1
the blob is in a memfd instead, which is sent with the frame's first byte (SCM_RIGHTS): both processes share its memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from sdruntime.errors import SdruntimeError

HEADER = struct.Struct("<IIQ")
SHARED = 1  # flag: the blob is a memfd
_CLOSED_IN_CHILDREN = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # on Linux
SHARED_FROM = 64 << 10  # bytes: smaller blobs are sent in the frame
LARGEST_MESSAGE = 64 << 20  # bytes of JSON. Keep equal to LARGEST_JSON in socket.hpp
LARGEST_BLOB = 1 << 30  # bytes of a blob that is kept: more than the largest start image
_PIECE = 1 << 16


class Received(NamedTuple):
    """A message, its blob (None if it has none or it was skipped), and the blob's size in bytes."""

    message: bytes
    blob: memoryview | None
    size: int


class BadFrame(SdruntimeError):
    """The other end sent something that is not a frame. Nothing after it can be read."""


def _any(message: bytes) -> int:
    return LARGEST_BLOB


class Channel:
    """One end of the connection, which owns its socket. `send` may be called from any thread, `receive` from one at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._sending = end, threading.Lock()

    def send(self, message: bytes, blob: bytes | memoryview | None = None) -> None:
        """Send a frame. Waits while the other end does not read. Raises OSError if the other end is closed."""
        data = memoryview(b"" if blob is None else blob).cast("B")
        shared = len(data) >= SHARED_FROM and hasattr(os, "memfd_create")
        header = HEADER.pack(len(message), SHARED if shared else 0, len(data))
        if not shared:
            with self._sending:
                self._socket.sendall(b"".join((header, message, data)))
            return
        descriptor = _memfd_of(data)
        try:
            with self._sending:
                sent = socket.send_fds(self._socket, [header, message], [descriptor])
                self._socket.sendall((header + message)[sent:])
        finally:
            os.close(descriptor)

    def receive(self, expected: Callable[[bytes], int] = _any) -> Received | None:
        """Return the next message, or None if the other end is closed.

        `expected` returns how many bytes the blob of a message may have: a larger blob is skipped. Raises BadFrame.
        """
        try:
            return self._receive(expected)
        except ConnectionResetError:  # it closed without reading all of our messages
            return None

    def _receive(self, expected: Callable[[bytes], int]) -> Received | None:
        header = b""
        with contextlib.ExitStack() as stack:
            descriptors: list[int] = []
            while len(header) < HEADER.size:
                part, passed, _, _ = socket.recv_fds(self._socket, HEADER.size - len(header), 1, _CLOSED_IN_CHILDREN)
                for descriptor in passed:
                    stack.callback(os.close, descriptor)
                descriptors += passed
                if not part:
                    return None
                header += part
            length, flags, size = HEADER.unpack(header)
            if length > LARGEST_MESSAGE or flags not in (0, SHARED) or len(descriptors) != flags:
                raise BadFrame(f"not a frame: {length:,} bytes of JSON, flags {flags}, {len(descriptors)} descriptors")
            read = self._read(length)
            if read is None:
                return None
            message = bytes(read)
            kept = size <= min(expected(message), LARGEST_BLOB)
            if flags & SHARED:
                blob = _mapped(descriptors[0], size) if kept else None
            else:
                blob = self._read(size) if kept and size else None
                if size and blob is None and (kept or not self._skip(size)):
                    return None
        return Received(message, blob, size)

    def _skip(self, size: int) -> bool:
        """Read and discard `size` bytes. Return False if the other end closes first."""
        piece = bytearray(_PIECE)
        while size:
            count = self._socket.recv_into(piece, min(size, _PIECE))
            if not count:
                return False
            size -= count
        return True

    def _read(self, size: int) -> memoryview | None:
        """Return the next `size` bytes, or None if the other end closes first."""
        data = memoryview(bytearray(size))
        done = 0
        while done < size:
            count = self._socket.recv_into(data[done:])
            if not count:
                return None
            done += count
        return data

    def close(self) -> None:
        self._socket.close()


def _mapped(descriptor: int, size: int) -> memoryview:
    """Return the first `size` bytes of a file, mapped. Raises BadFrame if it is shorter."""
    length = os.fstat(descriptor).st_size
    if not 0 < size <= length:
        raise BadFrame(f"not a frame: a blob of {size:,} bytes in a file of {length:,}")
    return memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))


def _memfd_of(data: memoryview) -> int:
    """Return a memfd with `data`. It is sealed against truncation, so that mapping it cannot cause a bus error."""
    import fcntl

    descriptor = os.memfd_create("sdruntime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        while done < len(data):
            done += os.write(descriptor, data[done:])
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
