"""The device session that the engines of a pipeline share: the CUDA context, one stream, and one arena for activations.

Components run one after another, so the arena has the size of the largest one's activations, not of their sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.system.cuda import ALIGNMENT, Buffer, Cuda, Pinned, Stream


@dataclass(slots=True, eq=False)
class Arena:
    """Activation memory on a device. It grows and never shrinks. `moves` counts how often its address has changed."""

    cuda: Cuda
    stream: Stream
    buffer: Buffer | None = None
    moves: int = 0

    def reserve(self, size: int) -> Buffer:
        """Return a buffer of at least `size` bytes. Growing waits for work that still uses the old one. Raises OutOfSpace."""
        if self.buffer is None or self.buffer.size < size:
            self.close()
            self.buffer = self.cuda.allocate(size, "the activations of an engine")
            self.moves += 1
        return self.buffer

    def close(self) -> None:
        buffer, self.buffer = self.buffer, None
        if buffer is not None:
            with contextlib.closing(buffer):  # even if Ctrl-C interrupts the wait
                self.stream.settle()


@dataclass(slots=True, eq=False)
class Staging:
    """Pinned host memory for uploads to the device. It grows and never shrinks."""

    cuda: Cuda
    stream: Stream
    pinned: Pinned | None = None

    def upload(self, pointer: int, array: Array) -> None:
        """Copy a uint8 array to device memory at `pointer` on the stream, and wait for it. Raises OutOfSpace."""
        if self.pinned is None or self.pinned.array.size < array.size:
            self.close()
            self.pinned = self.cuda.pinned((array.size,), np.uint8)
        self.pinned.array[: array.size] = array.reshape(-1)
        self.stream.upload(pointer, self.pinned, array.size)
        self.stream.synchronize()

    def close(self) -> None:
        pinned, self.pinned = self.pinned, None
        if pinned is not None:
            with contextlib.closing(pinned):
                self.stream.settle()


@dataclass(frozen=True, slots=True)
class Session:
    """A device's context, stream, activation arena and upload buffer."""

    cuda: Cuda
    stream: Stream
    arena: Arena = field(init=False)
    staging: Staging = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arena", Arena(self.cuda, self.stream))
        object.__setattr__(self, "staging", Staging(self.cuda, self.stream))


@contextlib.contextmanager
def session(options: EngineOptions) -> Iterator[Session]:
    """Open a session on the device of `options`, with a new stream or the caller's. Raises DeviceMissing."""
    with Cuda.open(options.device) as cuda:
        stream = Stream(cuda, options.stream, owned=False) if options.stream else cuda.stream()
        with stream:
            opened = Session(cuda, stream)
            try:
                yield opened
            finally:
                stream.settle()
                opened.arena.close()
                opened.staging.close()


def aligned(size: int) -> int:
    """Return `size` rounded up to a multiple of the device's address alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
