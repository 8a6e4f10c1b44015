"""Write full-size checkpoints with random weights in diffusers' layout: the published shapes, and therefore the published speed.

Their images are noise; only the similarity between two engines is meaningful. Names and shapes of the weights are those of the
classes of diffusers and transformers, instantiated without memory for weights. One thread per core generates the random numbers.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export_full_size import CONFIGS, ROOT

MODELS = ("sd15", "sd-turbo", "sdxl")
_VOCABULARY = 49408
_UNETS: Mapping[str, dict[str, Any]] = {
    "sd15": CONFIGS["sd15"],
    "sd-turbo": CONFIGS["sd15"]
    | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": CONFIGS["sdxl"],
}


def _text(width: int, layers: int, heads: int, act: str, projection: int, end: int = 0) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"hidden_act": act, "projection_dim": projection} | ({"eos_token_id": end} if end else {})


_TEXTS: Mapping[str, dict[str, dict[str, Any]]] = {
    "sd15": {"text_encoder": _text(768, 12, 12, "quick_gelu", 768)},
    "sd-turbo": {"text_encoder": _text(1024, 23, 16, "gelu", 512)},
    "sdxl": {
        "text_encoder": _text(768, 12, 12, "quick_gelu", 768),
        "text_encoder_2": _text(1280, 32, 20, "gelu", 1280, end=2),
    },
}
_SCHEDULERS: Mapping[str, dict[str, Any]] = {
    "sd15": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    "sd-turbo": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 1},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1},
}
_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
_CLASSES = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_checkpoint(folder: Path, model: str, dtype: str = "F16", *, weights: bool = True) -> Path:
    """Write the checkpoint of one of MODELS; return its folder. `dtype`: "F16" or "F32".

    Raises ImportError without torch, diffusers and transformers.
    """
    xl, texts = model == "sdxl", _TEXTS[model]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in texts]
    folder.mkdir(parents=True)
    sys.path.insert(0, str(ROOT / "tests"))  # the tests' tokenizer: bytes and a few merges
    write_tokenizer = importlib.import_module("tiny").write_tokenizer
    pads = ["<|endoftext|>", "!"] if xl else ["<|endoftext|>" if model == "sd15" else "!"]
    for name, pad in zip(tokenizers, pads, strict=True):
        write_tokenizer(folder / name, pad)
    end = len(json.loads((folder / "tokenizer" / "vocab.json").read_text())) - 1
    for name, module in _networks(model, end):
        _write_network(folder / name, module, dtype if weights else None, transformers=name.startswith("text"))
    _write(folder / "scheduler" / "scheduler_config.json", _SCHEDULERS[model] | _BETAS)
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"}
    index |= {name: _CLASSES[name] for name in (*texts, *tokenizers, "unet", "vae")}
    index["scheduler"] = ["diffusers", _SCHEDULERS[model]["_class_name"]]
    index |= {"force_zeros_for_empty_prompt": True} if xl else {"safety_checker": [None, None], "feature_extractor": [None, None]}
    _write(folder / "model_index.json", index | ({} if xl else {"requires_safety_checker": False}))
    return folder


def write_single_file(folder: Path, model: str, dtype: str = "F16") -> Path:
    """Write the checkpoint of one of MODELS as a file in the original layout; return its path.

    Raises ImportError without torch, diffusers and transformers.
    """
    write_checkpoint(folder / "configs", model, weights=False)
    end = len(json.loads((folder / "configs" / "tokenizer" / "vocab.json").read_text())) - 1
    states = {name: module.state_dict() for name, module in _networks(model, end)}
    tensors = importlib.import_module("single_files").single_file_tensors(folder / "configs", lambda path: states[path.name])
    path = folder / f"{model}.safetensors"
    write_weights(path, {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}, dtype)
    return path


def _networks(model: str, end: int) -> Iterator[tuple[str, Any]]:
    """Yield (folder, module without memory for its weights)."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    common = {"vocab_size": _VOCABULARY, "bos_token_id": end - 1, "eos_token_id": end, "max_position_embeddings": 77}
    with torch.device("meta"):
        for name, sizes in _TEXTS[model].items():
            kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
            yield name, kind(CLIPTextConfig(**(common | sizes)))
        yield (
            "vae",
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                sample_size=1024 if model == "sdxl" else 512,
                force_upcast=False,  # half precision, in diffusers' SDXL pipeline too
                scaling_factor=0.13025 if model == "sdxl" else 0.18215,
            ),
        )
        yield "unet", UNet2DConditionModel.from_config(_UNETS[model])


def _write_network(folder: Path, module: Any, dtype: str | None, *, transformers: bool) -> None:
    folder.mkdir()
    module.config.to_json_file(str(folder / "config.json")) if transformers else module.save_config(str(folder))
    if transformers:  # `sdexport` checks the class named in the file
        path = folder / "config.json"
        _write(path, json.loads(path.read_text()) | {"architectures": [type(module).__name__]})
    if dtype is None:
        return
    name = "model" if transformers else "diffusion_pytorch_model"
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items() if not key.endswith("position_ids")}
    write_weights(folder / f"{name}.safetensors", shapes, dtype)


def write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> None:
    """Write a safetensors file of random weights that keep activations near one; every tensor differs."""
    kind = np.dtype({"F16": np.float16, "F32": np.float32}[dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + kind.itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    first = 8 + len(text)
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.ftruncate(file.fileno(), first + end)

        def fill(number: int, name: str) -> None:
            data = _numbers(number, name, shapes[name]).astype(kind).tobytes()
            os.pwrite(file.fileno(), data, first + header[name]["data_offsets"][0])

        for done in [pool.submit(fill, number, name) for number, name in enumerate(shapes)]:
            done.result()


def _numbers(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    numbers = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        numbers *= 0.02 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
    else:
        numbers = numbers * np.float32(0.1) + np.float32("norm" in name and name.endswith("weight"))
    return numbers


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":  # in its own process, which releases torch's memory
    write_checkpoint(Path(sys.argv[2]), *sys.argv[1:2], *sys.argv[3:])
