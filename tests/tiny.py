"""Tiny random checkpoints in the layout of real ones, written with diffusers' own classes.

Weights are random and generated once from a fixed seed; the decoder's last layer is scaled so that images are not flat.
What real checkpoints do differently from each other is kept: SD1's quick-GELU text encoder and end-token padding, SD2's plain
GELU, "!" padding and 23 layers (the penultimate of OpenCLIP's 24 is its last), SDXL's two encoders, pooled text and time ids.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

Kind = Literal["sd1", "sd2", "sd2_v", "sdxl"]
TOKENS = 77
_ENDS = ("<|startoftext|>", "<|endoftext|>")
# as SD1's files are: from before transformers 5 dropped a prefix, and before diffusers named the VAE's attention like the others
_OLD_TEXT = {r"^(?!text_model\.)": "text_model."}
_OLD_VAE = {r"\.to_q\.": ".query.", r"\.to_k\.": ".key.", r"\.to_v\.": ".value.", r"\.to_out\.0\.": ".proj_attn."}
_MERGES = "t h,th e</w>,a n,an d</w>,c a,ca t</w>,r e,re d</w>,i n</w>,o f</w>"


def write_checkpoint(folder: Path, kind: Kind) -> Path:
    """A diffusers folder of that kind; a few hundred kilobytes."""
    import torch

    torch.manual_seed({"sd1": 1, "sd2": 2, "sd2_v": 3, "sdxl": 4}[kind])
    pipeline = _xl_pipeline() if kind == "sdxl" else _pipeline(kind)
    for module in pipeline.values():
        _liven(module)
        module.eval()
    folder.mkdir(parents=True)
    for name, module in pipeline.items():
        module.save_pretrained(folder / name)
    if kind == "sd1":
        _rename(folder / "text_encoder" / "model.safetensors", _OLD_TEXT)
        _rename(folder / "vae" / "diffusion_pytorch_model.safetensors", _OLD_VAE)
    pads = {"sd1": (_ENDS[1],), "sd2": ("!",), "sd2_v": ("!",), "sdxl": (_ENDS[1], "!")}[kind]
    names = ("tokenizer", "tokenizer_2")[: len(pads)]
    for name, pad in zip(names, pads, strict=True):
        write_tokenizer(folder / name, pad)
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(kind))
    _write_json(folder / "model_index.json", _index(kind))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\ntags: [tiny]\n---\nRandom weights.\n")
    return folder


# task -> what is different in its UNet's config, and the pipeline that a checkpoint of it names
TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "inpainting": ({"in_channels": 9}, "{}InpaintPipeline"),
    "instruct_pix2pix": ({"in_channels": 8}, "{}InstructPix2PixPipeline"),
    "depth": ({"in_channels": 5}, "{}Depth2ImgPipeline"),
    "upscaling": ({"in_channels": 7, "num_class_embeds": 1000}, "{}UpscalePipeline"),
    "lcm": ({"time_cond_proj_dim": 32}, "LatentConsistencyModelPipeline"),
    "refining": (
        {
            "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 32 + 5 * 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "transformer_layers_per_block": 2,
        },
        "StableDiffusionXLImg2ImgPipeline",
    ),
}
# UNets that were cut out of SDXL's: what their config has in place of SDXL's, with as many layers but fewer channels
_THREE_LEVELS = {"block_out_channels": (32, 32, 64), "attention_head_dim": (2, 2, 4)}
_CROSS_DOWN, _CROSS_UP = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
_LEVELS = _THREE_LEVELS | {"down_block_types": ("DownBlock2D", *_CROSS_DOWN), "up_block_types": (*_CROSS_UP, "UpBlock2D")}
PRUNED: dict[str, dict[str, Any]] = {
    # the middle has one residual block and no attention; each transformer of the way up has a depth of its own
    "SSD-1B": _LEVELS
    | {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "Segmind-Vega": _LEVELS
    | {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 1, 2],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
    "Koala-700M": _LEVELS | {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]},
    "Koala-1B": _LEVELS | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
}
ONE_KIND: dict[str, Kind] = {"refining": "sdxl", "upscaling": "sd2_v"}  # tasks that models of one kind have


def write_task_checkpoint(folder: Path, kind: Kind, task: str) -> Path:
    """The checkpoint of that kind with a UNet that was made for a task."""
    import torch
    from diffusers import UNet2DConditionModel

    write_checkpoint(folder, kind)
    changes, named = TASKS[task]
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(len(task))
    unet = UNet2DConditionModel.from_config(config | changes)
    _liven(unet)
    unet.eval().save_pretrained(folder / "unet")
    index, scheduler = _index(kind), _scheduler(kind)
    if task == "lcm":
        scheduler["_class_name"] = "LCMScheduler"
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["_class_name"] = named.format(index["_class_name"].removesuffix("Pipeline"))
    if task == "depth":
        index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
    if task == "upscaling":
        vae = folder / "vae" / "config.json"
        _write_json(vae, json.loads(vae.read_text()) | {"scaling_factor": 0.08333})
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
        _write_json(folder / "low_res_scheduler" / "scheduler_config.json", {"_class_name": "DDPMScheduler"} | betas)
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    if task == "refining":
        for part in ("text_encoder", "tokenizer"):
            shutil.rmtree(folder / part)
            index[part] = [None, None]
        index |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    _write_json(folder / "model_index.json", index)
    return folder


def write_tiny_vae(folder: Path) -> None:
    """Write an AutoencoderTiny (TAESD) of VAE factor 8 with few channels."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(9)
    widths = (16,) * 4
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    with torch.no_grad():
        vae.decoder.layers[-1].weight.mul_(4)
        vae.decoder.layers[-1].bias.fill_(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    vae.eval().save_pretrained(folder)


def write_controlnet(folder: Path, checkpoint: Path, *, seed: int = 11, **changes: Any) -> Path:
    """Write a ControlNet for the UNet of a checkpoint; its last convolutions, zeros at birth, are random."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(seed)
    levels = len(json.loads((checkpoint / "vae" / "config.json").read_text(encoding="utf-8"))["block_out_channels"])
    changes = {"conditioning_embedding_out_channels": (8, 8, 16, 16)[-levels:]} | changes
    model = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(checkpoint / "unet"), load_weights_from_unet=False)
    model = ControlNetModel.from_config(dict(model.config) | changes)
    _liven(model)
    with torch.no_grad():
        for block in (*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out):
            block.weight.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    return folder


def write_controlnet_union(folder: Path, checkpoint: Path, *, seed: int = 13) -> Path:
    """Write a ControlNet-Union of six types for the UNet of a checkpoint; what is zeros at birth is random."""
    import torch
    from diffusers import ControlNetUnionModel

    torch.manual_seed(seed)
    unet = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))
    levels = len(json.loads((checkpoint / "vae" / "config.json").read_text(encoding="utf-8"))["block_out_channels"])
    parameters = inspect.signature(ControlNetUnionModel.__init__).parameters
    config = {key: value for key, value in unet.items() if key in parameters}
    first = unet["block_out_channels"][0]
    config |= {"conditioning_embedding_out_channels": (8, 8, 16, 16)[-levels:], "num_trans_channel": first}
    config |= {"num_proj_channel": first, "num_trans_head": 4}
    model = ControlNetUnionModel(**config)
    _liven(model)
    with torch.no_grad():
        for block in (*model.controlnet_down_blocks, model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out):
            block.weight.normal_(std=0.3)
        model.spatial_ch_projs.weight.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    return folder


def write_t2i_adapter(folder: Path, checkpoint: Path, *, seed: int = 17, **changes: Any) -> Path:
    """Write a T2I-Adapter for the UNet of a checkpoint, of the type for its blocks."""
    import torch
    from diffusers import T2IAdapter

    torch.manual_seed(seed)
    unet = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))
    widths, kinds = unet["block_out_channels"], unet["down_block_types"]
    levels = len(json.loads((checkpoint / "vae" / "config.json").read_text(encoding="utf-8"))["block_out_channels"])
    factor = 2 ** (levels - 1)
    if "Attn" in kinds[0]:
        config = {"channels": widths, "downscale_factor": factor, "adapter_type": "full_adapter"}
    else:
        middle = widths[-1:] if len(widths) == 3 else []
        config = {"channels": [*widths, *middle], "downscale_factor": 2 * factor, "adapter_type": "full_adapter_xl"}
    adapter = T2IAdapter(**(config | {"num_res_blocks": 1} | changes))
    _liven(adapter)
    adapter.eval().save_pretrained(folder)
    return folder


def write_asymmetric_vae(folder: Path) -> None:
    """Write an AsymmetricAutoencoderKL of VAE factor 8, with a wider decoder."""
    import torch
    from diffusers import AsymmetricAutoencoderKL

    torch.manual_seed(10)
    vae = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        down_block_out_channels=(16,) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        up_block_out_channels=(24,) * 4,
        layers_per_up_block=2,
        norm_num_groups=8,
    )
    _liven(vae)
    shutil.rmtree(folder, ignore_errors=True)
    vae.eval().save_pretrained(folder)


def prune(folder: Path, model: str) -> None:
    """Replace the UNet of an SDXL checkpoint by one of that kind."""
    replace_unet(folder, **PRUNED[model])


def replace_unet(folder: Path, **changes: Any) -> None:
    """Replace the UNet of a checkpoint by one of other settings."""
    import torch
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(8)
    unet = UNet2DConditionModel.from_config(config | changes)
    _liven(unet)
    unet.eval().save_pretrained(folder / "unet")


def write_tokenizer(folder: Path, pad: str) -> None:
    """The classic files of a CLIP tokenizer: every byte, every byte at a word's end, and a few merges."""
    units = byte_units()
    merges = _MERGES.split(",")
    vocab = [*units, *(unit + "</w>" for unit in units), *(merge.replace(" ", "") for merge in merges), *_ENDS]
    special = {"bos_token": _ENDS[0], "eos_token": _ENDS[1], "unk_token": _ENDS[1], "pad_token": pad}
    _write_json(folder / "vocab.json", {unit: index for index, unit in enumerate(vocab)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, "add_prefix_space": False}
    _write_json(folder / "tokenizer_config.json", settings | special)


def byte_units() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's vocabularies, "!" first as there."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256 - len(plain))
    return [chr(code) for code in plain] + [chr(256 + index) for index in others]


def _text_config(hidden_act: str, layers: int, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    size = 512 + len(_MERGES.split(",")) + 2
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32}
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 1}
    return CLIPTextConfig(
        **(sizes | ids | more),
        num_hidden_layers=layers,
        hidden_act=hidden_act,
        max_position_embeddings=TOKENS,
    )


def _vae(levels: int, scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
    }
    return UNet2DConditionModel(**(options | more))


def _pipeline(kind: Kind) -> dict[str, Any]:
    from transformers import CLIPTextModel

    if kind == "sd1":
        return {"text_encoder": CLIPTextModel(_text_config("quick_gelu", 2)), "unet": _unet(), "vae": _vae(4, 0.18215)}
    # SD2 projects with matrices, and gives heads a fixed width
    unet = _unet(use_linear_projection=True, attention_head_dim=(2, 4))
    return {"text_encoder": CLIPTextModel(_text_config("gelu", 23)), "unet": unet, "vae": _vae(3, 0.18215)}


def _xl_pipeline() -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = _unet(
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    return {
        "text_encoder": CLIPTextModel(_text_config("quick_gelu", 2)),
        # the id 2 makes CLIP look for the highest token instead of its end token, and stands in the real file
        "text_encoder_2": CLIPTextModelWithProjection(_text_config("gelu", 3, eos_token_id=2)),
        "unet": unet,
        "vae": _vae(2, 0.13025),
    }


def _liven(module: Any) -> None:
    """Larger weights than at birth, so that every layer matters in the output."""
    import torch

    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 1 and name.endswith("weight"):
                weight.add_(0.2 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            elif name == "decoder.conv_out.weight":
                weight.mul_(1.5)


def _rename(path: Path, rules: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    renamed = {}
    for name, tensor in load_file(path).items():
        for rule, old in rules.items():
            name = re.sub(rule, old, name)
        renamed[name] = tensor
    save_file(renamed, path, metadata={"format": "pt"})


def _scheduler(kind: Kind) -> dict[str, Any]:
    common = {
        "_diffusers_version": "0.21.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "prediction_type": "v_prediction" if kind == "sd2_v" else "epsilon",
    }
    own = {
        "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
        "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
        "sd2_v": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
        "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "interpolation_type": "linear"},
    }
    return own[kind] | common


def _index(kind: Kind) -> dict[str, Any]:
    common: dict[str, Any] = {
        "_diffusers_version": "0.21.0",
        "scheduler": ["diffusers", _scheduler(kind)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if kind == "sdxl":
        second = {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
        return {"_class_name": "StableDiffusionXLPipeline"} | common | second
    none = [None, None]
    return (
        {"_class_name": "StableDiffusionPipeline"}
        | common
        | {
            "safety_checker": none,
            "feature_extractor": none,
            "requires_safety_checker": False,
        }
    )


def _write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":  # python tests/tiny.py FOLDER: what the recipe `tiny` is made of
    place = Path(sys.argv[1])
    shutil.rmtree(place.with_suffix(".half"), ignore_errors=True)
    write_checkpoint(place.with_suffix(".half"), "sd1").rename(place)
