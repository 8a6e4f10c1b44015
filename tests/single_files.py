"""Checkpoints of diffusers written in the key layout of the original code, as one file: the reverse of what sdexport reads.

Written from diffusers' side, block by block, so that it shares nothing with `sdexport.checkpoint.original`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Weights = dict[str, Any]  # name -> torch.Tensor
UNET, VAE = "model.diffusion_model.", "first_stage_model."
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
_RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0"}
_UNET |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_UNET |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
_CLIP_LAYER |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def write_single_file(folder: Path, file: Path, *, metadata: Mapping[str, str] | None = None, drop: str = "\0") -> Path:
    """Write the checkpoint in `folder` to `file`, without the tensors whose names begin with `drop`."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().clone() for name, tensor in single_file_tensors(folder).items()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(drop)}, file, metadata=dict(metadata or {})
    )
    return file


def single_file_tensors(folder: Path, load: Callable[[Path], Weights] | None = None) -> Weights:
    """Return the checkpoint's tensors by their original names. `load`: what reads the weights of a network's folder."""
    load = load or _loaded
    unet, vae = load(folder / "unet"), load(folder / "vae")
    config = json.loads((folder / "unet" / "config.json").read_text())
    tensors = {UNET + name: tensor for name, tensor in _unet(unet, len(config["block_out_channels"])).items()}
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    tensors |= {VAE + name: tensor for name, tensor in _vae(vae, levels).items()}
    if not (folder / "text_encoder").is_dir():
        tensors |= _open_clip(load(folder / "text_encoder_2"), "conditioner.embedders.0.model.")
    elif (folder / "text_encoder_2").is_dir():
        tensors |= _clip(load(folder / "text_encoder"), "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(load(folder / "text_encoder_2"), "conditioner.embedders.1.model.")
    elif json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_act"] == "gelu":
        tensors |= _open_clip(load(folder / "text_encoder"), "cond_stage_model.model.", more=1)
    else:
        tensors |= _clip(load(folder / "text_encoder"), "cond_stage_model.transformer.")
    return tensors


def write_diffusers_file(folder: Path, file: Path, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the checkpoint in `folder` to `file` under the names of diffusers, each behind that of its folder."""
    from safetensors.torch import save_file

    parts = [path.name for path in folder.iterdir() if list(path.glob("*.safetensors"))]
    tensors = {f"{part}.{name}": tensor for part in parts for name, tensor in _loaded(folder / part).items()}
    save_file(tensors, file, metadata=dict(metadata or {}))
    return file


def _loaded(folder: Path) -> Weights:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


def _moved(weights: Weights, modules: Mapping[str, str]) -> Weights:
    """Return the weights by the names of their modules; each must be in one of them."""
    moved = {}
    for name, tensor in weights.items():
        module = max((module for module in modules if name.startswith(f"{module}.")), key=len)
        moved[modules[module] + name[len(module) :]] = tensor
    return moved


def _resnet(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{place}" for part, place in _RESNET.items()}


def _unet(weights: Weights, blocks: int) -> Weights:
    modules, number = dict(_UNET) | _down(weights, blocks), 0
    for block in range(blocks):
        old = f"up_blocks.{block}"
        for layer in _layers(weights, old):
            modules |= _resnet(f"{old}.resnets.{layer}", f"output_blocks.{number}.0")
            modules[f"{old}.attentions.{layer}"] = f"output_blocks.{number}.1"
            last = number
            number += 1
        place = 2 if _has(weights, f"{old}.attentions") else 1
        modules[f"{old}.upsamplers.0.conv"] = f"output_blocks.{last}.{place}.conv"
    return _moved(weights, modules)


def _layers(weights: Weights, block: str) -> list[int]:
    return sorted({int(name.split(".")[3]) for name in weights if name.startswith(f"{block}.resnets.")})


def _has(weights: Weights, module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in weights)


def _down(weights: Weights, blocks: int) -> dict[str, str]:
    """Return the modules of the way down and of the middle."""
    modules, number = {}, 1
    for block in range(blocks):
        old = f"down_blocks.{block}"
        for layer in _layers(weights, old):
            modules |= _resnet(f"{old}.resnets.{layer}", f"input_blocks.{number}.0")
            modules[f"{old}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if _has(weights, f"{old}.downsamplers"):
            modules[f"{old}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    modules |= _resnet("mid_block.resnets.0", "middle_block.0") | {"mid_block.attentions.0": "middle_block.1"}
    return modules | _resnet("mid_block.resnets.1", "middle_block.2")


def controlnet_tensors(folder: Path) -> Weights:
    """Return the tensors of a ControlNet's folder by their original names, without the prefix."""
    weights, config = _loaded(folder), json.loads((folder / "config.json").read_text())
    modules = _UNET | _down(weights, len(config["block_out_channels"])) | {"controlnet_mid_block": "middle_block_out.0"}
    hint, convolutions = "controlnet_cond_embedding", 2 * len(config["conditioning_embedding_out_channels"])
    modules |= {f"{hint}.conv_in": "input_hint_block.0", f"{hint}.conv_out": f"input_hint_block.{2 * convolutions - 2}"}
    modules |= {f"{hint}.blocks.{k}": f"input_hint_block.{2 * k + 2}" for k in range(convolutions - 2)}
    return _moved(weights, modules | {f"controlnet_down_blocks.{k}": f"zero_convs.{k}.0" for k in range(16)})


def _vae(weights: Weights, levels: int) -> Weights:
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, top in (("encoder", "down"), ("decoder", "up")):
        modules |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for block in range(levels):
            level = block if top == "down" else levels - 1 - block
            old, new = f"{side}.{top}_blocks.{block}", f"{side}.{top}.{level}"
            for layer in range(10):
                modules[f"{old}.resnets.{layer}"] = f"{new}.block.{layer}"
                modules[f"{old}.resnets.{layer}.conv_shortcut"] = f"{new}.block.{layer}.nin_shortcut"
            modules[f"{old}.{top}samplers.0.conv"] = f"{new}.{top}sample.conv"
        modules |= {f"{side}.mid_block.resnets.{k}": f"{side}.mid.block_{k + 1}" for k in (0, 1)}
        for part, place in _VAE_ATTENTION.items():
            modules[f"{side}.mid_block.attentions.0.{part}"] = f"{side}.mid.attn_1.{place}"
    moved = _moved(weights, modules)
    return {
        name: tensor[..., None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor for name, tensor in moved.items()
    }


def _clip(weights: Weights, prefix: str) -> Weights:
    import torch

    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {prefix + name: tensor for name, tensor in (named | positions).items()}


def _open_clip(weights: Weights, prefix: str, *, more: int = 0) -> Weights:
    """`more`: layers beyond those that diffusers keeps."""
    import torch

    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))
    for layer in range(layers, layers + more):
        last = f"encoder.layers.{layers - 1}."
        weights |= {
            f"encoder.layers.{layer}.{name.removeprefix(last)}": torch.zeros_like(tensor)
            for name, tensor in weights.items()
            if name.startswith(last)
        }
    made = {
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    width = made["token_embedding.weight"].shape[1]
    made["text_projection"] = weights["text_projection.weight"].T if "text_projection.weight" in weights else torch.eye(width)
    for layer in range(layers + more):
        old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            made |= {f"{new}.{there}.{kind}": weights[f"{old}.{here}.{kind}"] for here, there in _CLIP_LAYER.items()}
            made[f"{new}.attn.in_proj_{kind}"] = torch.cat([weights[f"{old}.self_attn.{each}_proj.{kind}"] for each in "qkv"])
    return {prefix + name: tensor for name, tensor in made.items()}


def write_standard(folder: Path, kind: str) -> Path:
    """Write a diffusers folder that follows the rules which the weights of a single file cannot say: 64 channels a head (8 heads
    in Stable Diffusion 1), 32 groups, the whole vocabulary of CLIP."""
    import tiny
    import torch

    from sdexport.checkpoint.original.tokenizer import clip_tokenizer

    torch.manual_seed(5)
    if kind == "refiner":
        tiny.write_task_checkpoint(folder, "sdxl", "refining")
    else:
        tiny.write_checkpoint(folder, kind)  # type: ignore[arg-type]
    for name, module in _standard_modules(kind).items():
        tiny._liven(module)
        for old in (folder / name).iterdir():
            old.unlink()
        module.half().save_pretrained(folder / name)
    pads = {"tokenizer": "!" if kind.startswith("sd2") else "<|endoftext|>", "tokenizer_2": "!"}
    for name in pads:
        if not (folder / name).is_dir():
            continue
        for old in (folder / name).iterdir():
            old.unlink()
        for file, data in clip_tokenizer(pad=pads[name]).items():
            (folder / name / file).write_bytes(data)
    return folder


def _standard_modules(kind: str) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(act: str, width: int, layers: int) -> Any:
        sizes = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": width // 64,
            "projection_dim": width,
        }
        return CLIPTextConfig(vocab_size=49408, num_hidden_layers=layers, hidden_act=act, **sizes)

    channels = (32, 64) if kind == "sd1" else (64, 128)
    unet: dict[str, Any] = {
        "sample_size": {"sd1": 64, "sd2": 64, "sd2_v": 96, "sdxl": 128, "refiner": 128}[kind],
        "block_out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": 8 if kind == "sd1" else (1, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": kind != "sd1",
    }
    encoders: dict[str, Any] = {"text_encoder": CLIPTextModel(text("gelu" if kind.startswith("sd2") else "quick_gelu", 64, 2))}
    if kind == "refiner":
        encoders = {"text_encoder_2": CLIPTextModelWithProjection(text("gelu", 128, 3))}
        unet |= {
            "block_out_channels": (64, 64, 128, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (1, 1, 2, 2),
            "transformer_layers_per_block": 2,
            "cross_attention_dim": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 128 + 5 * 8,
        }
    elif kind == "sdxl":
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(text("gelu", 128, 3))
        unet |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 3),
            "cross_attention_dim": 64 + 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 128 + 6 * 8,
        }
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.13025 if kind in ("sdxl", "refiner") else 0.18215,
    )
    return encoders | {"unet": UNet2DConditionModel(**unet), "vae": vae}
