"""The memory of the fake GPUs. What nobody wrote is poison: every byte 0xFF, which is NaN in each floating-point type.

A device address is a number that only the fake can follow; it is never given out twice, so a use after free is always caught.
Pinned host memory is real, since the code under test writes and reads it; it stays mapped, and poisoned, after it was freed.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trt.strict import Strictness

POISON = 0xFF
ALIGNMENT = 256  # of cuMemAlloc
DEVICE_MEMORY, PINNED = "cuMemAlloc", "pinned"  # the labels of what the driver allocates
_PAGE = 4096
_DEVICE_SPACE = 0x0200_0000_0000  # beyond 32 bits, so that a truncated pointer is no pointer
_SPACE = 1 << 38  # of one device


class Region(NamedTuple):
    """`size` bytes from `address` on."""

    address: int
    size: int

    def overlaps(self, other: Region) -> bool:
        return self.address < other.address + other.size and other.address < self.address + self.size


@dataclass(eq=False)
class Allocation:
    """A live or freed piece of memory. `device` is None for pinned host memory."""

    address: int
    size: int
    device: int | None
    label: str
    data: NDArray[np.uint8]
    mapped: bool = False
    live: bool = True
    keep: Any = field(default=None, repr=False)  # the buffer of pinned memory

    def __str__(self) -> str:
        where = "pinned host" if self.device is None else f"device {self.device}"
        return f"{self.label}: {self.size} bytes of {where} memory at {self.address:#x}"


class Memory:
    """All allocations, live and freed. `total` is what each device has, `taken` what other processes have of it."""

    def __init__(self, devices: int, total: int, *, integrated: bool = False) -> None:
        self.total, self.integrated = total, integrated
        self.taken = [0] * devices
        self._next = [_DEVICE_SPACE + index * _SPACE for index in range(devices)]
        self._live: dict[int, Allocation] = {}
        self._addresses: list[int] = []  # sorted, and beside it
        self._allocations: list[Allocation] = []

    def free_bytes(self, device: int) -> int:
        used = sum(a.size for a in self.live() if a.device == device or (a.device is None and self.integrated))
        return self.total - self.taken[device] - used

    def allocate(self, size: int, device: int, label: str) -> Allocation | None:
        """Poisoned device memory, or None where it does not fit."""
        if size > self.free_bytes(device):
            return None
        address = self._next[device]
        self._next[device] += -(-size // ALIGNMENT) * ALIGNMENT + _PAGE  # a gap, for what is written beyond the end
        return self._add(Allocation(address, size, device, label, np.full(size, POISON, np.uint8)))

    def pin(self, size: int, *, mapped: bool) -> Allocation:
        """Poisoned host memory that an asynchronous copy may use."""
        keep = ctypes.create_string_buffer(size + _PAGE)
        address = -(-ctypes.addressof(keep) // _PAGE) * _PAGE
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        data[:] = POISON
        return self._add(Allocation(address, size, None, PINNED, data, mapped=mapped, keep=keep))

    def release(self, allocation: Allocation) -> None:
        if not allocation.live:
            raise Strictness(f"freed twice: {allocation}")
        allocation.live = False
        del self._live[allocation.address]
        if allocation.device is None:
            allocation.data[:] = POISON
        else:
            allocation.data = allocation.data[:0].copy()  # nobody can look at it any more

    def live(self) -> Iterator[Allocation]:
        return iter(list(self._live.values()))

    def at(self, address: int) -> Allocation | None:
        """The allocation that `address` lies in, live or freed."""
        k = bisect.bisect_right(self._addresses, address) - 1
        if k < 0 or address >= self._addresses[k] + max(self._allocations[k].size, 1):
            return None
        return self._allocations[k]

    def on_device(self, address: int) -> bool:
        return address >= _DEVICE_SPACE and address < _DEVICE_SPACE + len(self._next) * _SPACE

    def view(self, region: Region, what: str) -> NDArray[np.uint8]:
        """The bytes of a region. Raises Strictness where it is not inside one live allocation."""
        return self.allocation(region, what).data[self._offset(region) :][: region.size]

    def allocation(self, region: Region, what: str) -> Allocation:
        found = self.at(region.address)
        if found is None:
            raise Strictness(f"{what}: {region.address:#x} lies in no allocation")
        if not found.live:
            raise Strictness(f"{what}: use after free of {found}")
        if region.size > found.size - self._offset(region):
            raise Strictness(f"{what}: {region.size} bytes at {region.address:#x} end beyond {found}")
        return found

    def _offset(self, region: Region) -> int:
        found = self.at(region.address)
        assert found is not None
        return region.address - found.address

    def _add(self, allocation: Allocation) -> Allocation:
        k = bisect.bisect_right(self._addresses, allocation.address)
        self._addresses.insert(k, allocation.address)
        self._allocations.insert(k, allocation)
        self._live[allocation.address] = allocation
        return allocation
