"""How deep a network may be: no deeper than its weights. A config is a few bytes, and may request a network of any depth.

`check_depth` looks at the names of the stored weights before anything is made; `at_most` ends the making of a module that has
more weights than are stored, whatever key of the config multiplied them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sdexport.errors import ExportError

_TEXT = "text_model."  # a prefix that transformers 5 dropped
_SLACK = 64


def check_depth(part: str, config: Mapping[str, Any], names: Collection[str], faults: list[str]) -> None:
    """Name the first layer of a network that its config has and its weights lack."""
    own = {name.removeprefix(_TEXT) for name in names}
    found = {prefix for name in own for prefix in _prefixes(name)}
    for key, layer in _layers(part, config):
        if layer not in found:
            faults.append(
                f"{part}/config.json: {key} asks for {layer:.80}, of which none of the {len(own):,} stored weights is a part"
            )
            return


@contextlib.contextmanager
def at_most(weights: int, *, where: str) -> Iterator[None]:
    """Modules that are made within have this many weights at most. Raises ExportError when one has more."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    left = weights + _SLACK

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal left
        left -= parameter is not None
        if left < 0:
            raise ExportError(f"{where}: config.json makes more weights than the {weights:,} that are stored: they do not fit")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")[:8]
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _layers(part: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, the last layer that it requests) for each key that counts layers."""
    if part.startswith("text_encoder"):
        yield from _last("num_hidden_layers", "encoder.layers", config.get("num_hidden_layers", 12))
        return
    within = "encoder." if part == "vae" else ""
    for block, kind in enumerate(_listed(config.get("down_block_types"))):
        resnets = _of_block(config.get("layers_per_block", 1 if part == "vae" else 2), block)
        yield "down_block_types", f"{within}down_blocks.{block}"
        yield from _last("layers_per_block", f"{within}down_blocks.{block}.resnets", resnets)
        if part == "unet" and kind == "CrossAttnDownBlock2D":
            depth = _of_block(config.get("transformer_layers_per_block", 1), block)
            deepest = depth if isinstance(depth, int) else max(filter(_is_count, _listed(depth)), default=1)
            yield from _last("transformer_layers_per_block", f"down_blocks.{block}.attentions.0.transformer_blocks", deepest)


def _of_block(value: Any, block: int) -> Any:
    return value[block] if isinstance(value, list) and block < len(value) else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_count(value: Any) -> bool:
    return type(value) is int


def _last(key: str, list_of: str, count: Any) -> Iterator[tuple[str, str]]:
    if _is_count(count) and count > 0:  # what else is there is refused as a value
        yield key, f"{list_of}.{count - 1}"
