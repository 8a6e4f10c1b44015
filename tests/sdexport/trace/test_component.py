"""What the first process of an export checks before any component is made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sdexport_cli import run

from sdexport.errors import ExportError
from sdexport.trace.component import ComponentJob
from sdexport.trace.component import run as stages


def without(path: Path, *names: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name in names:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_weights_of_all_components_are_told_before_any_is_exported(
    sd1_checkpoint: Path, trace_cache: Path, tmp_path: Path
) -> None:
    model, out = Path(shutil.copytree(sd1_checkpoint, tmp_path / "model")), tmp_path / "out"
    without(model / "unet" / "diffusion_pytorch_model.safetensors", "conv_out.weight", "conv_in.bias")
    without(model / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight")
    out.mkdir()
    job = ComponentJob(
        checkpoint=str(model), component="text_encoder", precision="fp32", allow_pickle=False, out=str(out), first=True
    )
    seen = []
    with pytest.raises(ExportError) as caught:
        seen.extend(stage.name for stage in stages(job))
    text = str(caught.value)
    for name in ("conv_out.weight is missing", "conv_in.bias is missing", "decoder.conv_in.weight is missing"):
        assert text.count(name) == 1
    assert "unet: the weights do not fit" in text
    assert "vae_decoder: the weights do not fit" in text
    assert seen == ["check"]
    assert list(out.iterdir()) == []


def test_a_build_ends_in_its_check(sd1_checkpoint: Path, trace_cache: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sd1_checkpoint, tmp_path / "model"))
    without(model / "unet" / "diffusion_pytorch_model.safetensors", "conv_out.weight")
    result = run("build", model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "conv_out.weight is missing" in result.stderr
    assert "text_encoder: check" in result.stderr
    assert "trace" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
