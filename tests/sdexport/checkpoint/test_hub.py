"""MODEL as a folder or a hub id, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from sdexport.build.export import model_name
from sdexport.checkpoint.hub import locate, needed_files
from sdexport.errors import CheckpointError, EnvironmentFault

COMMON = ["README.md", "model_index.json", "scheduler/scheduler_config.json"]
COMMON += [f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")]
COMMON += ["text_encoder/config.json", "unet/config.json", "vae/config.json"]
FULL = ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
HALF = [name.replace(".safetensors", ".fp16.safetensors") for name in FULL]
PICKLED = ["text_encoder/pytorch_model.bin", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"]
OTHER = [
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.onnx",
    ".gitattributes",
]
OTHER += [
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder/flax_model.msgpack",
    "feature_extractor/preprocessor_config.json",
]


@pytest.mark.parametrize(
    ("precision", "there", "weights"),
    [
        ("fp32", FULL + HALF + PICKLED, FULL),
        ("fp16", FULL + HALF + PICKLED, HALF),
        ("bf16", FULL + HALF, FULL),
        ("fp16", FULL, FULL),
        ("fp32", HALF, HALF),
        ("fp32", PICKLED, []),
    ],
)
def test_no_more_is_fetched_than_is_read(precision: Any, there: list[str], weights: list[str]) -> None:
    assert needed_files(COMMON + there + OTHER, precision, allow_pickle=False) == sorted(COMMON + weights)


def test_pickles_only_where_they_are_trusted_and_there_is_nothing_else() -> None:
    assert needed_files(COMMON + PICKLED, "fp32", allow_pickle=True) == sorted(COMMON + PICKLED)
    assert needed_files(COMMON + PICKLED + FULL, "fp32", allow_pickle=True) == sorted(COMMON + FULL)


def test_shards_come_with_their_index() -> None:
    stem = "unet/diffusion_pytorch_model"
    shards = [f"{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)] + [f"{stem}.safetensors.index.json"]
    halves = [f"{stem}.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)] + [f"{stem}.safetensors.index.fp16.json"]
    assert needed_files(shards + halves, "fp32", allow_pickle=False) == sorted(shards)
    assert needed_files(shards + halves, "fp16", allow_pickle=False) == sorted(halves)


def test_a_folder_is_where_it_is(tmp_path: Path) -> None:
    located = locate(str(tmp_path), precision="fp32", allow_pickle=False)
    assert (located.path, located.source, located.revision) == (tmp_path, tmp_path.name, None)


NOWHERE = ["no-such-folder", "a/b/c", "folder/model.safetensors", "own er/name", "/nowhere", "../x", ".cache/x"]


@pytest.mark.parametrize(
    ("folder", "card", "name"),
    [
        ("checkpoint", "", "checkpoint"),
        ("checkpoint", "---\nmodel_name: shapes\n---\n", "shapes"),
        ("checkpoint", "---\nmodel-index:\n- name: shapes\n  results: []\n---\n", "shapes"),
        ("checkpoint", "---\nmodel_name: [1]\n---\n", "checkpoint"),
        ("models--owner--sd-x/snapshots/0123abc", "---\nmodel_name: base\n---\n", "sd-x"),
    ],
)
def test_a_model_has_its_own_name(folder: str, card: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    (path / "README.md").write_text(card)
    assert model_name(locate(str(path), precision="fp32", allow_pickle=False)) == name


@pytest.mark.parametrize("model", NOWHERE)
def test_neither_folder_nor_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        locate(model, precision="fp32", allow_pickle=False)


def test_a_download_asks_for_exactly_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    names = [SimpleNamespace(rfilename=name) for name in COMMON + FULL + HALF + OTHER]

    def snapshot_download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    def model_info(self: object, model: str, *, revision: str | None) -> SimpleNamespace:
        if revision == "v9":
            raise huggingface_hub.errors.RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return SimpleNamespace(sha={None: "c0ffee", "v1": "decade"}[revision], siblings=names)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("owner/name", precision="fp16", allow_pickle=False, revision="v1").revision == asked["revision"] == "decade"
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        locate("owner/name", precision="fp16", allow_pickle=False, revision="v9")
    located = locate("owner/name", precision="fp16", allow_pickle=False)
    assert asked == {"model": "owner/name", "revision": "c0ffee", "allow_patterns": sorted(COMMON + HALF)}
    assert (located.source, located.revision) == ("owner/name", "c0ffee")


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def refuse(self: object, model: str, *, revision: str | None) -> None:
        raise ConnectionError("[Errno 113] no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **more: real(model, cache_dir=cache, **more))


def test_without_a_network_the_copy_in_the_cache_is_taken(
    sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--name"
    shutil.copytree(sd1_checkpoint, repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    offline(monkeypatch, tmp_path)
    located = locate("owner/name", precision="fp32", allow_pickle=False)
    assert (located.path, located.revision) == (repository / "snapshots" / "c0ffee", "c0ffee")
    with pytest.raises(EnvironmentFault, match="there is no local copy"):
        locate("owner/name", precision="fp32", allow_pickle=False, revision="v1")


def test_without_a_network_or_a_copy_both_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(EnvironmentFault, match=r"cannot be reached \(ConnectionError: no route to host\)"):
        locate("owner/name", precision="fp32", allow_pickle=False)
