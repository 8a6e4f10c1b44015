"""Full-size checkpoints, without their weights: the networks are of the published sizes, and the folder is one that is read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.gpu import checkpoint

pytest.importorskip("diffusers", reason="shapes are read off its classes")
PARAMETERS = {  # millions, as the published checkpoints have them
    "sd15": {"text_encoder": 123.1, "vae": 83.7, "unet": 859.5},
    "sd-turbo": {"text_encoder": 340.4, "vae": 83.7, "unet": 865.9},
    "sdxl": {"text_encoder": 123.1, "text_encoder_2": 694.7, "vae": 83.7, "unet": 2567.5},
}


@pytest.mark.parametrize("model", checkpoint.MODELS)
def test_it_has_the_published_size_and_is_read(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdexport.checkpoint.checkpoint import read_checkpoint

    sizes: dict[str, float] = {}

    def no_numbers(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        sizes[path.parent.name] = round(sum(map(math.prod, shapes.values())) / 1e6, 1)
        real(path, {name: (1,) * len(shape) for name, shape in shapes.items()}, dtype)  # every name, hardly a number

    real = checkpoint.write_weights
    monkeypatch.setattr(checkpoint, "write_weights", no_numbers)
    folder = checkpoint.write_checkpoint(tmp_path / model, model)
    assert sizes == PARAMETERS[model]
    read = read_checkpoint(folder, name=model, precision="fp16").model
    assert read.family == {"sd15": "sd1", "sd-turbo": "sd2", "sdxl": "sdxl"}[model]
    assert read.default_size == ((1024, 1024) if model == "sdxl" else (512, 512))


def test_weights_are_read_back_and_differ(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    checkpoint.write_weights(
        tmp_path / "w", {"a.weight": (64, 64), "b.weight": (64, 64), "norm.weight": (64,), "norm.bias": (64,)}
    )
    read = load_file(tmp_path / "w")
    assert {name: (each.dtype, each.shape) for name, each in read.items()} == {
        "a.weight": ("float16", (64, 64)),
        "b.weight": ("float16", (64, 64)),
        "norm.weight": ("float16", (64,)),
        "norm.bias": ("float16", (64,)),
    }
    assert (read["a.weight"] != read["b.weight"]).mean() > 0.9
    assert 0.1 < read["a.weight"].std() < 0.15
    assert 0.9 < read["norm.weight"].mean() < 1.1
