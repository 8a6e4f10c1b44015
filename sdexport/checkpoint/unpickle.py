"""Pickled weights, of a checkpoint that the user trusts, by way of a safetensors file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdexport.checkpoint.safetensors import StoredTensor, read_header, with_scales
from sdexport.errors import CheckpointError, EnvironmentFault


def unpickled(files: Sequence[Path], path: Path) -> Mapping[str, StoredTensor]:
    """Write the tensors of all `files` to the safetensors file `path`. torch before 2.6 runs code even from `weights_only` loads.

    Raises CheckpointError for a file that is not a state dict of plain tensors.
    """
    import safetensors.torch
    import torch

    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 6):
        raise EnvironmentFault(f"torch {torch.__version__} runs code from pickled weights: pip install 'torch>=2.6'")
    tensors: dict[str, Any] = {}
    for file in files:
        found = _state_dict(file)
        twins = found.keys() & tensors.keys()
        if twins:
            raise CheckpointError(file.name, [f"another shard holds {min(twins):.60} too"])
        tensors |= found
    try:
        safetensors.torch.save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        return with_scales(read_header(path))
    except (ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(files[0].name, [f"its tensors cannot be written as safetensors: {error!s:.300}"]) from error


def _state_dict(file: Path) -> dict[str, Any]:
    import torch

    try:
        # only torch's newer format, a zip file, can be mapped
        loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch, pickle and zipfile raise what they like for a damaged file
        first = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(file.name, [f"not a pickle of weights alone: {type(error).__name__}: {first:.200}"]) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(file.name, [f"a {type(loaded).__name__}, not a state dict of tensors by name"])
    faults = [
        f"{name!r:.60}: a {type(value).__name__}, not a tensor" for name, value in loaded.items() if not _is_plain(name, value)
    ]
    if faults or not loaded:
        raise CheckpointError(
            file.name, [*faults[:10], f"{len(loaded) - len(faults):,} of {len(loaded):,} entries are tensors by name"]
        )
    return dict(loaded)


def _is_plain(name: Any, value: Any) -> bool:
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta
