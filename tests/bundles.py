"""A bundle made by hand: sound in every file and hash, with nothing in its ONNX. For tests of what surrounds a model."""

from __future__ import annotations

import json
from pathlib import Path

from sdruntime.bundle.bundle import Bundle, write_bundle
from sdruntime.bundle.manifest import ComponentSpec, TensorSpec
from sdruntime.bundle.model import ModelSpec
from sdruntime.engines.building import BuildRequest, build_engines

CELLS = ("batch", 4, "height", "width")
TENSORS: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
    "text_encoder": (
        (TensorSpec(name="input_ids", dtype="int32", shape=("batch", 77)),),
        (TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", 77, 8)),),
    ),
    "unet": (
        (
            TensorSpec(name="sample", dtype="float32", shape=CELLS),
            TensorSpec(name="timestep", dtype="float32", shape=("batch",)),
            TensorSpec(name="encoder_hidden_states", dtype="float32", shape=("batch", "sequence", 8)),
        ),
        (TensorSpec(name="out_sample", dtype="float32", shape=CELLS),),
    ),
    "vae_decoder": (
        (TensorSpec(name="latent_sample", dtype="float32", shape=CELLS),),
        (TensorSpec(name="sample", dtype="float32", shape=("batch", 3, "image_height", "image_width")),),
    ),
    "vae_encoder": (
        (TensorSpec(name="sample", dtype="float32", shape=("batch", 3, "height", "width")),),
        tuple(
            TensorSpec(name=name, dtype="float32", shape=("batch", 4, "latent_height", "latent_width"))
            for name in ("latent_mean", "latent_logvar")
        ),
    ),
}
MODEL = ModelSpec(name="by-hand", family="sd1", prediction_type="epsilon", scaling_factor=0.18215)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def bytes_to_text() -> dict[int, str]:
    """The printable stand-ins of the 256 bytes, as in GPT-2's tokenizer."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + k) for k, byte in enumerate(others)}


def write_tokenizer(folder: Path) -> None:
    letters = [text for _, text in sorted(bytes_to_text().items())]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": "<|endoftext|>"}))
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make_bundle(folder: Path) -> Bundle:
    """Write a bundle with no engine into `folder`, which must not exist."""
    folder.mkdir()
    components = {}
    for name, (inputs, outputs) in TENSORS.items():
        (folder / name).mkdir()
        (folder / name / "model.onnx").write_bytes(name.encode())
        (folder / name / "config.json").write_text("{}")
        components[name] = ComponentSpec(
            files=(f"{name}/model.onnx",), config=f"{name}/config.json", inputs=inputs, outputs=outputs
        )
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    write_bundle(folder, model=MODEL, precision="fp32", components=components, provenance={"made": "by hand"})
    return Bundle.open(folder)


def with_fake_engines(bundle: Bundle) -> Bundle:
    """The bundle with a fake engine of each component, for every size."""
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake")):
        pass
    return Bundle.open(bundle.folder)
