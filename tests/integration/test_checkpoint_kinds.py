"""Checkpoints that are not like the usual ones, and the image of diffusers' own pipeline from each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from integration.reference import Reference, assert_same_picture

from sdruntime.pipeline.pipeline import Pipeline

LONG = "the red cat and the cat in the red of " * 9 + "the end"  # more than 77 tokens, fewer than 248
UNET = "diffusion_pytorch_model"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes, ensure_ascii=False), "utf-8")


def long_text(folder: Path, kind: tiny.Kind) -> Path:
    """Text encoders and tokenizers of 248 positions."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tiny.write_checkpoint(folder, kind)
    torch.manual_seed(5)
    for encoder in sorted(path for path in folder.iterdir() if path.name.startswith("text_encoder")):
        config = CLIPTextConfig.from_pretrained(encoder, max_position_embeddings=248)
        make = CLIPTextModelWithProjection if encoder.name.endswith("2") else CLIPTextModel
        make(config).save_pretrained(encoder)
        edit(folder / encoder.name.replace("text_encoder", "tokenizer") / "tokenizer_config.json", model_max_length=248)
    return folder


def inverted(folder: Path) -> Path:
    """Two concepts by textual inversion, one of three vectors, saved with the pipeline by diffusers itself."""
    import diffusers
    import torch

    base = tiny.write_checkpoint(folder.with_name("base"), "sd1")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base)
    torch.manual_seed(6)
    pipe.load_textual_inversion({"<cat>": 2 * torch.randn(3, 32)})
    pipe.load_textual_inversion({"<Sks>": 2 * torch.randn(32)})
    pipe.save_pretrained(folder)
    return folder


def pickled(folder: Path) -> Path:
    """The UNet in pickles, beside variants that hold other weights."""
    import torch
    from safetensors.torch import load_file

    tiny.write_checkpoint(folder, "sd1")
    whole = folder / "unet" / f"{UNET}.safetensors"
    weights = load_file(whole)
    whole.unlink()
    torch.save(weights, folder / "unet" / f"{UNET}.bin")
    others = {name: 1.1 * tensor for name, tensor in weights.items()}
    for variant in ("non_ema", "fp32", "ema"):
        torch.save(others, folder / "unet" / f"{UNET}.{variant}.bin")
    return folder


def sharded(folder: Path) -> Path:
    """The UNet in shards with an index, beside a whole file of other weights; the text encoder whole, beside other shards."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel

    tiny.write_checkpoint(folder, "sd1")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    whole = folder / "unet" / f"{UNET}.safetensors"
    others = {name: 1.1 * tensor for name, tensor in load_file(whole).items()}
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    save_file(others, whole, metadata={"format": "pt"})
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    for weight in text.parameters():
        weight.data.mul_(1.1)
    kept = (folder / "text_encoder" / "model.safetensors").read_bytes()
    text.save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    (folder / "text_encoder" / "model.safetensors").write_bytes(kept)
    assert len(list((folder / "unet").glob("*-of-*"))) > 1
    assert len(list((folder / "text_encoder").glob("*-of-*"))) > 1
    return folder


def eight_bits(folder: Path) -> Path:
    """The UNet's matrices in float8, of both kinds."""
    import torch
    from safetensors.torch import load_file, save_file

    tiny.write_checkpoint(folder, "sd1")
    path = folder / "unet" / f"{UNET}.safetensors"
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2)
    weights = {
        name: tensor.to(kinds[k % 2]) if tensor.ndim > 1 else tensor for k, (name, tensor) in enumerate(load_file(path).items())
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "248 tokens": (lambda folder: long_text(folder, "sd1"), LONG),
    "added tokens": (inverted, "the red <cat> and <sks> of <Sks>_1"),
    "pickles side by side": (pickled, "the red cat"),
    "shards beside whole files": (sharded, "the red cat"),
    "float8": (eight_bits, "the red cat"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_is_that_of_diffusers(
    kind: str, tmp_path: Path, export: Callable[..., Path], ready: Callable[[Path], Path]
) -> None:
    make, prompt = KINDS[kind]
    checkpoint = make(tmp_path / "checkpoint")
    compare(checkpoint, prompt, ready(export(checkpoint, allow_pickle=True)))


@pytest.mark.full
def test_both_encoders_of_sdxl_take_248_tokens(
    tmp_path: Path, export: Callable[..., Path], ready: Callable[[Path], Path]
) -> None:
    checkpoint = long_text(tmp_path / "checkpoint", "sdxl")
    compare(checkpoint, LONG, ready(export(checkpoint)))


def compare(checkpoint: Path, prompt: str, bundle: Path) -> None:
    reference = Reference(checkpoint)
    settings = {"num_inference_steps": 8, "guidance_scale": 7.5, "negative_prompt": "of the end"}
    theirs, theirs_float = reference.draw(prompt, scheduler="DDIMScheduler", changes={"clip_sample": False}, seed=3, **settings)
    with Pipeline.open(bundle) as pipe:
        stream = pipe.stream(prompt, negative="of the end", seed=3, sampler="ddim", steps=8, guidance=7.5)
        for _ in stream:
            pass
        (decoded,) = pipe.decode([job.run.x for job in stream.jobs])
        assert not stream.result.warnings  # nothing was cut
        assert_same_picture(stream.result.pixels[0], theirs, decoded, theirs_float)
