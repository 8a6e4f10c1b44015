from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdruntime import bundle as bundle_module
from sdruntime.build import Asked, build_engines
from sdruntime.bundle import Bundle, staging
from sdruntime.errors import BundleError, OutOfSpace
from sdruntime.manifest import REVISION, load_manifest, save_manifest


def edit(folder: Path, **changes: object) -> None:
    """Change top-level keys of the manifest behind its back."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def faults(folder: Path) -> tuple[str, ...]:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert caught.value.exit_code == 5
    return caught.value.faults


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    assert faults(bundle.folder)[0].startswith("unet/plugin.so: a file of unknown kind")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format": "sdexport-bundle", "format": "x"}', "stands twice"),
        ('{"format": "sdexport-bundle", "revision": NaN}', "NaN"),
        ('{"format": "other"}', "not the manifest of a bundle"),
        ("[]", "not the manifest of a bundle"),
        ("", "not readable"),
        ("\xff", "not readable"),
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle: Bundle, text: str, told: str) -> None:
    (bundle.folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert told in faults(bundle.folder)[0]


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
    *_, _ = build_engines(bundle.folder, Asked(backend="fake", components=("unet",)))
    (engine,) = load_manifest(bundle.folder).engines
    with pytest.raises(ValueError, match="no component 'clip'"):
        dataclasses.replace(load_manifest(bundle.folder), engines=(dataclasses.replace(engine, component="clip"),))
    with pytest.raises(ValueError, match="ranges for batch, but unet has batch, height, width, sequence"):
        dataclasses.replace(
            load_manifest(bundle.folder), engines=(dataclasses.replace(engine, profiles=({"batch": (1, 1, 1)},)),)
        )


def test_staging_takes_its_place_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "place"
    for content in ("first", "second"):
        with staging(place) as folder:
            (folder / "file").write_text(content)
            assert not place.exists() or (place / "file").read_text() == "first"
        assert (place / "file").read_text() == content
    assert [path.name for path in place.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failed_staging_leaves_the_former_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    place = tmp_path / "place"
    with staging(place) as folder:
        (folder / "file").write_text("former")
    with pytest.raises(type(error)), staging(place) as folder:  # noqa: PT012
        (folder / "file").write_text("half")
        raise error
    assert tree(tmp_path) == {"place/file": b"former"}


def test_two_folders_are_swapped_where_the_system_has_no_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module.ctypes, "CDLL", lambda *_, **__: object())
    for content in ("first", "second"):
        with staging(tmp_path / "place") as folder:
            (folder / "file").write_text(content)
    assert tree(tmp_path) == {"place/file": b"second"}


def test_a_full_disk_is_told_with_its_free_bytes(tmp_path: Path) -> None:
    with pytest.raises(OutOfSpace, match=r"the disk is full \([\d,]+ bytes are free\)") as caught, staging(tmp_path / "place"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from sdruntime import bundle
from sdruntime.build import Asked, build_engines

number = int(sys.argv[2])
def stop_after(count, function):
    def counted(*args, **kwargs):
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted
# every step that touches the bundle counts down, and the process is killed at step `number`
counting = stop_after(number, lambda: None)
steps = [(bundle, "file_spec"), (bundle, "_sync"), (bundle, "save_manifest"), (Path, "replace"), (Path, "unlink"), (os, "fsync")]
for owner, name in steps:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, original=original, **kwargs: (counting(), original(*args, **kwargs))[1])
for _ in build_engines(sys.argv[1], Asked(backend="fake")):
    pass
"""


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5, 6, 7, 9, 12])
def test_adding_an_engine_killed_at_any_step_leaves_a_valid_bundle(bundle: Bundle, step: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(bundle.folder), str(step)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    found = Bundle.open(bundle.folder)
    assert found.changed_files() == []
    events = [event.state for event in build_engines(bundle.folder, Asked(backend="fake"))]
    assert events.count("done") + events.count("present") == 4
    after = Bundle.open(bundle.folder)
    assert {path.name for path in (bundle.folder / "engines").iterdir()} == {
        engine.files[0].split("/")[1] for engine in after.manifest.engines
    }
