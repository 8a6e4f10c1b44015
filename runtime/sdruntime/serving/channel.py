"""Messages with blobs over a Unix socket: what a host process and the service's worker speak. Its twin is `runtime/capi/src`.

A frame, little-endian: u32 length of the JSON, u32 flags, u64 length of the blob, the JSON in UTF-8, then the blob. With flag 1
the blob lies in a memfd instead, which comes with the frame's first byte (SCM_RIGHTS): both processes see the same memory.
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
_CLOSED_IN_CHILDREN = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # of Linux
SHARED_FROM = 64 << 10  # bytes: what is smaller travels within the frame
LARGEST_MESSAGE = 64 << 20  # bytes of JSON. Keep equal to LARGEST_JSON in socket.hpp
LARGEST_BLOB = 1 << 30  # bytes that are kept: above the largest start image
_PIECE = 1 << 16


class Received(NamedTuple):
    """A message, its blob (None if it has none or it was skipped), and the blob's size in bytes."""

    message: bytes
    blob: memoryview | None
    size: int


class BadFrame(SdruntimeError):
    """The other end sent what is no frame: nothing that follows can be read."""


def _any(message: bytes) -> int:
    return LARGEST_BLOB


class Channel:
    """One end. `send` may be called from any thread, `receive` from one at a time. It owns the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._sending = end, threading.Lock()

    def send(self, message: bytes, blob: bytes | memoryview | None = None) -> None:
        """Returns once the frame is on its way; waits where the other end does not read. Raises OSError where that is gone."""
        data = memoryview(b"" if blob is None else blob).cast("B")
        shared = len(data) >= SHARED_FROM and hasattr(os, "memfd_create")
        header = HEADER.pack(len(message), SHARED if shared else 0, len(data))
        if not shared:
            with self._sending:
                self._socket.sendall(b"".join((header, message, data)))
            return
        place = _memory_of(data)
        try:
            with self._sending:
                sent = socket.send_fds(self._socket, [header, message], [place])
                self._socket.sendall((header + message)[sent:])
        finally:
            os.close(place)

    def receive(self, expected: Callable[[bytes], int] = _any) -> Received | None:
        """The next message, or None where the other end is gone.

        `expected` says of a message how many bytes its blob may have: a larger one is skipped, not kept. Raises BadFrame.
        """
        try:
            return self._receive(expected)
        except ConnectionResetError:  # it went with messages of ours unread
            return None

    def _receive(self, expected: Callable[[bytes], int]) -> Received | None:
        header = b""
        with contextlib.ExitStack() as stack:
            places: list[int] = []
            while len(header) < HEADER.size:
                part, found, _, _ = socket.recv_fds(self._socket, HEADER.size - len(header), 1, _CLOSED_IN_CHILDREN)
                for place in found:
                    stack.callback(os.close, place)
                places += found
                if not part:
                    return None
                header += part
            length, flags, size = HEADER.unpack(header)
            if length > LARGEST_MESSAGE or flags not in (0, SHARED) or len(places) != flags:
                raise BadFrame(f"no frame: {length:,} bytes of JSON, flags {flags}, {len(places)} descriptors")
            read = self._read(length)
            if read is None:
                return None
            message = bytes(read)
            kept = size <= min(expected(message), LARGEST_BLOB)
            if flags & SHARED:
                blob = _mapped(places[0], size) if kept else None
            else:
                blob = self._read(size) if kept and size else None
                if size and blob is None and (kept or not self._skip(size)):
                    return None
        return Received(message, blob, size)

    def _skip(self, size: int) -> bool:
        """Read past `size` bytes; False where the other end is gone first."""
        piece = bytearray(_PIECE)
        while size:
            count = self._socket.recv_into(piece, min(size, _PIECE))
            if not count:
                return False
            size -= count
        return True

    def _read(self, size: int) -> memoryview | None:
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


def _mapped(place: int, size: int) -> memoryview:
    held = os.fstat(place).st_size
    if not 0 < size <= held:
        raise BadFrame(f"no frame: a blob of {size:,} bytes in a file of {held:,}")
    return memoryview(mmap.mmap(place, size, prot=mmap.PROT_READ))


def _memory_of(data: memoryview) -> int:
    """A memfd that holds `data` and cannot be cut: who maps it need not fear a bus error."""
    import fcntl

    place = os.memfd_create("sdruntime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        while done < len(data):
            done += os.write(place, data[done:])
        fcntl.fcntl(place, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(place)
        raise
    return place
