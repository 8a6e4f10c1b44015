"""What is fuzzed of the files that users add to a model: LoRAs and embeddings. Loads NumPy only."""

from __future__ import annotations

import json
import random
from pathlib import Path

import loras
import numpy as np
from fuzz_runtime import refused
from fuzzing import Once, damaged, mutated

from sdruntime.adapters.describe import description
from sdruntime.adapters.embedding import read_embedding
from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.sets import AdapterSet, fit
from sdruntime.system import files

files._TICK = 0  # no wait for the clock of each new file: nothing else writes it

_LAYER = "text_model.encoder.layers.0.self_attn"
SHAPES = {
    "text_encoder": {f"{_LAYER}.{name}.weight": (4, 4) for name in ("q_proj", "out_proj")},
    "unet": {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (4, 6), "conv_in.weight": (4, 4, 3, 3)},
}


def _pieces(data: bytes) -> tuple[dict[str, object], bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def _spoilt(data: bytes, chance: random.Random) -> bytes:
    """A file with another header, or with damaged bytes."""
    if chance.random() < 0.3:
        return damaged(data, chance)
    header, values = _pieces(data)
    text = json.dumps(mutated(header, chance, most=2)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + values


def lora(folder: Path) -> Once:
    """A LoRA of one of the formats, with a mutated header or damaged bytes: described, fitted and merged."""
    tensors = [
        (loras.kohya(SHAPES, wanted=loras.everything), {}),
        (loras.peft(SHAPES), loras.peft_metadata(SHAPES, 4, 2.0, use_rslora=True, alpha_pattern={"to_q": 3})),
        (loras.loha(SHAPES, wanted=loras.everything), {}),
        (loras.full(SHAPES), {"ss_tag_frequency": '{"a": {"cat": 3}}', "ss_base_model_version": "sd_v1"}),
    ]
    seeds = [loras.write(folder / f"{k}.safetensors", *each).read_bytes() for k, each in enumerate(tensors)]
    place = folder / "spoilt.safetensors"
    weights = {part: {name: np.ones(shape, np.float32) for name, shape in own.items()} for part, own in SHAPES.items()}

    def use() -> None:
        file = AdapterFile.open(place)
        json.dumps(description(file))
        adapters = AdapterSet.of([(fit(file, SHAPES, "model"), 0.8, 0.5)])
        for part, own in weights.items():
            for name in adapters.weights(part):
                assert adapters.merged(part, name, own[name]).shape == own[name].shape

    def once(chance: random.Random) -> bool:
        place.write_bytes(_spoilt(chance.choice(seeds), chance))
        return refused(use)

    return once


def embedding(folder: Path) -> Once:
    """An embedding of one of the formats, with a mutated header or damaged bytes."""
    vectors = np.ones((2, 4), np.float32)
    files = [{"<cat>": vectors}, {"emb_params": vectors}, {"clip_l": vectors, "clip_g": np.ones((2, 6), np.float32)}]
    seeds = [loras.write(folder / f"{k}.safetensors", tensors).read_bytes() for k, tensors in enumerate(files)]
    place = folder / "spoilt.safetensors"

    def once(chance: random.Random) -> bool:
        k = chance.randrange(3)
        widths = {"text_encoder": 4, "text_encoder_2": 6} if k == 2 else {"text_encoder": 4}
        place.write_bytes(_spoilt(seeds[k], chance))
        return refused(lambda: read_embedding(place, widths))

    return once
