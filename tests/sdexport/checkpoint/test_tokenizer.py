"""The classic tokenizer files, copied or made from tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from sdexport.checkpoint.tokenizer import NAMES, StoredTokenizer, read_tokenizer


def read(folder: Path) -> StoredTokenizer:
    return read_tokenizer({name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()})


def write_tokenizer(source: Path, folder: Path) -> None:
    read(source).write(folder, length=77)


def test_classic_files_are_copied_and_padding_is_kept(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "in", "!")
    write_tokenizer(tmp_path / "in", tmp_path / "out")
    for name in ("vocab.json", "merges.txt"):
        load = json.loads if name.endswith("json") else str
        assert load((tmp_path / "out" / name).read_text("utf-8")) == load((tmp_path / "in" / name).read_text("utf-8"))
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())["pad_token"] == "!"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 77


def as_one_file(source: Path, folder: Path, *, pairs: bool) -> None:
    """tokenizer.json alone, as newer libraries write it."""
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    ends = [{"id": vocabulary.pop(end), "content": end, "special": True} for end in ("<|startoftext|>", "<|endoftext|>")]
    merges = (source / "merges.txt").read_text().splitlines()[1:]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [merge.split(" ") for merge in merges] if pairs else merges}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": ends, "model": model}))


@pytest.mark.parametrize("pairs", [True, False])
def test_one_file_is_split_into_the_classic_ones(tmp_path: Path, pairs: bool) -> None:
    tiny.write_tokenizer(tmp_path / "in", "<|endoftext|>")
    as_one_file(tmp_path / "in", tmp_path / "one", pairs=pairs)
    write_tokenizer(tmp_path / "one", tmp_path / "out")
    assert (tmp_path / "out" / "merges.txt").read_text() == (tmp_path / "in" / "merges.txt").read_text()
    read = [json.loads((tmp_path / each / "vocab.json").read_text(encoding="utf-8")) for each in ("in", "out")]
    assert read[0] == read[1]


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ValueError, match="'Unigram', not BPE"):
        write_tokenizer(tmp_path / "in", tmp_path / "out")
