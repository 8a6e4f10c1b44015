"""Messages with blobs over a Unix socket: what a host process and the service's worker speak. Its twin is `runtime/capi/src`.

A frame, little-endian: u32 length of the JSON, u32 flags, u64 length of the blob, the JSON in UTF-8, then the blob. With flag 1
the blob lies in a memfd instead, which comes with the frame's first byte (SCM_RIGHTS): both processes see the same memory.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading

HEADER = struct.Struct("<IIQ")
SHARED = 1  # flag: the blob is a memfd
_CLOSED_IN_CHILDREN = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # of Linux
SHARED_FROM = 64 << 10  # bytes: what is smaller travels within the frame


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

    def receive(self) -> tuple[bytes, memoryview | None] | None:
        """The next message and its blob, or None where the other end is gone."""
        try:
            return self._receive()
        except ConnectionResetError:  # it went with messages of ours unread
            return None

    def _receive(self) -> tuple[bytes, memoryview | None] | None:
        header, places = b"", []
        while len(header) < HEADER.size:
            part, found, _, _ = socket.recv_fds(self._socket, HEADER.size - len(header), 1, _CLOSED_IN_CHILDREN)
            places += found
            if not part:
                return None
            header += part
        length, flags, size = HEADER.unpack(header)
        message = self._read(length)
        if not flags & SHARED:
            blob = self._read(size) if size else None
        else:
            with os.fdopen(places[0], "rb") as file:
                blob = memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))
        return None if message is None or (size and blob is None) else (bytes(message), blob)

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
