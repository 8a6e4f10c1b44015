"""An execution context and its buffers, for one shape of a component."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.session import Session, aligned
from sdruntime.bundle.dimensions import size_of
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.errors import EngineError
from sdruntime.system.cuda import Pinned


class Plan(Protocol):
    """Creates execution contexts, and reports the library's error messages."""

    def context(self) -> Any: ...

    def reasons(self) -> str: ...


class Binding:
    """An execution context with device buffers. `address` and `sizes` (bytes) give the location of each tensor on the device.

    `placed`: the addresses of tensors that lie in buffers of others.
    """

    def __init__(
        self,
        spec: EngineSpec,
        component: ComponentSpec,
        plan: Plan,
        session: Session,
        dims: Mapping[str, int],
        profile: int,
        placed: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._name, self._plan, self._session, self._moves = spec.name, plan, session, -1
        self._context = plan.context()
        self.address: dict[str, int] = {}
        self._staged: dict[str, Pinned] = {}
        self._zeros: set[str] = set()  # inputs that hold zeros
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._drop_context)
        with self._stack as stack:  # releases what was created if a later step fails
            self._describe(component, dims, profile)
            own = {name: size for name, size in self.sizes.items() if name not in placed}
            buffer = session.cuda.allocate(sum(map(aligned, own.values())), f"the inputs and outputs of {spec.component}")
            stack.callback(buffer.close)
            address = buffer.pointer
            for name, size in own.items():
                self.place(name, address)
                address += aligned(size)
            for name, address in placed.items():
                self.place(name, address)
            self._stack = stack.pop_all()

    def _describe(self, component: ComponentSpec, dims: Mapping[str, int], profile: int) -> None:
        """Set the profile and input shapes of the context, and read the output shapes and memory size from it."""
        stream = self._session.stream
        self._check(self._context.set_optimization_profile_async(profile, stream.handle), f"accept its profile {profile}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        for tensor in component.engine_inputs:
            shape = tuple(size_of(dim, dims) for dim in tensor.shape)
            self._check(self._context.set_input_shape(tensor.name, shape), f"accept {tensor.name} as {list(shape)}")
            self.shapes[tensor.name] = shape
        unknown = self._context.infer_shapes()
        self._check(not unknown, f"infer its shapes without {', '.join(unknown)}")
        for tensor in component.outputs:
            self.shapes[tensor.name] = tuple(self._context.get_tensor_shape(tensor.name))
        self._dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in (*component.engine_inputs, *component.outputs)}
        self.sizes = {name: math.prod(shape) * self._dtypes[name].itemsize for name, shape in self.shapes.items()}
        self._inputs = [tensor.name for tensor in component.engine_inputs]
        self._outputs = [tensor.name for tensor in component.outputs]
        self._activations = int(self._context.update_device_memory_size_for_shapes())

    def place(self, name: str, address: int) -> None:
        """Set the device address of a tensor, 256-byte aligned."""
        self._check(self._context.set_tensor_address(name, address), f"accept the address of {name}")
        self.address[name] = address

    def ready(self) -> None:
        """Reserve the context's activation memory, and set its address if the arena has moved. Raises OutOfSpace."""
        arena = self._session.arena
        buffer = arena.reserve(self._activations)
        if self._moves != arena.moves:
            self._context.set_device_memory(buffer.pointer, buffer.size)
            self._moves = arena.moves

    def enqueue(self) -> None:
        """Queue one run on the session's stream, without waiting for it."""
        self.ready()
        self._session.cuda.use()
        self._check(self._context.execute_async_v3(self._session.stream.handle), "run")

    def upload(self, feeds: Mapping[str, Array]) -> None:
        """Copy arrays to the device through pinned memory. The stream must be idle, as it is after `download`."""
        self._zeros -= feeds.keys()
        for name, array in feeds.items():
            staged = self._stage(name)
            np.copyto(staged.array, array)
            self._session.stream.upload(self.address[name], staged, self.sizes[name])

    def clear(self, names: Iterable[str]) -> None:
        """Fill inputs with zeros, except those that hold zeros since the last call. The stream must be idle."""
        for name in names:
            if name not in self._zeros:
                self.upload({name: np.zeros((), self._dtypes[name])})
                self._zeros.add(name)

    def overwritten(self, names: Iterable[str]) -> None:
        """Note that other work on the stream writes to inputs."""
        self._zeros -= set(names)

    def download(self) -> dict[str, Array]:
        """Return every output as a new array, after waiting for the stream."""
        for name in self._outputs:
            self._session.stream.download(self._stage(name), self.address[name], self.sizes[name])
        self._session.stream.synchronize()
        return {name: self._stage(name).array.copy() for name in self._outputs}

    def close(self) -> None:
        """Release the context and its buffers. The stream must be idle."""
        self._stack.close()

    def _drop_context(self) -> None:
        self._context = None

    def _stage(self, name: str) -> Pinned:
        if name not in self._staged:
            self._staged[name] = self._session.cuda.pinned(self.shapes[name], self._dtypes[name])
            self._stack.callback(self._staged[name].close)
        return self._staged[name]

    def _check(self, success: bool, action: str) -> None:
        if not success:
            raise EngineError(f"engine {self._name}: TensorRT did not {action}: {self._plan.reasons()}")
