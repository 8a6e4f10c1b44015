"""The serialised engine of the fake TensorRT: a header of 64 bytes, what the engine knows of itself, and the ONNX it runs.

Nothing in it depends on a path or on the time: one network under one configuration always gives the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input -> min, opt, max

HEADER = struct.Struct("<8s24sQQ16x")
_MAGIC = {"tensorrt": b"FAKE-TRT", "tensorrt_rtx": b"FAKE-RTX"}
_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}  # ONNX's numbers
_NUMPY = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"}


class BadPlan(Exception):
    """Bytes that are no plan of this library and version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input or output of a network: a named dimension is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dims(self) -> Shape:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.shape)

    def bytes_of(self, shape: Shape) -> int:
        return int(np.prod(shape, dtype=np.int64)) * np.dtype(_NUMPY[self.dtype]).itemsize

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(_NUMPY[self.dtype])


def tensor_from_onnx(value: Any) -> Tensor:
    """From a ValueInfoProto."""
    kind = value.type.tensor_type
    dims = [dim.dim_param if dim.WhichOneof("value") != "dim_value" else dim.dim_value for dim in kind.shape.dim]
    shape = tuple(dim if dim != "" else f"?{k}" for k, dim in enumerate(dims))
    return Tensor(name=value.name, dtype=_TYPES[kind.elem_type], shape=shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An engine. `capabilities`: the GPUs that it runs on, (8, 6) being 86; empty: Ampere and later, on TensorRT-RTX."""

    library: str
    version: str
    capabilities: tuple[int, ...]
    hardware: str  # HardwareCompatibilityLevel
    flags: tuple[str, ...]
    verbosity: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[str, ...]
    profiles: tuple[Profile, ...]
    weights: str  # a digest of them, whether they are in the plan or not
    onnx: bytes
    refittable: tuple[str, ...] = ()  # weights that were marked one by one

    def activation(self, shapes: Mapping[str, Shape]) -> int:
        """The bytes of device memory that a context needs for inputs of these shapes."""
        size = sum(tensor.bytes_of(shapes[tensor.name]) for tensor in self.inputs)
        return -(-(4 * size + 1024) // 256) * 256

    def activation_of_profile(self, index: int) -> int:
        if not self.profiles:
            return self.activation({tensor.name: tensor.dims for tensor in self.inputs})
        return self.activation({name: shapes[2] for name, shapes in self.profiles[index].items()})


def plan_to_bytes(plan: Plan) -> bytes:
    about = {key: value for key, value in asdict(plan).items() if key != "onnx"}
    text = json.dumps(about, sort_keys=True).encode()
    header = HEADER.pack(_MAGIC[plan.library], plan.version.encode(), len(text), len(plan.onnx))
    return header + text + plan.onnx


def plan_from_bytes(data: bytes, library: str, version: str, *, host_code: bool = False) -> Plan:
    """`host_code`: an older version's runtime may be taken out of the plan and run. Raises BadPlan."""
    if len(data) < HEADER.size:
        raise BadPlan("Magic tag does not match")
    magic, made_by, about, onnx = HEADER.unpack_from(data)
    if magic != _MAGIC[library]:
        raise BadPlan("Magic tag does not match")
    if len(data) != HEADER.size + about + onnx:
        raise BadPlan("The serialized engine is truncated")
    raw = json.loads(data[HEADER.size :][:about])
    for side in ("inputs", "outputs"):
        raw[side] = tuple(Tensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in raw[side])
    raw["profiles"] = tuple({k: tuple(tuple(s) for s in v) for k, v in profile.items()} for profile in raw["profiles"])
    for key in ("capabilities", "flags", "layers", "refittable"):
        raw[key] = tuple(raw[key])
    plan = Plan(**raw, onnx=data[HEADER.size + about :])
    carries_code = "VERSION_COMPATIBLE" in plan.flags and "EXCLUDE_LEAN_RUNTIME" not in plan.flags
    if carries_code and not host_code:
        raise BadPlan("Host code is not allowed: the plan carries a lean runtime")
    if made_by.rstrip(b"\0").decode() != version and not (carries_code and _release(plan.version) < _release(version)):
        raise BadPlan(f"Version tag does not match: current version {version}, serialized engine version {plan.version}")
    return plan


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


# -- what the fake GPU computes


class Model:
    """ONNX bytes that are hashed by content, once."""

    def __init__(self, data: bytes) -> None:
        self.data, self.digest = data, hashlib.sha256(data).digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and other.digest == self.digest


def compute(onnx: Model, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs, by ONNX Runtime on the CPU."""
    session = _session(onnx)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


@functools.lru_cache(maxsize=32)
def output_shapes(onnx: Model, shapes: tuple[tuple[str, Shape, str], ...]) -> dict[str, Shape]:
    """The shapes that a network gives for inputs of these (name, shape, NumPy type): found by running it on zeros."""
    feeds = {name: np.zeros(shape, dtype) for name, shape, dtype in shapes}
    return {name: array.shape for name, array in compute(onnx, feeds).items()}


@functools.lru_cache(maxsize=16)
def _session(onnx: Model) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx.data, options, providers=["CPUExecutionProvider"])
