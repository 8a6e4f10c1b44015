"""Create the untrained components of the shapes checkpoint, and write the trained ones to a folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import draw
import torch
import vocabulary
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCALING = 0.18215
WIDTH = 128  # of the text encoder


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=draw.SIZE,
        scaling_factor=SCALING,
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # despite its name, the number of heads
        norm_num_groups=16,
    )


def text_encoder(vocab: dict[str, int]) -> CLIPTextModel:
    end = vocab[vocabulary.END]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=vocabulary.LENGTH,
            bos_token_id=vocab[vocabulary.START],
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def scheduler() -> DDIMScheduler:
    """Return DDIM with SD 1's settings. SD 1's PNDM diverges on this small model at 20 steps and strong guidance."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="epsilon",
    )


def write(vae: AutoencoderKL, average: torch.nn.ModuleDict, out: Path) -> None:
    """Write the checkpoint in diffusers' layout, fp16 safetensors, to `out`, which already has the tokenizer folder."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(average["text"]).half(),
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet=copy.deepcopy(average["unet"]).half(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(part, safe_serialization=True)
    shutil.rmtree(part / "tokenizer")
    shutil.copytree(out / "tokenizer", part / "tokenizer")
    for path in part.rglob("*"):
        if path.is_file():
            place = out / path.relative_to(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    shutil.rmtree(part)
