"""Convert the pickled weights of a checkpoint that the user trusts to a safetensors file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdexport.checkpoint.weights.safetensors import StoredTensor, read_header, with_scales
from sdexport.errors import CheckpointError, EnvironmentFault


def convert_pickles(files: Sequence[Path], path: Path) -> Mapping[str, StoredTensor]:
    """Write the tensors of all `files` to the safetensors file `path`, and return them by name.

    Raises CheckpointError for a file that is not a state dict of plain tensors, and EnvironmentFault for torch before 2.6, which
    runs code even with `weights_only`.
    """
    import safetensors.torch
    import torch

    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 6):
        raise EnvironmentFault(f"torch {torch.__version__} runs code from pickled weights: pip install 'torch>=2.6'")
    tensors: dict[str, Any] = {}
    for file in files:
        loaded = _state_dict(file)
        duplicates = loaded.keys() & tensors.keys()
        if duplicates:
            raise CheckpointError(file.name, [f"another shard has {min(duplicates):.60} too"])
        tensors |= loaded
    try:
        safetensors.torch.save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        return with_scales(read_header(path))
    except (ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(files[0].name, [f"its tensors cannot be written as safetensors: {error!s:.300}"]) from error


def _state_dict(file: Path) -> dict[str, Any]:
    import torch

    try:
        # only torch's newer format, a zip file, can be memory-mapped
        loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file torch, pickle and zipfile raise many kinds of errors
        first = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(file.name, [f"not a pickle of only weights: {type(error).__name__}: {first:.200}"]) from error
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
