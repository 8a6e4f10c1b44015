"""Checkpoints as they are found: pruned UNets, distilled schedules, and the many ways of writing a diffusers folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.weights.names import match_weights
from sdexport.errors import CheckpointError
from sdexport.families.components import components
from sdexport.trace.cache import trace_key
from sdruntime.sampling.compile import compile_table


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}), encoding="utf-8")


def copied(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / "checkpoint"))


def keys(checkpoint: Checkpoint) -> dict[str, str]:
    """The networks, by what their graphs depend on."""
    return {component.name: trace_key(component) for component in components(checkpoint)}


@pytest.mark.parametrize("model", tiny.PRUNED)
def test_a_pruned_unet_has_the_weights_that_its_config_says(model: str, sdxl_checkpoint: Path, tmp_path: Path) -> None:
    """Its images are compared in tests/integration/test_fidelity_configs.py."""
    import torch
    from diffusers import UNet2DConditionModel

    folder = copied(sdxl_checkpoint, tmp_path)
    tiny.prune(folder, model)
    checkpoint = read_checkpoint(folder, name="x")
    assert checkpoint.model.family == "sdxl"
    part = checkpoint.parts["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(part.config))
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    assert len(match_weights(shapes, part.weights, where="unet")) == len(shapes)
    assert sorted(shapes) == sorted(part.weights)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_a_distilled_schedule_is_that_of_the_folder(spacing: str, sdxl_checkpoint: Path, tmp_path: Path) -> None:
    """SDXL-Turbo, SDXL-Lightning and Hyper-SD are SDXL with Euler over trailing timesteps; from the last one in one step."""
    folder = copied(sdxl_checkpoint, tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing=spacing)
    scheduler = read_checkpoint(folder, name="x").scheduler
    assert scheduler["timestep_spacing"] == spacing
    times = [float(t) for t in compile_table(scheduler, steps=4).t]
    assert times[0] == {"trailing": 999, "linspace": 999, "leading": 751}[spacing]
    assert len(times) == 4


def nothing_safe(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=[None, None], feature_extractor=[None, None], image_encoder=[None, None])


def no_mention_of_safety(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=..., feature_extractor=..., requires_safety_checker=...)


def a_safety_checker(folder: Path) -> None:
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not read")


def a_size_as_a_list(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=[8, 8])


def no_versions(folder: Path) -> None:
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        edit(folder / name, _diffusers_version=...)


def heads_by_their_other_name(folder: Path) -> None:
    """attention_head_dim of a UNet is the number of heads; num_attention_heads is null in every file."""
    edit(folder / "unet" / "config.json", num_attention_heads=None, attention_head_dim=2)


def non_ema_beside(folder: Path) -> None:
    unet = folder / "unet"
    for variant in ("non_ema", "ema", "fp32"):
        (unet / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(b"not read")


def new_names_in_the_vae(folder: Path) -> None:
    """to_q, to_k, to_v and to_out.0, where the tiny checkpoint has query, key, value and proj_attn."""
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    rules = {old.replace(".", r"\."): new for old, new in names.items()}
    tiny._rename(folder / "vae" / "diffusion_pytorch_model.safetensors", rules)


VARIANTS: tuple[Callable[[Path], None], ...] = (
    nothing_safe,
    no_mention_of_safety,
    a_safety_checker,
    a_size_as_a_list,
    no_versions,
    heads_by_their_other_name,
    non_ema_beside,
    new_names_in_the_vae,
)


@pytest.mark.parametrize("change", VARIANTS)
def test_another_way_of_writing_it_is_the_same_checkpoint(
    change: Callable[[Path], None], sd1_checkpoint: Path, tmp_path: Path
) -> None:
    usual = read_checkpoint(sd1_checkpoint, name="x")
    folder = copied(sd1_checkpoint, tmp_path)
    change(folder)
    found = read_checkpoint(folder, name="x")
    assert (found.model, keys(found), found.text_length) == (usual.model, keys(usual), usual.text_length)
    for part, stored in usual.parts.items():
        shapes = {name: tensor.shape for name, tensor in stored.weights.items()}
        own = found.parts[part].weights
        matched = own if own.keys() != shapes.keys() else match_weights(shapes, own, where=part)
        assert len(matched) == len(shapes)
        assert all(np.array_equal(matched[name].read(), stored.weights[name].read()) for name in shapes if name in matched)


@pytest.mark.parametrize(
    ("key", "usual"), [("beta_schedule", "linear"), ("beta_start", 0.0001), ("beta_end", 0.02), ("prediction_type", "epsilon")]
)
def test_a_missing_field_of_the_scheduler_has_the_default_of_its_class(
    key: str, usual: Any, sd2_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copied(sd2_checkpoint, tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, **{key: ...})
    without = read_checkpoint(folder, name="x")
    edit(path, **{key: usual})
    written = read_checkpoint(folder, name="x")
    assert without.model == written.model
    tables = [compile_table(checkpoint.scheduler, steps=5) for checkpoint in (without, written)]
    assert np.array_equal(*(table.t for table in tables))
    assert np.array_equal(*(table.start for table in tables))


@pytest.mark.parametrize("size", [[8, 16], [16, 8]])
def test_a_size_of_two_sides_is_height_and_width(size: list[int], sd1_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(sd1_checkpoint, tmp_path)
    edit(folder / "unet" / "config.json", sample_size=size)
    assert read_checkpoint(folder, name="x").model.default_size == (size[0] * 8, size[1] * 8)


def test_a_snapshot_of_the_hub_s_cache_is_read_through_its_links(sd1_checkpoint: Path, tmp_path: Path) -> None:
    """models--owner--name/snapshots/REVISION has links into blobs, which are named by their hashes."""
    blobs, snapshot = tmp_path / "models--a--tiny" / "blobs", tmp_path / "models--a--tiny" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in sd1_checkpoint.rglob("*") if path.is_file())):
        place = snapshot / path.relative_to(sd1_checkpoint)
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = Path(shutil.copy(path, blobs / f"{number:064x}"))
        place.symlink_to(os.path.relpath(blob, place.parent))
    usual, found = (read_checkpoint(folder, name="x") for folder in (sd1_checkpoint, snapshot))
    assert (found.model, keys(found)) == (usual.model, keys(usual))
    assert {name: tokenizer.files for name, tokenizer in found.tokenizers.items()} == {
        name: tokenizer.files for name, tokenizer in usual.tokenizers.items()
    }


@pytest.mark.parametrize(
    ("pipeline", "named"),
    [
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("KandinskyV22Pipeline", "Kandinsky"),
        ("StableUnCLIPPipeline", "unCLIP"),
        ("StableVideoDiffusionPipeline", "video"),
        ("StableDiffusionLatentUpscalePipeline", "upscal"),
        ("PixArtAlphaPipeline", "PixArt"),
        ("AnotherPipeline", "is not one of StableDiffusionPipeline, "),
    ],
)
def test_another_family_is_refused_by_its_name(pipeline: str, named: str, sd1_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(sd1_checkpoint, tmp_path)
    edit(folder / "model_index.json", _class_name=pipeline)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, name="x")
    [fault] = caught.value.faults
    assert named in fault
    assert pipeline in fault
