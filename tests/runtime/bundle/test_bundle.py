from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from bundles import tree

from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import REVISION, load_manifest, save_manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import BundleError


def edit(folder: Path, **changes: object) -> None:
    """Change top-level keys of the manifest behind its back."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def faults(folder: Path) -> tuple[str, ...]:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert caught.value.exit_code == 5
    return caught.value.faults


def test_a_manifest_survives_being_written_and_read(bundle: Bundle) -> None:
    before = tree(bundle.folder)
    save_manifest(bundle.folder, bundle.manifest)
    assert load_manifest(bundle.folder) == bundle.manifest
    assert tree(bundle.folder) == before
    assert bundle.changed_files() == []


def test_a_changed_byte_is_found_where_the_file_is_read(bundle: Bundle) -> None:
    path = bundle.folder / "unet" / "model.onnx"
    path.write_bytes(b"unex")
    reopened = Bundle.open(bundle.folder)  # sizes agree
    with pytest.raises(BundleError, match=r"unet/model\.onnx: changed since it was written"):
        reopened.read("unet/model.onnx")
    assert [fault.split(":")[0] for fault in reopened.changed_files()] == ["unet/model.onnx"]


def test_every_fault_of_the_files_is_told_at_once(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle.folder
    (folder / "unet/model.onnx").unlink()
    (folder / "vae_decoder/model.onnx").write_bytes(b"longer than it was")
    (folder / "vae_encoder/config.json").unlink()
    (folder / "vae_encoder/config.json").symlink_to(tmp_path)
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    (folder / "tokenizer").symlink_to(tmp_path / "elsewhere")
    found = faults(folder)
    assert "unet/model.onnx: missing" in found
    assert "vae_decoder/model.onnx: 18 bytes, but the manifest says 11" in found
    assert "vae_encoder/config.json: not a regular file" in found
    assert "tokenizer/vocab.json: tokenizer is a link" in found
    assert len(found) == 7


def test_a_newer_revision_is_refused_and_says_what_to_do(bundle: Bundle) -> None:
    edit(bundle.folder, revision=REVISION + 1)
    (fault,) = faults(bundle.folder)
    assert f"revision {REVISION + 1}, but this sdruntime reads revision {REVISION}" in fault
    assert "upgrade sdruntime" in fault


@pytest.mark.parametrize(
    "path", ["../outside.json", "/etc/passwd.json", "a/../../b.json", ".hidden.json", "a b.json", "a\\b.json", "c:x.json"]
)
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Bundle, path: str) -> None:
    document = json.loads((bundle.folder / "manifest.json").read_text())
    spec = next(iter(document["files"].values()))
    edit(bundle.folder, files=document["files"] | {path: spec})
    assert any("is not a plain name" in fault for fault in faults(bundle.folder))


def test_a_listed_file_of_unknown_kind_is_refused(bundle: Bundle) -> None:
    (bundle.folder / "unet" / "plugin.so").write_bytes(b"")
    document = json.loads((bundle.folder / "manifest.json").read_text())
    empty = {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    edit(bundle.folder, files=document["files"] | {"unet/plugin.so": empty})
    assert faults(bundle.folder)[0].startswith("unet/plugin.so: unknown file type")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "sdexport-bundle", "format": "x"}', "appears twice"),
        ('{"format": "sdexport-bundle", "revision": NaN}', "NaN"),
        ('{"format": "other"}', "not the manifest of a bundle"),
        ("[]", "not the manifest of a bundle"),
        ("", "not readable"),
        ("\xff", "not readable"),
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle: Bundle, text: str, message: str) -> None:
    (bundle.folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert message in faults(bundle.folder)[0]


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    assert "no such file: not a bundle" in faults(tmp_path)[0]


def test_faults_of_a_manifest_come_with_their_paths(bundle: Bundle) -> None:
    document = json.loads((bundle.folder / "manifest.json").read_text())
    document["components"]["unet"]["inputs"][0]["dtype"] = "float8"
    document["model"]["scaling_factor"] = "big"
    document["surprise"] = 1
    edit(bundle.folder, **document)
    assert {fault.split(":")[0] for fault in faults(bundle.folder)} == {
        "components.unet.inputs[0].dtype",
        "model.scaling_factor",
        "surprise",
    }


def test_an_engine_of_no_component_or_with_other_dimensions_is_refused(bundle: Bundle) -> None:
    *_, _ = build_engines(bundle.folder, BuildRequest(backend="fake", components=("unet",)))
    (engine,) = load_manifest(bundle.folder).engines
    with pytest.raises(ValueError, match="no component 'clip'"):
        dataclasses.replace(load_manifest(bundle.folder), engines=(dataclasses.replace(engine, component="clip"),))
    with pytest.raises(ValueError, match="ranges for batch, but unet has batch, height, width, sequence"):
        dataclasses.replace(
            load_manifest(bundle.folder), engines=(dataclasses.replace(engine, profiles=({"batch": (1, 1, 1)},)),)
        )
