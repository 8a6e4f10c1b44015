"""What the engines of one pipeline share on a device: its context, one stream, and one arena for activations.

Components run one after the other, so the arena is as large as the largest of them asks for, not as their sum.
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
    """Activation memory on a device; it grows and never shrinks. `moves` counts how often it has changed its place."""

    cuda: Cuda
    stream: Stream
    buffer: Buffer | None = None
    moves: int = 0

    def reserve(self, size: int) -> Buffer:
        """The arena, at least `size` bytes. Growing waits for the work that still uses the previous one. Raises OutOfSpace."""
        if self.buffer is None or self.buffer.size < size:
            self.close()
            self.buffer = self.cuda.allocate(size, "the activations of an engine")
            self.moves += 1
        return self.buffer

    def close(self) -> None:
        buffer, self.buffer = self.buffer, None
        if buffer is not None:
            with contextlib.closing(buffer):  # also where Ctrl-C comes meanwhile
                self.stream.settle()


@dataclass(slots=True, eq=False)
class Staging:
    """Host memory that arrays lie in on their way to the device; it grows and never shrinks."""

    cuda: Cuda
    stream: Stream
    pinned: Pinned | None = None

    def upload(self, pointer: int, array: Array) -> None:
        """Copy uint8 [..] to device memory at `pointer`, in the stream's order, and wait for the stream. Raises OutOfSpace."""
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
    cuda: Cuda
    stream: Stream
    arena: Arena = field(init=False)
    staging: Staging = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arena", Arena(self.cuda, self.stream))
        object.__setattr__(self, "staging", Staging(self.cuda, self.stream))


@contextlib.contextmanager
def session(options: EngineOptions) -> Iterator[Session]:
    """The device of `options`, with a stream of its own or the caller's. Raises DeviceMissing."""
    with Cuda.open(options.device) as cuda:
        stream = Stream(cuda, options.stream, owned=False) if options.stream else cuda.stream()
        with stream:
            made = Session(cuda, stream)
            try:
                yield made
            finally:
                stream.settle()
                made.arena.close()
                made.staging.close()


def aligned(size: int) -> int:
    """`size` rounded up to what every address on a device is a multiple of."""
    return -(-size // ALIGNMENT) * ALIGNMENT
