"""LoRA files of random numbers in the formats that are in use, for a model whose weights are given by name and shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Components = Mapping[str, Mapping[str, Shape]]  # component -> weight -> shape
Tensors = dict[str, np.ndarray]
_TABLES = ("embeddings.", "text_model.embeddings.")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file; its tensors are float32. Written by hand, as tests of the runtime have NumPy alone."""
    data = {key: np.ascontiguousarray(values, "<f4") for key, values in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for key, values in data.items():
        header[key] = {"dtype": "F32", "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in data.values()))
    return path


def modules(components: Components, wanted: Callable[[str, Shape], bool]) -> Iterator[tuple[str, str, Shape]]:
    """(component, module, shape of its weight) of the matrices and convolutions that are `wanted`."""
    for component, weights in components.items():
        for name, shape in weights.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and len(shape) > 1 and not module.startswith(_TABLES) and wanted(module, shape):
                yield component, module, shape


def attention(module: str, shape: Shape) -> bool:
    return module.endswith(_ATTENTION)


def everything(module: str, shape: Shape) -> bool:
    return True


def pair(random: np.random.Generator, shape: Shape, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of a matrix or a convolution."""
    down, up = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    return normal(random, down, 1 / math.sqrt(math.prod(shape[1:]))), normal(random, up, 0.5)


def normal(random: np.random.Generator, shape: Shape, deviation: float = 1.0) -> np.ndarray:
    return (random.standard_normal(shape) * deviation).astype(np.float32)


def text_module(module: str) -> str:
    """The name of a text encoder's module in files: always with the prefix that transformers 5 dropped."""
    return module if module.startswith("text_model.") else f"text_model.{module}"


def kohya_stem(component: str, module: str, *, two: bool) -> str:
    if component == "unet":
        return "lora_unet_" + module.replace(".", "_")
    name = {"text_encoder": "te1" if two else "te", "text_encoder_2": "te2"}[component]
    return f"lora_{name}_" + text_module(module).replace(".", "_")


def peft_stem(component: str, module: str) -> str:
    return f"{component}.{module if component == 'unet' else text_module(module)}"


def kohya(components: Components, *, wanted: Any = attention, rank: int = 4, alpha: float | None = 2.0) -> Tensors:
    random, tensors = np.random.default_rng(1), Tensors()
    for component, module, shape in modules(components, wanted):
        stem = kohya_stem(component, module, two="text_encoder_2" in components)
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = pair(random, shape, rank)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return tensors


def peft(components: Components, *, wanted: Any = attention, rank: int = 4) -> Tensors:
    random, tensors = np.random.default_rng(2), Tensors()
    for component, module, shape in modules(components, wanted):
        stem = peft_stem(component, module)
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = pair(random, shape, rank)
    return tensors


def peft_metadata(components: Components, rank: int, alpha: float, **more: Any) -> dict[str, str]:
    """The metadata of diffusers' save_lora_weights."""
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(_ATTENTION), **more}
    settings = {f"{component}.{name}": value for component in components for name, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}


def processors(components: Components, *, rank: int = 4) -> Tensors:
    """diffusers before 0.19: the names of attention processors."""
    random, tensors = np.random.default_rng(3), Tensors()
    for component, module, shape in modules(components, attention):
        down, up = pair(random, shape, rank)
        if component == "unet":
            head, _, last = module.removesuffix(".0").rpartition(".")
            stem = f"unet.{head}.processor.{last}_lora"
        else:
            head, _, last = text_module(module).rpartition(".")
            stem = f"{component}.{head}.to_{last.split('_')[0]}_lora"
        tensors[f"{stem}.down.weight"], tensors[f"{stem}.up.weight"] = down, up
    return tensors


def loha(components: Components, *, wanted: Any = attention, rank: int = 3, alpha: float = 2.0) -> Tensors:
    """Of convolutions with a Tucker decomposition."""
    random, tensors = np.random.default_rng(4), Tensors()
    for component, module, shape in modules(components, wanted):
        stem = kohya_stem(component, module, two="text_encoder_2" in components)
        tucker = len(shape) == 4 and max(shape[2:]) > 1
        for k in (1, 2):
            if tucker:
                tensors[f"{stem}.hada_t{k}"] = normal(random, (rank, rank, *shape[2:]), 0.3)
                tensors[f"{stem}.hada_w{k}_a"] = normal(random, (rank, shape[0]), 0.5)
                tensors[f"{stem}.hada_w{k}_b"] = normal(random, (rank, shape[1]), 0.5)
            else:
                tensors[f"{stem}.hada_w{k}_a"] = normal(random, (shape[0], rank), 0.3)
                tensors[f"{stem}.hada_w{k}_b"] = normal(random, (rank, math.prod(shape[1:])), 0.3)
        tensors[f"{stem}.alpha"] = np.array(alpha, np.float32)
    return tensors


def full(components: Components, *, wanted: Any = attention) -> Tensors:
    random, tensors = np.random.default_rng(5), Tensors()
    for component, module, shape in modules(components, wanted):
        stem = kohya_stem(component, module, two="text_encoder_2" in components)
        tensors[f"{stem}.diff"] = normal(random, shape, 0.05)
        if f"{module}.bias" in components[component]:
            tensors[f"{stem}.diff_b"] = normal(random, components[component][f"{module}.bias"], 0.05)
    return tensors
