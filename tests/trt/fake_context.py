"""What the strict TensorRT's execution context does: queue its work on a stream of the fake GPU, or say what was forgotten."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

from trt.fake_network import called_back, dims, report
from trt.fake_plan import Shape, Tensor, compute, output_shapes
from trt.memory import ALIGNMENT, POISON, Region
from trt.streams import Work
from trt.strict import Strictness


class ExecutionContext:
    """`strategy` is the name of an ExecutionContextAllocationStrategy; `config` the behaviour of an IRuntimeConfig, or None."""

    def __init__(self, trt: Any, logger: Any, engine: Any, strategy: str, config: Any) -> None:
        self._trt, self._logger, self._engine, self._strategy, self._config = trt, logger, engine, strategy, config
        first_of_one = engine.num_optimization_profiles == 1 and not engine.contexts_made
        self._profile: int | None = 0 if first_of_one else None
        self._switch: tuple[int, list[bool]] | None = None  # the stream of the last profile switch, and whether it ran
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}  # weak references: the real one holds none either
        self._memory: Region | None = None
        self._sized = False  # by update_device_memory_size_for_shapes, for the shapes as they are
        self._ready: Any = None  # the (profile, shapes) of the last run: what a capture needs
        self._release: Any = None
        self.name = ""

    # -- profile and shapes

    @property
    def active_optimization_profile(self) -> int:
        return -1 if self._profile is None else self._profile

    @property
    def engine(self) -> Any:
        return self._trt.make("ICudaEngine", self._engine)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._error(f"profile index {profile_index} is out of range")
        if self._trt.gpus_.stream(stream_handle).capture is not None:
            raise Strictness("the profile is switched during a capture")
        ran: list[bool] = []
        self._trt.gpus_.enqueue(stream_handle, Work(label="profile switch", run=lambda: ran.append(True)))
        self._profile, self._switch = int(profile_index), (int(stream_handle), ran)
        self._shapes, self._ready, self._sized = {}, None, False
        if self._strategy == "ON_PROFILE_CHANGE":
            return self.allocate(self._engine.get_device_memory_size_for_profile_v2(profile_index))
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        inputs = {tensor.name: tensor for tensor in self._engine.plan.inputs}
        sizes = tuple(int(size) for size in shape)
        if name not in inputs:
            return self._error(f"Given invalid tensor name: {name}")
        low, _, high = self._range(name)
        if len(sizes) != len(low) or not all(a <= b <= c for a, b, c in zip(low, sizes, high, strict=True)):
            return self._error(f"Set dimensions {sizes} of {name} are not within profile {self._profile}: {low} to {high}")
        if self._shapes.get(name) != sizes:
            self._shapes[name], self._sized = sizes, False
        return True

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self._engine.plan.inputs if -1 in tensor.dims and tensor.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Any:
        tensor = self._engine.tensor(name)
        if name in [one.name for one in self._engine.plan.inputs]:
            return dims(self._trt, self._shapes.get(name, tensor.dims))
        return dims(self._trt, tensor.dims if self.infer_shapes() else self._outputs()[name])

    def _range(self, name: str) -> tuple[Shape, Shape, Shape]:
        if self._profile is None:
            raise Strictness("no profile is chosen: only the first context of an engine with one profile has it already")
        plan = self._engine.plan
        return plan.profiles[self._profile][name] if plan.profiles else (self._engine.tensor(name).dims,) * 3

    def _inputs(self) -> dict[str, Shape]:
        """The shapes of all inputs. Raises Strictness where one is not set, or they do not agree."""
        if missing := self.infer_shapes():
            raise Strictness(f"no shape is set of {', '.join(missing)}")
        shapes = {tensor.name: self._shapes.get(tensor.name, tensor.dims) for tensor in self._engine.plan.inputs}
        sizes: dict[str, int] = {}
        for tensor in self._engine.plan.inputs:
            for dim, size in zip(tensor.shape, shapes[tensor.name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise Strictness(f"dimension {dim} is {size} in {tensor.name} and {sizes[dim]} elsewhere")
        return shapes

    def _outputs(self) -> dict[str, Shape]:
        shapes = self._inputs()
        plan = self._engine.plan
        sizes: dict[int | str, int] = {}
        for tensor in plan.inputs:
            sizes |= dict(zip(tensor.shape, shapes[tensor.name], strict=True))
        if all(isinstance(dim, int) or dim in sizes for tensor in plan.outputs for dim in tensor.shape):
            return {t.name: tuple(dim if isinstance(dim, int) else sizes[dim] for dim in t.shape) for t in plan.outputs}
        key = tuple((tensor.name, shapes[tensor.name], tensor.numpy.str) for tensor in plan.inputs)
        return output_shapes(self._engine.model, key)

    # -- memory

    def allocate(self, size: int) -> bool:
        """The context's own device memory."""
        memory = self._trt.gpus_.memory
        if self._release is not None:
            self._release()
        allocation = memory.allocate(size, self._engine.device, "context memory")
        if allocation is None:
            return self._error("Error Code 2: OutOfMemory")
        self._memory, self._release = Region(allocation.address, size), weakref.finalize(self, memory.release, allocation)
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        self._sized = True
        return self._needed()

    def _needed(self) -> int:
        engine = self._engine
        if not self._sized:
            return engine.get_device_memory_size_for_profile_v2(self._profile or 0)  # type: ignore[no-any-return]
        return engine.plan.activation(self._inputs()) + engine.weight_streaming_scratch_memory_size  # type: ignore[no-any-return]

    def set_device_memory(self, memory: int, size: int) -> None:
        if self._strategy != "USER_MANAGED":
            raise Strictness("the context has memory of its own: create it with USER_MANAGED")
        if memory % ALIGNMENT:
            raise Strictness(f"device memory at {memory:#x} is not {ALIGNMENT}-byte aligned")
        self._memory = Region(int(memory), int(size))
        self._trt.gpus_.memory.allocation(self._memory, "set_device_memory")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in [tensor.name for tensor in self._engine.plan.inputs + self._engine.plan.outputs]:
            return self._error(f"Given invalid tensor name: {name}")
        if memory % ALIGNMENT:
            raise Strictness(f"{name} at {memory:#x} is not {ALIGNMENT}-byte aligned")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        if name not in [tensor.name for tensor in self._engine.plan.outputs]:
            return self._error(f"Given invalid tensor name: {name}")
        self._allocators[name] = weakref.ref(output_allocator)
        return True

    def _allocate_outputs(self, shapes: Mapping[str, Shape], stream_handle: int) -> None:
        """Ask the user's allocators for the outputs that have one."""
        for tensor in self._engine.plan.outputs:
            if tensor.name in self._allocators:
                allocator, size = self._allocators[tensor.name](), max(tensor.bytes_of(shapes[tensor.name]), 1)
                if allocator is None:
                    raise Strictness(f"the allocator of {tensor.name} was deleted")
                ask = functools.partial(called_back, self._trt, "IOutputAllocator")
                address = ask("reallocate_output_async", allocator, tensor.name, 0, size, ALIGNMENT, stream_handle)
                ask("notify_shape", allocator, tensor.name, dims(self._trt, shapes[tensor.name]))
                self._addresses[tensor.name] = address

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        return True

    def set_debug_listener(self, listener: Any) -> bool:
        return True

    def _region(self, tensor: Tensor, shape: Shape) -> Region:
        if not self._addresses.get(tensor.name):
            raise Strictness(f"no address is set of {tensor.name}")
        region, memory = Region(self._addresses[tensor.name], tensor.bytes_of(shape)), self._trt.gpus_.memory
        found = memory.allocation(region, tensor.name)
        if found.device is None and not found.mapped:
            raise Strictness(f"{tensor.name}: {found} is no device memory")
        return region

    # -- running

    def is_stream_capturable(self, stream: int) -> bool:
        self._trt.gpus_.stream(stream)
        return "REQUIRE_USER_ALLOCATION" in self._engine.plan.flags and self._strategy == "USER_MANAGED"

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue a run with the shapes, addresses and memory as they are now."""
        gpus, plan = self._trt.gpus_, self._engine.plan
        stream = gpus.stream(stream_handle)
        if self._profile is None:
            raise Strictness("no profile is chosen")
        if gpus.broken:
            return self._error(f"Error Code 1: Cuda Runtime (error {gpus.broken})")
        if self._switch is not None and self._switch[0] != stream_handle and not self._switch[1]:
            raise Strictness("the profile is still being switched on another stream")
        shapes, outputs = self._inputs(), self._outputs()
        self._allocate_outputs(outputs, stream_handle)
        reads = {tensor: self._region(tensor, shapes[tensor.name]) for tensor in plan.inputs}
        writes = {tensor: self._region(tensor, outputs[tensor.name]) for tensor in plan.outputs}
        scratch = self._scratch()
        for tensor, region in writes.items():
            others = [*reads.values(), scratch, *(other for one, other in writes.items() if one is not tensor)]
            if any(region.overlaps(other) for other in others):
                raise Strictness(f"{tensor.name} lies where something else does")
        if any(region.overlaps(scratch) for region in reads.values()):
            raise Strictness("an input lies in the context's device memory")
        key, capturable = (self._profile, tuple(shapes.items())), not self._trt.rtx or self.is_stream_capturable(stream_handle)
        if stream.capture is not None and not (capturable and self._ready == key):  # it must have run so once before
            stream.capture.broken = True
            return self._error("Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
        self._ready = key
        gpus.enqueue(stream_handle, self._work(reads, writes, scratch, shapes))
        gpus.counts["executions"] += 1
        self._remember(shapes)
        return True

    def pending(self) -> bool:
        return any(work.owner is not None and work.owner() is self for work in self._trt.gpus_.queued())

    def _scratch(self) -> Region:
        if self._memory is None:
            raise Strictness("no device memory is set")
        if self._memory.size < self._needed():
            raise Strictness(f"device memory of {self._memory.size} bytes, where {self._needed()} are needed")
        self._trt.gpus_.memory.allocation(self._memory, "device memory")
        return Region(self._memory.address, self._needed())

    def _work(
        self, reads: Mapping[Tensor, Region], writes: Mapping[Tensor, Region], scratch: Region, shapes: Mapping[str, Shape]
    ) -> Work:
        memory, model, context = self._trt.gpus_.memory, self._engine.model, weakref.ref(self)

        def check() -> None:
            if (alive := context()) is not None and not alive._engine.weights_loaded:
                raise Strictness("the engine runs without its weights: load_weights")
            if alive is not None and not alive._engine.complete:
                raise Strictness("the engine runs without the weights that it was stripped of: refit it")

        def run() -> None:
            feeds = {
                tensor.name: memory.view(region, tensor.name).view(tensor.numpy).reshape(shapes[tensor.name]).copy()
                for tensor, region in reads.items()
            }
            memory.view(scratch, "device memory")[:] = POISON
            results = compute(model, feeds)
            for tensor, region in writes.items():
                flat = results[tensor.name].astype(tensor.numpy, copy=False).tobytes()
                memory.view(region, tensor.name)[:] = memoryview(flat)

        label, outputs = f"execution of {', '.join(t.name for t in writes)}", (*writes.values(), scratch)
        return Work(label=label, run=run, check=check, reads=tuple(reads.values()), writes=outputs, owner=context)

    def _remember(self, shapes: Mapping[str, Shape]) -> None:
        """In the runtime cache, which must still be there."""
        if self._config is not None and self._config.cache is not None:
            cache = self._config.cache()
            if cache is None:
                raise Strictness("the runtime cache was deleted while a context uses it: keep a reference")
            cache._behaviour.entries.add(f"{self._engine.model.digest.hex()} {sorted(shapes.items())}")

    def _error(self, text: str) -> bool:
        report(self._trt, self._logger, "ERROR", f"IExecutionContext: {text}")
        return False
