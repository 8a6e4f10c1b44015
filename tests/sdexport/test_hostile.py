"""Hostile checkpoints: whatever its files hold, a reader gives a whole answer or one error of its own, and soon.

Short here; `SDEXPORT_FUZZ=200000 pytest tests/sdexport/test_hostile.py` is the long run. Parts of it can run apart:
`SDEXPORT_FUZZ=50000 SDEXPORT_FUZZ_FROM=150000` is the last quarter.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import traceback
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hostile import changed, changed_bytes, changed_pickle, encoded
from once import once
from safetensors.numpy import save
from single_files import single_file_tensors, write_standard

from sdexport.checkpoint import checkpoint as checkpoint_module
from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.checkpoint.tokenizer import NAMES, read_tokenizer
from sdexport.checkpoint.weights.safetensors import merge_shards, read_header
from sdexport.errors import CheckpointError
from sdexport.families.components import components
from sdruntime.errors import SettingError

COUNT, FIRST = (int(os.environ.get(name, "0")) for name in ("SDEXPORT_FUZZ", "SDEXPORT_FUZZ_FROM"))


def rounds(short: int) -> list[Any]:
    return [pytest.param(short, id="short"), pytest.param(COUNT or 200_000, id="long", marks=pytest.mark.full)]


def refused_in(error: Exception, letters: int) -> bool:
    """False, of an error that a person can read."""
    assert len(str(error)) < letters
    return False


def outcomes(count: int, one: Callable[[random.Random], bool]) -> tuple[int, int]:
    """How many inputs were read and how many refused; `one` says which. What escapes is named once for each place."""
    read, escaped = 0, {}
    for seed in range(FIRST, FIRST + count):
        try:
            read += one(random.Random(seed))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            escaped.setdefault((type(error).__name__, place.name, place.lineno), (seed, str(error)[:200]))
    assert not escaped, "\n".join(f"{place}: seed {seed}: {text}" for place, (seed, text) in escaped.items())
    return read, count - read


@pytest.mark.parametrize("count", rounds(1000))
def test_headers(tmp_path: Path, count: int) -> None:
    tensors = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.bias": np.ones(5, np.float16),
        "c": np.ones((), np.float64),
    }
    whole = save(tensors, metadata={"format": "pt"})
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header["x.weight"] = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
    header["x.scale_weight"] = {"dtype": "F32", "shape": [], "data_offsets": [len(data) + 4, len(data) + 8]}
    data += b"\x38\x40\x44\x48" + np.float32(0.5).tobytes()
    path = tmp_path / "w.safetensors"

    def one(rng: random.Random) -> bool:
        if rng.random() < 0.2:
            text = json.dumps(header).encode()
            blob = changed_bytes(rng, len(text).to_bytes(8, "little") + text + data)
        else:
            text = encoded(rng, changed(rng, header))
            blob = len(text).to_bytes(8, "little") + text + data
        path.write_bytes(blob)
        try:
            found = merge_shards([(path, read_header(path))])
        except ValueError as error:
            return refused_in(error, 500)
        for tensor in found.values():
            if tensor.readable:
                assert tensor.read().shape == tensor.shape
        return True

    read, refused = outcomes(count, one)
    assert read > count / 100
    assert refused > count / 2


def tokenizer_files(base: Path) -> dict[str, Any]:
    """The documents of a tokenizer that has every layout at once."""
    tiny.write_tokenizer(base, "!")
    documents: dict[str, Any] = {}
    for name in NAMES:
        if (base / name).exists():
            text = (base / name).read_text("utf-8")
            documents[name] = text if name.endswith("txt") else json.loads(text)
    vocab, ends = documents["vocab.json"], ("<|startoftext|>", "<|endoftext|>")
    # a short vocabulary: what is fuzzed is the reading of it
    documents["vocab.json"] = vocab = {
        text: k for k, text in enumerate([*list(vocab)[:20], "t", "h", "th", "e</w>", "the</w>", *ends])
    }
    documents["merges.txt"] = "#version: 0.2\nt h\nth e</w>\n"
    fields = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False, "special": False}
    tokens = {"<cat>": 27, "<cat>_1": 28}
    documents["tokenizer_config.json"]["added_tokens_decoder"] = {
        str(k): {"content": text, **fields} for text, k in tokens.items()
    }
    documents["added_tokens.json"] = tokens
    model = {"type": "BPE", "vocab": vocab, "merges": ["t h", ["th", "e</w>"]]}
    documents["tokenizer.json"] = {"added_tokens": [{"id": 27, "content": "<cat>", **fields}], "model": model}
    return documents


@pytest.mark.parametrize("count", rounds(1000))
def test_tokenizers(tmp_path: Path, count: int) -> None:
    documents = tokenizer_files(tmp_path / "tokenizer")

    def one(rng: random.Random) -> bool:
        chosen = dict(documents)
        for name in rng.choice((("tokenizer.json",), ("added_tokens.json",), ("added_tokens.json", "tokenizer.json"), ())):
            del chosen[name]
        if rng.random() < 0.5 and "tokenizer_config.json" in chosen:
            config = dict(chosen["tokenizer_config.json"])
            del config["added_tokens_decoder"]
            chosen["tokenizer_config.json"] = config
        name = rng.choice(list(chosen))
        files = {
            each: document.encode() if isinstance(document, str) else json.dumps(document).encode()
            for each, document in chosen.items()
        }
        if name.endswith("txt"):
            files[name] = changed_bytes(rng, files[name])
        else:
            files[name] = encoded(rng, changed(rng, chosen[name]))
        try:
            stored = read_tokenizer(files)
        except ValueError as error:
            return refused_in(error, 3000)
        largest, _ = stored.largest
        for text in ("the <cat> the!", "<cat>_1<|endoftext|>é\ud800"):
            try:
                ids = stored.tokenizer.encode(stored.tokenizer.expand(text))
            except SettingError:
                assert "\ud800" in text
                continue
            assert all(0 <= number <= largest for number in ids)
            stored.tokenizer.decode(ids)
        return True

    read, refused = outcomes(count, one)
    assert read > count / 20
    assert refused > count / 5


@pytest.mark.parametrize("count", rounds(200))
def test_checkpoints(sd1_checkpoint: Path, sdxl_checkpoint: Path, tmp_path: Path, count: int) -> None:
    bases = [Path(shutil.copytree(source, tmp_path / source.name)) for source in (sd1_checkpoint, sdxl_checkpoint)]
    names = [
        sorted(path.relative_to(base).as_posix() for path in base.rglob("*.json") if path.name not in ("vocab.json",))
        for base in bases
    ]
    kept = [{name: (base / name).read_bytes() for name in each} for base, each in zip(bases, names, strict=True)]

    def one(rng: random.Random) -> bool:
        which = rng.randrange(len(bases))
        folder, name = bases[which], rng.choice(names[which])
        (folder / name).write_bytes(encoded(rng, changed(rng, json.loads(kept[which][name]))))
        try:
            table = components(read_checkpoint(folder, name="tiny"))
            for component in table:
                json.dumps(dict(component.config))
            return True
        except CheckpointError as error:
            return refused_in(error, 20_000)
        finally:
            (folder / name).write_bytes(kept[which][name])

    read, refused = outcomes(count, one)
    assert read > count / 20
    assert refused > count / 5


def without_data(tensors: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Write a safetensors file whose tensors are zeros, in a hole of the file."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * {"F16": 2, "F32": 4, "I64": 8, "F4": 1, "F8_E4M3": 1}[dtype] // (2 if dtype == "F4" else 1)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("count", rounds(150))
def test_single_files(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Their tokenizers are our own files, and are read once."""
    read_once = cache(lambda files: read_tokenizer(dict(files)))
    monkeypatch.setattr(checkpoint_module, "read_tokenizer", lambda files: read_once(tuple(files.items())))
    bases = []
    for kind in ("sd1", "sd2", "sdxl"):
        folder = once(tmp_path_factory, f"checkpoints/standard-{kind}", partial(write_standard, kind=kind))
        tensors = single_file_tensors(folder)
        bases.append({name: ("F16" if tensor.ndim else "F32", tuple(tensor.shape)) for name, tensor in tensors.items()})
    path = tmp_path / "model.safetensors"

    def one(rng: random.Random) -> bool:
        tensors = dict(rng.choice(bases))
        for name in rng.sample(sorted(tensors), rng.randint(1, 4)):
            dtype, shape = tensors[name]
            kind = rng.randrange(6)
            if kind == 0:
                del tensors[name]
            elif kind == 1:
                tensors[re.sub(r"\d+", rng.choice(["0", "1", "7", "12345", "99999999"]), name)] = tensors[name]
            elif kind == 2:
                tensors[name] = dtype, shape[::-1]
            elif kind == 3:
                tensors[name] = dtype, shape[rng.randrange(len(shape) + 1) :]
            elif kind == 4:
                tensors[name] = rng.choice(["F32", "I64", "F4", "F8_E4M3"]), shape
            else:
                tensors[name] = dtype, tuple(rng.choice([0, 1, side, 2 * side, 3]) for side in shape)
        if rng.random() < 0.1:
            start = rng.choice(sorted({name.rpartition(".")[0] for name in tensors}))
            tensors = {name: each for name, each in tensors.items() if not name.startswith(start)}
        without_data(tensors, path)
        try:
            components(read_checkpoint(path, name="tiny"))
            return True
        except CheckpointError as error:
            return refused_in(error, 20_000)

    read, refused = outcomes(count, one)
    assert read > count / 20
    assert refused > count / 5


def test_a_scheduler_that_names_nothing_is_refused(sd1_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": []}))
    with pytest.raises(CheckpointError, match=r"model_index\.json: scheduler"):
        read_checkpoint(folder, name="tiny")


def test_betas_that_leave_nothing_of_an_image_warn_of_nothing(sd1_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_start": 0.08, "beta_end": 0.091, "beta_schedule": "linear"}))
    with contextlib.suppress(CheckpointError):  # either is right; a warning is an error here
        read_checkpoint(folder, name="tiny")


@pytest.mark.parametrize("count", rounds(1000))
def test_pickles(tmp_path: Path, count: int) -> None:
    """Files of torch.save: changed as a whole, or with another pickle in an archive that is whole."""
    torch = pytest.importorskip("torch")
    from sdexport.checkpoint.weights.torch_file.file import read_torch_file

    path, canary = tmp_path / "w.bin", tmp_path / "canary"
    weights = {"a.weight": torch.ones(3, 2).T, "b": torch.nn.Parameter(torch.ones(3, dtype=torch.float16))}
    whole = {"state_dict": weights, "hparams": {"k": [1.5, (2, {3})], "path": canary}}
    archives, older = [], []
    for protocol in (2, 4):
        torch.save(whole, path, pickle_protocol=protocol)
        with zipfile.ZipFile(path) as file:
            archives.append({name: file.read(name) for name in file.namelist()})
        torch.save(weights, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        older.append(path.read_bytes())
    touch = b"cpathlib\nPosixPath.touch\n"

    def one(rng: random.Random) -> bool:
        if rng.random() < 0.3:
            path.write_bytes(changed_bytes(rng, rng.choice(older)))
        else:
            inside = rng.random() < 0.8
            with zipfile.ZipFile(path, "w") as file:
                for name, data in rng.choice(archives).items():
                    changes = inside and name.endswith("data.pkl")
                    file.writestr(name, changed_pickle(rng, data, touch) if changes else data)
            if not inside:
                path.write_bytes(changed_bytes(rng, path.read_bytes()))
        try:
            found = read_torch_file(path)
        except ValueError as error:
            return refused_in(error, 3000)
        assert all(tensor.read().shape == tensor.shape for tensor in found.values() if tensor.readable)
        return True

    read, refused = outcomes(count, one)
    assert read > count / 10
    assert refused > count / 3
    assert not canary.exists()
