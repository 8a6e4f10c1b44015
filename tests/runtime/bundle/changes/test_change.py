"""Engines in and out of a bundle that others use; what is removed on the way, and what is not."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, tree, with_fake_engines

from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle, opening
from sdruntime.bundle.changes.change import add_engine, building, remove_engine
from sdruntime.bundle.manifest import EngineSpec, load_manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import BundleError
from sdruntime.system.owner import Owner

UNET = BuildRequest(backend="fake", components=("unet",))
PROFILE = {"batch": (1, 1, 1), "height": (8, 8, 8), "width": (8, 8, 8), "sequence": (77, 77, 77)}


def build(folder: Path, request: BuildRequest = UNET) -> list[tuple[str, str]]:
    return [(event.state, event.engine) for event in build_engines(folder, request) if event.state in ("done", "present")]


def engine(name: str) -> EngineSpec:
    return EngineSpec(
        component="unet",
        backend="fake",
        version="1",
        target="cpu",
        precision="fp32",
        files=(f"engines/{name}.json",),
        profiles=(PROFILE,),
    )


def test_a_linked_folder_of_engines_is_refused_and_its_target_untouched(bundle: Bundle, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("unet-holiday.bin", "notes.txt"):
        (photos / name).write_text("mine")
    (bundle.folder / "engines").symlink_to(photos)
    with pytest.raises(BundleError, match="engines is a symbolic link"):
        build(bundle.folder)
    assert sorted(path.name for path in photos.iterdir()) == ["notes.txt", "unet-holiday.bin"]
    assert load_manifest(bundle.folder) == bundle.manifest


def test_files_that_are_not_named_like_engines_stay(bundle: Bundle) -> None:
    build(bundle.folder)
    engines = bundle.folder / "engines"
    (engines / "unet-fake1-of-a-killed-build.json").write_text("{}")
    (engines / "notes.txt").write_text("mine")
    (engines / "unet-deep.bin").mkdir()
    (engines / "unet-link.bin").symlink_to(bundle.folder / "manifest.json")
    build(bundle.folder)
    names = {path.name for path in engines.iterdir()}
    assert {"notes.txt", "unet-deep.bin", "unet-link.bin"} < names
    assert "unet-fake1-of-a-killed-build.json" not in names


def test_what_killed_builds_left_is_removed_and_what_living_ones_use_is_not(bundle: Bundle, dead_token: str) -> None:
    living = Owner.here().token()
    for token in (dead_token, living):
        (bundle.folder / f".building-{token}" / "unet-x").mkdir(parents=True)
        (bundle.folder / f".manifest.json.{token}").write_text("{")
    (bundle.folder / ".lock").mkdir()
    (bundle.folder / ".lock" / dead_token).touch()
    (bundle.folder / f".lock.{dead_token}").mkdir()
    (bundle.folder / ".manifest.json.999999999").write_text("as earlier versions named it")
    (bundle.folder / ".building-999999999-ab12_xyz").mkdir()
    (bundle.folder / ".manifest.json.swp").write_text("an editor's")
    build(bundle.folder)
    hidden = {path.name for path in bundle.folder.iterdir() if path.name.startswith(".")}
    assert hidden == {f".building-{living}", f".manifest.json.{living}", ".manifest.json.swp"}


def test_an_engine_file_that_a_living_build_has_placed_is_left_alone(bundle: Bundle) -> None:
    """Another builder's change comes between the file and the manifest."""
    with building(bundle, "unet-mine") as (name, scratch):
        (scratch / f"{name}.json").write_text("{}")

        def neighbour(made: Bundle) -> None:
            assert made.changed_files() == []
            build(bundle.folder)
            build(bundle.folder, BuildRequest(backend="fake", components=("vae_decoder",)))

        added = {f"engines/{name}.json": scratch / f"{name}.json"}
        after, was_added = add_engine(bundle, engine(name), added, check=neighbour)
    assert was_added
    assert {each.component for each in after.manifest.engines} == {"unet", "vae_decoder"}
    assert len(after.manifest.engines) == 3
    assert Bundle.open(bundle.folder).changed_files() == []
    assert after.manifest.generation == 3


def test_two_builds_of_one_name_get_two(bundle: Bundle) -> None:
    with building(bundle, "unet-mine") as (first, _), building(bundle, "unet-mine") as (second, _):
        assert (first, second) == ("unet-mine", "unet-mine-2")
    (bundle.folder / "engines").mkdir()
    (bundle.folder / "engines" / "unet-mine.txt.notes").write_text("mine")
    with building(bundle, "unet-mine") as (name, _):
        assert name == "unet-mine-2", "a file of that name is there"


def test_the_same_engine_built_twice_at_once_is_there_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = BACKENDS["fake"]

    def slow(bundle: Bundle, request: Any, folder: Path) -> Iterator[Any]:
        monkeypatch.setitem(BACKENDS, "fake", fake)
        assert [state for state, _ in build(bundle.folder)] == ["done"]  # the neighbour is quicker
        return (yield from fake.build_engine(bundle, request, folder))

    monkeypatch.setitem(BACKENDS, "fake", dataclasses.replace(fake, build_engine=slow))
    events = list(build_engines(bundle.folder, UNET))
    assert (events[-1].state, events[-1].notes) == ("present", ("another build added it meanwhile",))
    opened = Bundle.open(bundle.folder)
    assert len(opened.manifest.engines) == 1
    assert [path.name for path in (bundle.folder / "engines").iterdir()] == [Path(opened.manifest.engines[0].files[0]).name]


@pytest.mark.parametrize("when", ["building", "checking"])
def test_an_engine_of_a_bundle_that_was_exported_anew_is_not_added(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def replace() -> None:
        shutil.rmtree(bundle.folder)
        make_bundle(bundle.folder)

    fake = BACKENDS["fake"]

    def replacing(bundle: Bundle, request: Any, folder: Path) -> Iterator[Any]:
        result = yield from fake.build_engine(bundle, request, folder)
        replace()
        return result

    if when == "building":
        monkeypatch.setitem(BACKENDS, "fake", dataclasses.replace(fake, build_engine=replacing))
    check = (lambda *_: replace() or "") if when == "checking" else None
    with pytest.raises(BundleError, match="replaced by another export while an engine"):
        list(build_engines(bundle.folder, UNET, check=check))
    assert load_manifest(bundle.folder).engines == ()
    assert not [path for path in bundle.folder.iterdir() if path.name.startswith(".")]


def test_an_engine_of_other_weights_is_not_added(bundle: Bundle) -> None:
    files = {**bundle.manifest.files, "unet/model.onnx": bundle.manifest.files["vae_decoder/model.onnx"]}
    older = Bundle(bundle.folder, dataclasses.replace(bundle.manifest, files=files))
    with (  # noqa: PT012
        pytest.raises(BundleError, match="unet was exported again"),
        building(bundle, "unet-x") as (name, scratch),
    ):
        (scratch / "unet-x.json").write_text("{}")
        add_engine(older, engine(name), {"engines/unet-x.json": scratch / "unet-x.json"})
    assert load_manifest(bundle.folder) == bundle.manifest


def test_an_engine_is_removed_once_and_only_that_one(bundle: Bundle) -> None:
    both = with_fake_engines(bundle)
    first, *others = both.manifest.engines
    for _ in range(2):
        after = remove_engine(both, first)  # `both` is out of date the second time
        assert list(after.manifest.engines) == others
        assert Bundle.open(bundle.folder).changed_files() == []
    assert not (bundle.folder / first.files[0]).exists()


def test_a_bundle_that_cannot_be_written_still_says_that_its_engines_are_there(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle.folder)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    before = tree(bundle.folder)
    monkeypatch.setattr(os, "mkdir", refuse)
    assert [state for state, _ in build(bundle.folder)] == ["present"]
    assert tree(bundle.folder) == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    from sdruntime.bundle.changes.staging import staging
    from sdruntime.system.cache import write_cached

    before = os.umask(mask)
    try:
        made = make_bundle(tmp_path / "made")
        with staging(tmp_path / "bundle") as folder:
            for path in sorted(made.folder.rglob("*")):
                place = folder / path.relative_to(made.folder)
                if path.is_dir():
                    place.mkdir()
                else:
                    place.write_bytes(path.read_bytes())
        with_fake_engines(Bundle.open(tmp_path / "bundle"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SDRUNTIME_CACHE", str(tmp_path / "cache"))
            write_cached("speeds/a.json", b"{}")
    finally:
        os.umask(before)
    paths = [*tmp_path.rglob("*")]
    assert len(paths) > 40
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o777 & ~mask}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o666 & ~mask}


@pytest.mark.parametrize("use", ["entered", "engine", "request"])
def test_a_pipeline_opens_the_engines_of_the_bundle_as_it_is_then(bundle: Bundle, use: str) -> None:
    """Between its opening and that of its engines, another process rebuilds one of them."""
    from sdruntime.pipeline.pipeline import Pipeline

    (first,) = (each for each in with_fake_engines(bundle).manifest.engines if each.component == "unet")
    pipe = Pipeline.open(bundle.folder, backend="fake")
    fixed = Pipeline.open(Bundle.open(bundle.folder), backend="fake")
    build(bundle.folder, BuildRequest(backend="fake", size="64x64,512x512", components=("unet",)))
    remove_engine(bundle, first)
    if use == "entered":
        pipe.__enter__()
    elif use == "engine":
        pipe.engine("unet", rows=2, height=64, width=64)
    else:
        pipe("a cat", size=(64, 64), steps=1)
    assert len(pipe.bundle.manifest.engines) == 4
    assert first not in pipe.bundle.manifest.engines
    pipe.close()
    with pytest.raises(BundleError, match="missing"):  # this bundle is the caller's choice
        fixed.__enter__()


def test_a_bundle_that_changes_while_it_is_opened_is_read_again(bundle: Bundle) -> None:
    first = with_fake_engines(bundle).manifest.engines[0]
    seen = []

    def use(opened: Bundle) -> int:
        seen.append(opened.manifest.generation)
        if len(seen) == 1:
            remove_engine(opened, first)
        return len(opened.read(first.files[0]) if first in opened.manifest.engines else b"")

    assert opening(bundle.folder, use) == 0
    assert seen == [4, 5]
    (bundle.folder / "unet" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"unet/model\.onnx: missing"):
        opening(bundle.folder, use)
