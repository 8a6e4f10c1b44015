"""Embeddings: the formats of their files, and their names in prompts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import bundles
import numpy as np
import pytest
from bundles import with_fake_engines
from loras import write

from sdruntime.adapters.embedding import Embedding, read_embedding
from sdruntime.bundle.bundle import Bundle, write_bundle
from sdruntime.bundle.interface import TOKEN_VECTORS
from sdruntime.bundle.manifest import TensorSpec
from sdruntime.errors import SettingError, UnknownName, Unsupported
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.text.chunks import chunks
from sdruntime.pipeline.text.embeddings import Embeddings
from sdruntime.pipeline.text.prompt import tokenize
from sdruntime.pipeline.text.tokenizer import Tokenizer

WIDTH, ROWS = 8, 1000
SD1 = {"text_encoder": WIDTH}
XL = {"text_encoder": WIDTH, "text_encoder_2": 6}


def vectors(count: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("tensors", "widths", "name", "count"),
    [
        ({"<cat>": vectors(1)[0]}, SD1, "<cat>", 1),
        ({"<cat>": vectors(3)}, SD1, "<cat>", 3),
        ({"emb_params": vectors(2)}, SD1, "file", 2),
        ({"clip_l": vectors(2), "clip_g": vectors(2, 6)}, XL, "file", 2),
        ({"clip_l": vectors(2), "clip_g": vectors(2, 6)}, {"text_encoder_2": 6}, "file", 2),  # SDXL's refiner
    ],
)
def test_formats(tensors: Mapping[str, np.ndarray], widths: Mapping[str, int], name: str, count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "file.safetensors", tensors)
    embedding = read_embedding(path, widths)
    assert (embedding.name, embedding.count, set(embedding.vectors)) == (name, count, set(widths))
    first = embedding.vectors[next(iter(widths))]
    expected = tensors[next(key for key in tensors if len(widths) > 1 or "text_encoder" in widths or key == "clip_g")]
    assert np.array_equal(first, expected.reshape(first.shape))
    assert read_embedding(f"other={path}", widths).name == "other"


@pytest.mark.parametrize(
    ("tensors", "widths", "message"),
    [
        ({"<cat>": vectors(1, 6)}, SD1, "its vectors have 6 numbers, but the model's text_encoder takes 8"),
        ({"<cat>": vectors(1, 768)}, SD1, "it was made for Stable Diffusion 1"),
        ({"<cat>": vectors(1)}, XL, "the model is SDXL and needs clip_l and clip_g"),
        ({"clip_l": vectors(1), "clip_g": vectors(1, 6)}, SD1, "the model is not SDXL"),
        ({"clip_l": vectors(1)}, XL, "clip_g is missing"),
        ({"clip_l": vectors(1), "clip_g": vectors(2, 6)}, XL, "clip_l has 1, clip_g has 2 vectors"),
        ({"a": vectors(1), "b": vectors(1)}, SD1, "2 tensors"),
        ({"a b": vectors(1)}, SD1, "give one without spaces, as NAME=FILE"),
        ({"<cat>": vectors(300)}, SD1, "not 1 to 256 vectors"),
        ({"<cat>": np.full((1, WIDTH), np.nan, np.float32)}, SD1, "NaN or infinity"),
    ],
)
def test_files_that_do_not_fit(
    tensors: Mapping[str, np.ndarray], widths: Mapping[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        read_embedding(write(tmp_path / "file.safetensors", tensors), widths)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(SettingError, match=r"^embedding .*file\.pt: a pickle"):
        read_embedding(tmp_path / "file.pt", SD1)


def embedding(name: str, count: int) -> Embedding:
    return Embedding(name=name, vectors={"text_encoder": vectors(count)}, sha256="0" * 64)


@pytest.fixture
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.open(bundle.folder / "tokenizer")


KITTEN, STYLE = embedding("<kitten>", 3), embedding("Style", 1)
BOTH = Embeddings(items=(KITTEN, STYLE), sizes={"text_encoder": ROWS})


def test_a_name_stands_for_its_vectors(tokenizer: Tokenizer) -> None:
    added = BOTH.added_to(tokenizer, "text_encoder")
    plain = tokenizer.encode("a cat")
    assert added.encode("a cat") == plain
    kitten, style = [ROWS, ROWS + 1, ROWS + 2], [ROWS + 3]
    for text, ids in (
        ("<kitten>", kitten),
        ("<KITTEN>", kitten),
        ("embedding:<kitten>", kitten),
        ("style", style),
        ("embedding:Style", style),
        ("style <kitten>", style + kitten),
    ):
        assert added.encode(text) == ids, text
        assert added.encode(f"a cat {text}") == plain + ids, text
    assert added.encode("stylesheet") == tokenizer.encode("stylesheet")  # not in a longer word
    assert added.decode([ROWS, ROWS + 1, ROWS + 2, ROWS + 3]) == "<kitten> Style"


def test_the_vectors_are_fed_at_their_places(tokenizer: Tokenizer) -> None:
    added = BOTH.added_to(tokenizer, "text_encoder")
    ids = np.stack([tokenize(added, text).ids for text in ("a <kitten> style", "a cat")])
    feeds = BOTH.feeds("text_encoder", ids)
    table = np.concatenate([KITTEN.vectors["text_encoder"], STYLE.vectors["text_encoder"]])
    fed = feeds[TOKEN_VECTORS]
    assert fed.shape == (*ids.shape, WIDTH)
    assert np.array_equal(fed[ids >= ROWS], table)
    assert not fed[ids < ROWS].any()
    assert set(BOTH.feeds("text_encoder", ids[1:])) == {"input_ids"}


def test_vectors_of_one_embedding_stay_in_one_chunk(tokenizer: Tokenizer) -> None:
    added = BOTH.added_to(tokenizer, "text_encoder")
    parts = chunks(added, "a " * (tokenizer.length - 4) + "(<kitten>:1.2)")
    assert len(parts) == 2
    assert parts[1].ids[1:4].tolist() == [ROWS, ROWS + 1, ROWS + 2]
    assert parts[1].weights[1:4] == pytest.approx([1.2] * 3)


def test_an_unknown_name_gets_near_ones() -> None:
    BOTH.check("(embedding:style:1.2) embedding:<kitten>, and text")
    with pytest.raises(UnknownName, match="Style"):
        BOTH.check("embedding:styl")


def test_names_are_unique(tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingError, match="twice"):
        Embeddings(items=(STYLE, embedding("style", 1)), sizes={"text_encoder": ROWS})


@pytest.fixture
def taking_vectors(bundle: Bundle) -> Bundle:
    """A bundle whose text encoder takes vectors."""
    spec = bundle.manifest.components["text_encoder"]
    width = int(spec.outputs[0].shape[-1])
    tensor = TensorSpec(name=TOKEN_VECTORS, dtype="float32", shape=("batch", bundle.manifest.text_length, width))
    components = dict(bundle.manifest.components) | {"text_encoder": dataclasses.replace(spec, optional_inputs=(tensor,))}
    (bundle.folder / spec.config).write_text(json.dumps({"vocab_size": 60_000}))
    write_bundle(bundle.folder, model=bundle.manifest.model, precision="fp32", components=components, provenance={})
    return with_fake_engines(Bundle.open(bundle.folder))


def test_a_pipeline_reads_them_and_the_image_says_so(taking_vectors: Bundle, tmp_path: Path) -> None:
    width = int(taking_vectors.manifest.components["text_encoder"].optional_inputs[0].shape[-1])
    path = write(tmp_path / "style.safetensors", {"emb_params": vectors(2, width)})
    with Pipeline.open(taking_vectors, backend="fake", embeddings=[path]) as pipe:
        with_style = pipe("a cat, style", steps=1, seed=1).images[0]
        without = pipe("a cat", steps=1, seed=1).images[0]
        with pytest.raises(UnknownName, match="embedding"):
            pipe("embedding:other", steps=1)
    assert f'TI hashes: "style: {read_embedding(path, {"text_encoder": width}).sha256[:12]}"' in with_style.text()["parameters"]
    assert "TI hashes" not in without.text()["parameters"]


def test_a_bundle_of_before_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", {"emb_params": vectors(2)})
    with pytest.raises(Unsupported, match="export it again"):
        Pipeline.open(bundles.with_fake_engines(bundle), backend="fake", embeddings=[path])
