from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from descriptors import open_files

from sdruntime.serving.channel import HEADER, SHARED, SHARED_FROM, Channel

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = map(Channel, socket.socketpair())
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("size", [0, 1, SHARED_FROM - 1, SHARED_FROM, SHARED_FROM + 1, 5_000_001])
def test_what_is_sent_arrives(ends: Ends, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    before = open_files()
    for blob in (data, memoryview(data)):
        sender = threading.Thread(target=lambda blob=blob: [ends[0].send(b'{"n":%d}' % k, blob) for k in range(3)])  # type: ignore[misc]
        sender.start()
        for k in range(3):
            received = ends[1].receive()
            assert received is not None
            assert received[0] == b'{"n":%d}' % k
            assert bytes(received[1] or b"") == data
        sender.join()
    del received
    assert open_files() == before


def test_a_frame_is_what_is_written_down() -> None:
    """The C library reads and writes these bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(ours).send(b"{}", b"abc")
        assert theirs.recv(100) == bytes([2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]) + b"{}abc"
        Channel(ours).send(b"{}", bytes(SHARED_FROM))
        data, places, _, _ = socket.recv_fds(theirs, 100, 4)
        assert data == HEADER.pack(2, SHARED, SHARED_FROM) + b"{}"
        assert len(places) == 1
        with os.fdopen(places[0], "r+b") as file:
            assert os.fstat(file.fileno()).st_size == SHARED_FROM
            with pytest.raises(PermissionError):  # who maps it is safe from a bus error
                os.ftruncate(file.fileno(), 0)
            with mmap.mmap(file.fileno(), SHARED_FROM, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == bytes(SHARED_FROM)


@pytest.mark.parametrize("part", [b"", HEADER.pack(2, 0, 3)[:7], HEADER.pack(2, 0, 3) + b"{", HEADER.pack(2, 0, 3) + b"{}ab"])
def test_an_end_in_the_middle_of_a_frame_is_an_end(part: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(part)
        theirs.close()
        assert Channel(ours).receive() is None


def test_threads_do_not_cut_each_other_s_frames(ends: Ends) -> None:
    def send(number: int) -> None:
        for k in range(30):
            ends[0].send(b"%d %d" % (number, k), bytes([number]) * (100_000 if k % 3 == 0 else 1000 * number))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(1, 5)]
    for each in threads:
        each.start()
    found: dict[int, list[int]] = {}
    for _ in range(120):
        received = ends[1].receive()
        assert received is not None
        number, k = map(int, received[0].split())
        assert set(received[1] or b"") == {number}
        found.setdefault(number, []).append(k)
    assert found == {number: list(range(30)) for number in range(1, 5)}
    for each in threads:
        each.join()


def test_the_other_end_being_gone_is_an_error_of_the_system(ends: Ends) -> None:
    ends[1].close()
    before = open_files()
    for size in (10, SHARED_FROM):
        with pytest.raises(BrokenPipeError):
            ends[0].send(b"{}", bytes(size))
    assert open_files() == before


def test_an_end_that_goes_with_messages_unread_is_an_end(ends: Ends) -> None:
    ends[0].send(b"{}")
    ends[1].close()  # the kernel answers the next read with ECONNRESET
    assert ends[0].receive() is None
