"""A captured step of the sampling loop on a GPU: the UNet's and the sampler step's bindings, buffers and CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import closed
from sdruntime.backends.base.session import aligned
from sdruntime.backends.trt.binding import Binding
from sdruntime.backends.trt.engine import TrtEngine
from sdruntime.bundle.interface import CONTROL_SCALES
from sdruntime.bundle.sampler_step import SLOTS, SOURCES, TARGETS
from sdruntime.system.cuda import Graph, Pinned

FLOAT = 4  # bytes
KEPT_FRAMES = 4


class Frame:
    """Bindings, buffers and the graphs for `capacity` jobs of one latent shape; the UNet's engine keeps it between calls.

    It is `busy` while it holds the latents of jobs. `cells`: number of values in one image's latents. `controlnet` runs before
    the UNet in the steps that are `controlled`: it reads the UNet's inputs, and its outputs are inputs of the UNet.
    """

    def __init__(
        self,
        unet: TrtEngine,
        step: TrtEngine,
        controlnet: TrtEngine | None,
        dims: dict[str, int],
        *,
        capacity: int,
        guided: bool,
        cells: int,
    ) -> None:
        self.capacity, self.guided, self.cells, self.rows = capacity, guided, cells, dims["batch"]
        self.session, self.busy, self._spec, self._closed = unet.session, False, unet.spec, False
        self.component, self.dims = unet.component, dims
        self._ran: set[bool] = set()  # steps that have run, with and without the ControlNet
        self._graphs: dict[bool, tuple[int, Graph]] = {}  # the arena's moves, and the step as a graph
        self._whole: tuple[Hashable, Graph] | None = None  # all steps as one graph
        self._program: Pinned | None = None
        self._program_room, self._stack = contextlib.ExitStack(), contextlib.ExitStack()
        with self._stack as stack:  # releases what was created if a later step fails
            self.unet = stack.enter_context(unet.bind_apart(dims))
            self.step = stack.enter_context(step.bind_apart({"jobs": capacity, "cells": cells}))
            self._place(stack, controlnet)
            stack.callback(self._drop_program)
            stack.callback(self._drop_graphs)
            stack.callback(self.session.stream.settle)
            self._stack = stack.pop_all()

    def _place(self, stack: contextlib.ExitStack, controlnet: TrtEngine | None) -> None:
        """Set the addresses so that each engine reads its inputs where the other writes them."""
        capacity, guided, cells = self.capacity, self.guided, self.cells
        latents = capacity * cells * FLOAT  # bytes
        output, sample = self.unet.address["out_sample"], self.unet.address["sample"]
        self.step.place("uncond", output)
        self.step.place("cond", output + (latents if guided else 0))
        self.step.place("sample", sample)
        if guided:
            self.step.place("sample_again", sample + latents)
        self.residuals = () if controlnet is None else tuple(tensor.name for tensor in controlnet.component.outputs)
        sizes = [self.rows * FLOAT, capacity * TARGETS * SOURCES * FLOAT, latents]
        sizes += [self.rows * len(self.residuals) * FLOAT] if controlnet is not None else []
        *self.offsets, self.block = itertools.accumulate(
            map(aligned, sizes), initial=0
        )  # of the inputs that change between steps
        self._inputs = self.session.cuda.allocate(self.block, "the inputs of a step")
        stack.callback(self._inputs.close)
        self.unet.place("timestep", self._inputs.pointer)
        self.step.place("weights", self._inputs.pointer + self.offsets[1])
        self.step.place("noise", self._inputs.pointer + self.offsets[2])
        self.controlnet: Binding | None = None
        if controlnet is not None:
            read = [tensor.name for tensor in controlnet.component.inputs if tensor.name in self.unet.address]
            placed = {name: self.unet.address[name] for name in (*read, *self.residuals)}
            placed[CONTROL_SCALES] = self._inputs.pointer + self.offsets[3]
            self.controlnet = stack.enter_context(controlnet.bind_apart(self.dims, placed))
        self.state = self.session.cuda.pinned((capacity, SLOTS, cells), np.float32)
        stack.callback(self.state.close)

    def check_open(self) -> None:
        """Raise the error of a closed engine if the UNet's engine was closed: its memory may have been reused since."""
        if self._closed:
            raise closed(self._spec)

    def load(self, program: Array) -> None:
        """Upload the blocks of all steps, uint8 [steps, block], to the device. The stream must be idle."""
        if self._program is None or self._program.array.size < program.size:
            self._drop_program()
            with contextlib.ExitStack() as room:
                self._steps = self.session.cuda.allocate(program.size, "the steps of a loop")
                room.callback(self._steps.close)
                self._program = self.session.cuda.pinned((program.size,), np.uint8)
                room.callback(self._program.close)
                self._program_room = room.pop_all()
        self._program.array[: program.size] = program.reshape(-1)
        self.session.stream.upload(self._steps.pointer, self._program, program.size)

    def run(self, index: int, *, controlled: bool = False) -> None:
        """Queue step `index` of the program."""
        stream, arena = self.session.stream, self.session.arena
        self._feed(index)
        self._ready()
        if controlled not in self._ran:  # the first run of a context does work that cannot be captured
            self._queue(controlled)
            self._ran.add(controlled)
            return
        moves, graph = self._graphs.get(controlled, (-1, None))
        if graph is None or moves != arena.moves:
            self._drop_graph(controlled)
            with stream.capture() as graph:
                self._queue(controlled)
            self._graphs[controlled] = arena.moves, graph
        graph.launch(stream)

    def run_all(self, controlled: Sequence[bool]) -> bool:
        """Queue the whole program as one graph and return True; one bool a step.

        Before the frame's first `run` of a step of each kind, do nothing and return False.
        """
        if not self._ran.issuperset(controlled):
            return False
        self._ready()
        key = (tuple(controlled), self.session.arena.moves)
        if self._whole is None or self._whole[0] != key:
            self._drop_whole()
            with self.session.stream.capture() as graph:
                for index, kind in enumerate(controlled):
                    self._feed(index)
                    self._queue(kind)
            self._whole = (key, graph)
        self._whole[1].launch(self.session.stream)
        return True

    def _feed(self, index: int) -> None:
        self.session.stream.copy(self._inputs.pointer, self._steps.pointer + index * self.block, self.block)

    def _ready(self) -> None:
        bindings = [binding for binding in (self.controlnet, self.unet, self.step) if binding is not None]
        for binding in (*bindings, *bindings):  # again, since a later one may have moved the arena
            binding.ready()

    def _queue(self, controlled: bool) -> None:
        if controlled and self.controlnet is not None:
            self.controlnet.enqueue()
            self.unet.overwritten(self.residuals)
        self.unet.enqueue()
        self.step.enqueue()
        self.session.stream.copy(self.step.address["state"], self.step.address["next_state"], self.step.sizes["state"])

    def upload_state(self) -> None:
        self.session.stream.upload(self.step.address["state"], self.state, self.step.sizes["state"])

    def download_state(self) -> Array:
        """Wait for the stream and return the state, float32 [capacity, SLOTS, cells]."""
        self.session.stream.download(self.state, self.step.address["state"], self.step.sizes["state"])
        self.session.stream.synchronize()
        return self.state.array

    def _drop_graph(self, controlled: bool) -> None:
        _, graph = self._graphs.pop(controlled, (-1, None))
        if graph is not None:
            with contextlib.closing(graph):
                self.session.stream.settle()

    def _drop_graphs(self) -> None:
        for controlled in list(self._graphs):
            self._drop_graph(controlled)

    def _drop_whole(self) -> None:
        whole, self._whole = self._whole, None
        if whole is not None:
            with contextlib.closing(whole[1]):
                self.session.stream.settle()

    def _drop_program(self) -> None:
        self._drop_whole()  # the graph of all steps reads the program
        self._program = None
        self._program_room.close()

    def close(self) -> None:
        self._closed = True
        self._stack.close()


class Frames:
    """A cache of one UNet's frames. Leaving its context releases them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, int], Frame] = {}  # least recently used first

    def get(self, key: Hashable, make: Callable[[], Frame]) -> Frame:
        """Return a cached or new frame for `key` that is not busy. A new one evicts the least recently used one that is idle."""
        number = 0
        while (key, number) in self._kept and self._kept[key, number].busy:
            number += 1
        frame = self._kept.pop((key, number), None)
        if frame is None:
            idle = [name for name, kept in self._kept.items() if not kept.busy]
            if len(self._kept) >= KEPT_FRAMES and idle:
                self._kept.pop(idle[0]).close()
            frame = make()
        self._kept[key, number] = frame  # the most recent
        return frame

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for frame in self._kept.values():
                stack.callback(frame.close)
            self._kept.clear()

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
