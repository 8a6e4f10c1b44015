"""Streams, events and graphs of the fake GPUs. A stream is a queue, and its work runs as late as the rules of CUDA allow:
when somebody synchronises, or queries often enough. So a missing synchronisation is seen as poison, every time.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from trt.memory import Memory, Region
from trt.strict import Strictness

INVALID_VALUE, OUT_OF_MEMORY, INVALID_HANDLE, NOT_READY = 1, 2, 400, 600
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURED_EVENT = 900, 901, 907
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2  # capture modes
_PATIENCE = 2  # how often a query says "not ready" at least


class CudaError(Exception):
    """An error code that the C function returns."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(kw_only=True)
class Work:
    """Something that a stream does: `run` touches no memory but what `reads` and `writes` name. `check` is run before each run
    and before each launch of a graph that holds it."""

    label: str
    run: Callable[[], None]
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    check: Callable[[], None] | None = None
    pageable: bool = False
    owner: Callable[[], object] | None = None  # a weak reference to what must live until this ran
    marker: Marker | None = None  # what to reach: its own, when it is a record, or another stream's, when it is a wait
    seen: dict[Region, bytes] = field(default_factory=dict)  # pinned memory that is read, as it was when this was queued

    def touches(self, other: Iterable[Region]) -> bool:
        return any(mine.overlaps(its) for mine in self.reads + self.writes for its in other)


@dataclass(eq=False)
class Marker:
    """One record of an event: it is reached when its stream has run so far."""

    stream: Stream
    reached: bool = False
    time: float = 0.0
    patience: int = _PATIENCE


@dataclass(eq=False)
class Event:
    timing: bool
    marker: Marker | None = None
    captured: bool = False


@dataclass(eq=False)
class Capture:
    mode: int
    thread: int
    nodes: list[Work] = field(default_factory=list)
    broken: bool = False


@dataclass(eq=False)
class Stream:
    handle: int
    device: int
    queue: deque[Work] = field(default_factory=deque)
    capture: Capture | None = None


@dataclass(eq=False)
class Graph:
    nodes: list[Work]


class Gpus:
    """The fake GPUs of a machine: memory, streams, events, graphs, and counts of what was done.

    `fake_driver.Driver` is their C interface; the fake TensorRT calls `enqueue` and `memory` itself.
    """

    def __init__(
        self,
        *,
        devices: int = 1,
        total: int = 8 << 30,
        capability: tuple[int, int] = (8, 6),
        name: str = "Fake RTX 3060",
        integrated: bool = False,
        driver_version: int = 12080,
    ) -> None:
        self.devices, self.capability, self.name, self.integrated = devices, capability, name, integrated
        self.driver_version = driver_version
        self.memory = Memory(devices, total, integrated=integrated)
        self.handles: dict[int, Stream | Event | Graph] = {}
        self.counts: Counter[str] = Counter()  # calls of each C function; "launches", "bytes in", "bytes out", ...
        self.broken = 0  # the error that every call returns, since one failed that leaves a context unusable
        self.lock = threading.RLock()
        self._current = threading.local()
        self._next_handle = 0x0500_0000_0000

    # -- devices and handles

    @property
    def device(self) -> int:
        """The calling thread's."""
        return getattr(self._current, "device", 0)

    @device.setter
    def device(self, index: int) -> None:
        self._current.device = index

    def new_handle(self, thing: Stream | Event | Graph | None = None) -> int:
        self._next_handle += 0x100
        handle = self._next_handle
        self.handles[handle] = Stream(handle, self.device) if thing is None else thing
        return handle

    def stream(self, handle: int) -> Stream:
        if handle in (0, 1, 2):
            raise Strictness(f"stream {handle} is a default stream, which waits for all others: make one")
        found = self.handles.get(handle)
        if not isinstance(found, Stream):
            raise Strictness(f"{handle:#x} is no stream, or was destroyed")
        return found

    # -- queueing

    def enqueue(self, handle: int, work: Work) -> None:
        """Put work on a stream, or into the graph that the stream is being captured to."""
        with self.lock:
            stream = self.stream(handle)
            if stream.device != self.device:
                raise Strictness(f"{work.label}: a stream of device {stream.device} while device {self.device} is current")
            if stream.capture is not None:
                if work.pageable:
                    stream.capture.broken = True
                    raise CudaError(CAPTURE_UNSUPPORTED)
                self._check(work)
                stream.capture.nodes.append(work)
            elif not self.broken:
                self._queue(stream, work)

    def launch(self, graph: Graph, handle: int) -> None:
        """Queue every node of a graph, with the addresses it was captured with."""
        with self.lock:
            for node in graph.nodes:
                self._queue(self.stream(handle), replace(node, seen={}))

    def _queue(self, stream: Stream, work: Work) -> None:
        self._check(work)
        self._races(stream, work)
        pending = [region for item in self.queued() for region in item.reads]
        written = [region for item in self.queued() for region in item.writes]
        for region in work.reads:  # what the host may not touch until this ran, unless queued work writes it first
            if not self.memory.on_device(region.address) and not any(region.overlaps(one) for one in written):
                work.seen[region] = self.memory.view(region, work.label).tobytes()
        for region in work.writes:  # the host sees no older result
            if not self.memory.on_device(region.address) and not any(region.overlaps(one) for one in pending):
                self.memory.view(region, work.label)[:] = 0xFF
        stream.queue.append(work)

    def _check(self, work: Work) -> None:
        for region in work.reads + work.writes:
            self.memory.allocation(region, work.label)
        if work.owner is not None and work.owner() is None:
            raise Strictness(f"{work.label}: what queued or captured it was deleted")
        if work.check is not None:
            work.check()

    def _races(self, stream: Stream, work: Work) -> None:
        """Refuse work that touches what unfinished work of another stream touches, unless it waits for that by an event."""
        awaited = [item.marker for item in stream.queue if item.marker is not None and item.marker.stream is not stream]
        for other in self._streams():
            if other is stream:
                continue
            unordered = list(other.queue)
            for position, item in enumerate(other.queue):
                if item.marker in awaited and item.marker is not None and item.marker.stream is other:
                    unordered = list(other.queue)[position:]
            for item in unordered:
                if work.touches(item.writes) or item.touches(work.writes):
                    raise Strictness(f"race: {work.label} and {item.label}, queued on another stream, touch the same memory")

    def queued(self) -> list[Work]:
        return [item for stream in self._streams() for item in stream.queue]

    def _streams(self) -> list[Stream]:
        return [thing for thing in self.handles.values() if isinstance(thing, Stream)]

    # -- running

    def step(self, stream: Stream) -> None:
        """Run the oldest work of a stream, if there is any."""
        if not stream.queue:
            return
        work = stream.queue[0]
        if work.marker is not None and work.marker.stream is not stream:
            self.drain(work.marker.stream, work.marker)
        self._check(work)
        for region, before in work.seen.items():
            if self.memory.view(region, work.label).tobytes() != before:
                raise Strictness(f"{work.label}: the host wrote to what it reads, before it was synchronised")
        stream.queue.popleft()
        self.counts["milliseconds"] += 1
        work.run()
        if work.marker is not None and work.marker.stream is stream:
            work.marker.reached, work.marker.time = True, float(self.counts["milliseconds"])

    def drain(self, stream: Stream, until: Marker | None = None) -> None:
        with self.lock:
            while stream.queue and not (until is not None and until.reached):
                self.step(stream)

    def record(self, event: Event, stream: Stream) -> None:
        if stream.capture is not None:
            event.captured = True
            return
        event.captured, event.marker = False, Marker(stream)
        self._queue(stream, Work(label="record", run=lambda: None, marker=event.marker))

    def wait(self, stream: Stream, event: Event) -> None:
        if event.captured or stream.capture is not None:
            raise Strictness("waiting across streams during a capture is not modelled")
        if event.marker is not None and not event.marker.reached and event.marker.stream is not stream:
            self._queue(stream, Work(label="wait", run=lambda: None, marker=event.marker))

    def poll(self, event: Event) -> bool:
        """Whether an event is reached. Each question lets a little of its stream run."""
        marker = event.marker
        if marker is None:
            return True
        if marker.patience > 0 or not marker.reached:
            marker.patience -= 1
            self.step(marker.stream)
            return False
        return True

    def pending(self, region: Region) -> str | None:
        """The label of queued work that touches a region."""
        return next((item.label for item in self.queued() if item.touches([region])), None)

    def break_down(self, code: int) -> None:
        """From now on nothing runs, and what is queued is lost."""
        self.broken = code
        for stream in self._streams():
            stream.queue.clear()

    # -- capture

    def unsafe(self, stream: Stream | None = None) -> None:
        """Refuse, as CUDA does, an allocation or a synchronisation while something is captured; the capture is lost."""
        for other in self._streams():
            if (capture := other.capture) is None:
                continue
            forbidden = capture.mode == GLOBAL or (capture.mode == THREAD_LOCAL and capture.thread == threading.get_ident())
            if forbidden or other is stream:
                capture.broken = True
                raise CudaError(CAPTURE_UNSUPPORTED)

    def leaks(self) -> list[str]:
        """What was made and not freed."""
        things = [f"{type(thing).__name__.lower()} {handle:#x}" for handle, thing in self.handles.items()]
        return [str(allocation) for allocation in self.memory.live()] + things
