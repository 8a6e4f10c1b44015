"""Files of embeddings that torch.save wrote: the same vectors as from safetensors, and only if pickles are allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdexport.checkpoint.weights.embeddings import open_file
from sdruntime.adapters.embedding import Embedding, read_embedding
from sdruntime.errors import SettingError

VECTORS = torch.arange(2 * 12, dtype=torch.float32).reshape(2, 12) / 7
WIDTHS = {"text_encoder": 12}
A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(VECTORS)}, "name": "kitten", "step": 500}


def read(path: Path, *, allow_pickle: bool = True) -> Embedding:
    return read_embedding(path, WIDTHS, lambda source: open_file(source, allow_pickle=allow_pickle))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("saved", "name"),
    [
        (A1111, "kitten"),
        ({**A1111, "name": None}, "file"),
        ({"<cat>": VECTORS}, "<cat>"),
        ({"<cat>": VECTORS.half()}, "<cat>"),
        ({"emb_params": VECTORS}, "file"),
    ],
)
def test_each_format(saved: dict[str, Any], name: str, older: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=not older)
    embedding = read(path)
    assert embedding.name == name
    np.testing.assert_allclose(embedding.vectors["text_encoder"], VECTORS.numpy(), rtol=1e-3)
    assert len(embedding.sha256) == 64


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save(A1111, path)
    with pytest.raises(SettingError, match=f"embedding {path}: a pickle, a format that can hold code: .*--allow-pickle"):
        read(path, allow_pickle=False)
    torch.save({**A1111, "string_to_param": {"*": VECTORS, "+": VECTORS}}, path)
    with pytest.raises(SettingError, match="string_to_param is not a dictionary with one entry"):
        read(path)
    torch.save({"<cat>": VECTORS * float("nan")}, path)
    with pytest.raises(SettingError, match="<cat>: NaN or infinity"):
        read(path)
    torch.save({"<cat>": VECTORS[:, :5].contiguous()}, path)
    with pytest.raises(SettingError, match="its vectors have 5 numbers, but the model's text_encoder takes 12"):
        read(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SettingError, match=f"embedding {path}: "):
        read(path)
