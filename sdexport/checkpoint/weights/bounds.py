"""Limit the depth of a network to that of its weights: a config of a few bytes may request a network of any depth.

`check_depth` compares the config with the names of the stored weights before a module is created. `at_most` aborts the creation
of a module that has more weights than are stored, whichever key of the config multiplied them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sdexport.errors import ExportError
from sdruntime.bundle.roles import IMAGE_ENCODER

_TEXT = "text_model."  # a prefix that transformers 5 dropped
_VISION = "vision_model."
_SLACK = 64


def check_depth(part: str, config: Mapping[str, Any], names: Collection[str], faults: list[str]) -> None:
    """Add a fault for the first layer that the config requests and the stored weights lack."""
    stored = {name.removeprefix(_TEXT).removeprefix(_VISION) for name in names}
    prefixes = {prefix for name in stored for prefix in _prefixes(name)}
    for key, layer in _layers(part, config):
        if layer not in prefixes:
            faults.append(
                f"{part}/config.json: {key} requests {layer:.80}, but none of the {len(stored):,} stored weights is in it"
            )
            return


@contextlib.contextmanager
def at_most(weights: int, *, where: str) -> Iterator[None]:
    """Raise ExportError if the modules created in this context have more than `weights` weights (and some slack)."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    left = weights + _SLACK

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal left
        left -= parameter is not None
        if left < 0:
            raise ExportError(f"{where}: config.json requests more weights than the {weights:,} that are stored: they do not fit")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")[:8]
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _layers(part: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, the last layer it requests) for each key that counts layers."""
    if part.startswith(("text_encoder", IMAGE_ENCODER)):
        yield from _last("num_hidden_layers", "encoder.layers", config.get("num_hidden_layers", 12))
        return
    within = "encoder." if part == "vae" else ""
    for block, kind in enumerate(_listed(config.get("down_block_types"))):
        resnets = _of_block(config.get("layers_per_block", 1 if part == "vae" else 2), block)
        yield "down_block_types", f"{within}down_blocks.{block}"
        yield from _last("layers_per_block", f"{within}down_blocks.{block}.resnets", resnets)
        if part == "unet" and kind == "CrossAttnDownBlock2D":
            depth = _of_block(config.get("transformer_layers_per_block", 1), block)
            for layer, count in enumerate(depth if isinstance(depth, list) else [depth]):
                yield from _last(
                    "transformer_layers_per_block", f"down_blocks.{block}.attentions.{layer}.transformer_blocks", count
                )


def _of_block(value: Any, block: int) -> Any:
    return value[block] if isinstance(value, list) and block < len(value) else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_count(value: Any) -> bool:
    return type(value) is int


def _last(key: str, list_of: str, count: Any) -> Iterator[tuple[str, str]]:
    if _is_count(count) and count > 0:  # `read_config` refuses other values
        yield key, f"{list_of}.{count - 1}"
