"""A merged checkpoint has the weights that its method says, and diffusers opens it."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sdexport_cli import run

from sdexport.errors import CheckpointError, ExportError
from sdexport.merging.merge import MergeOptions, merge
from sdexport.merging.methods import Method, add_difference, slerp, weighted
from sdexport.merging.weights import Weights, weights_from
from sdruntime.errors import SettingError

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_methods() -> None:
    a, b = np.array([[3.0, 0.0]], np.float32), np.array([[0.0, 2.0]], np.float32)
    assert weighted(0.25, a, b).tolist() == [[2.25, 0.5]]
    half = np.sqrt(0.5)
    assert slerp(0.5, a, b) == pytest.approx(np.array([[3 * half, 2 * half]]))
    assert np.array_equal(slerp(0.0, a, b), a)
    assert slerp(1.0, a, b) == pytest.approx(b, abs=1e-7)
    assert np.array_equal(slerp(0.5, a, 3 * a), 2 * a)  # parallel: the line
    assert np.array_equal(slerp(0.5, a, 0 * a), 0.5 * a)
    assert add_difference(0.5, a, b, 2 * b).tolist() == [[3.0, -1.0]]
    wide, narrow = np.ones((2, 3, 1, 1), np.float32), np.full((2, 2, 1, 1), 4, np.float32)
    assert add_difference(1.0, wide, narrow, 0 * narrow)[0].ravel().tolist() == [5, 5, 1]


def test_the_longest_part_counts() -> None:
    weights = weights_from("0.3, vae=0, unet=0.5, unet.up_blocks.1=0.8")
    assert weights == Weights(0.3, {"vae": 0.0, "unet": 0.5, "unet.up_blocks.1": 0.8})
    assert weights.of("text_encoder", "x") == 0.3
    assert weights.of("unet", "up_blocks.1.resnets.0.conv1.weight") == 0.8
    assert weights.of("unet", "up_blocks.10.x") == 0.5
    for text in ("x", "nan", "0.5,clip=1", "vae="):
        with pytest.raises(SettingError, match="weights"):
            weights_from(text)


@pytest.fixture
def models(sd1_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint and two others with other weights."""
    random = np.random.default_rng(2)
    others = [Path(copytree(sd1_checkpoint, tmp_path / name)) for name in "bc"]
    for folder in others:
        for file in folder.rglob("*.safetensors"):
            tensors = load_file(file)
            for values in (values for values in tensors.values() if values.dtype.kind == "f"):
                values += (0.1 * random.standard_normal(values.shape)).astype(values.dtype)
            save_file(tensors, file, {"format": "pt"})
    return sd1_checkpoint, *others


def merged(models: tuple[Path, ...], out: Path, **options: object) -> Path:
    for _ in merge([str(model) for model in models], out, MergeOptions(**options)):  # type: ignore[arg-type]
        pass
    return out


@pytest.mark.parametrize("method", ["weighted", "slerp", "add-difference"])
def test_every_weight_is_merged(models: tuple[Path, Path, Path], method: Method, tmp_path: Path) -> None:
    chosen = models if method == "add-difference" else models[:2]
    out = merged(chosen, tmp_path / "out", method=method, weights=weights_from("0.3,vae=0,unet.mid_block=0.9"))
    a, *others = (load_file(model / UNET) for model in chosen)
    compute = {"weighted": weighted, "slerp": slerp, "add-difference": add_difference}[method]
    result = load_file(out / UNET)
    assert result.keys() == a.keys()
    for name, values in result.items():
        weight = 0.9 if name.startswith("mid_block.") else 0.3
        assert np.array_equal(values, compute(weight, a[name], *(other[name] for other in others))), name
    vae = "vae/diffusion_pytorch_model.safetensors"
    kept, own = load_file(out / vae), load_file(models[0] / vae)
    assert all(np.array_equal(values, own[name]) for name, values in kept.items())


def test_diffusers_opens_the_result(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import diffusers

    out = merged(models[:2], tmp_path / "out", precision="fp16")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(out))
    stored = load_file(out / UNET)
    assert {values.dtype for values in stored.values()} == {np.dtype(np.float16)}
    assert np.array_equal(pipe.unet.conv_in.weight.detach().numpy(), stored["conv_in.weight"].astype(np.float32))
    assert (
        pipe.tokenizer("a cat").input_ids
        == diffusers.StableDiffusionPipeline.from_pretrained(str(models[0])).tokenizer("a cat").input_ids
    )


def test_what_does_not_fit(models: tuple[Path, Path, Path], sd2_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SettingError, match="expected 3 models, got 2"):
        merged(models[:2], out, method="add-difference")
    with pytest.raises(CheckpointError, match="family sd2, but that of"):
        merged((models[0], sd2_checkpoint), out)
    tensors = load_file(models[1] / UNET)
    del tensors["conv_out.bias"]
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:-1].copy()
    save_file(tensors, models[1] / UNET, {"format": "pt"})
    with pytest.raises(ExportError, match=r"(?s)conv_in.bias is .*conv_out.bias is missing in b"):
        merged(models[:2], out)
    assert [path.name for path in tmp_path.iterdir()] == ["b", "c"] or not out.exists()
    out.mkdir()
    with pytest.raises(SettingError, match="exists: choose another place"):
        merged((models[0], models[2]), out)


def test_the_command(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("merge", str(models[0]), str(models[1]), "-o", str(out), "--weights", "0.2,unet.nowhere=1")
    assert done.exit_code == 0, done.output
    assert "no weight belongs to unet.nowhere" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c", "out"]
