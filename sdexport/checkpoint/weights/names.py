"""Match the weights of a module with the tensors of a checkpoint, also by the names of earlier versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdexport.errors import ExportError, shortened
from sdruntime.errors import lines_of

# old and new names of one weight: transformers 5 dropped a prefix, diffusers 0.18 renamed the attention of the VAE
_OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


_PREFIX = "text_model."


def match_weights(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], *, where: str
) -> dict[str, StoredTensor]:
    """Return the stored tensor for each weight of a module, under its current or an earlier name.

    Raises ExportError with the missing weights, wrong shapes and unsupported types, 20 at most.
    """
    matched, faults = {}, []
    for name, shape in shapes.items():
        tensor = next((stored[other] for other in spellings(name) if other in stored), None)
        if tensor is None:
            faults.append(f"{name} is missing")
        elif tensor.shape != shape:
            faults.append(f"{name} is {list(tensor.shape)}, but config.json requires {list(shape)}")
        elif not tensor.readable:
            faults.append(
                f"{name} is stored as {tensor.dtype}: quantised weights are not supported; use a checkpoint in float16 or float32"
            )
        else:
            matched[name] = tensor
    if faults:
        listed = lines_of(shortened(faults))
        raise ExportError(f"{where}: the weights do not fit the config\n{listed}")
    return matched


def spellings(name: str) -> Iterator[str]:
    """Yield the names under which a weight may be stored: its own first."""
    yield name
    yield name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else _PREFIX + name
    for new, old in _OLD_NAMES.items():
        if new in name:
            yield name.replace(new, old)
