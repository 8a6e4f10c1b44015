"""After an upgrade of a library: which engines are out of date, and their rebuild with the same options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sdruntime.backends.fake.build
import sdruntime.backends.fake.engine
from sdruntime.__main__ import main
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines, rebuild_stale, stale_engines


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    for module in (sdruntime.backends.fake.build, sdruntime.backends.fake.engine):
        monkeypatch.setattr(module, "VERSION", version)


@pytest.fixture
def upgraded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of two engines of fake 1, where fake 2 is installed now."""
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", size="64x64,128x64", components=("unet", "vae_decoder"))):
        pass
    install(monkeypatch, "2")
    return bundle.folder


def test_nothing_is_stale_after_a_build(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle.folder), "--backend", "fake"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(bundle.folder), "--stale"]) == 0
    assert capsys.readouterr().out == "no engine is stale\n"
    assert main(["build", str(bundle.folder), "--stale"]) == 0
    assert capsys.readouterr().out == "no engine is stale\n"


def test_inspect_lists_what_no_longer_fits_and_the_command_that_mends_it(
    upgraded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(upgraded), "--stale"]) == 0
    *engines, last = capsys.readouterr().out.splitlines()
    assert [line.split("-fake1-")[0] for line in engines] == ["unet", "vae_decoder"]
    assert all(line.endswith(": built with fake 1, installed is 2") for line in engines)
    assert last == f"rebuild them: sdruntime build {upgraded} --stale"
    assert main(["inspect", str(upgraded), "--stale", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert {each["reason"] for each in found["stale"]} == {"built with fake 1, installed is 2"}
    assert [each["engine"].split("-")[0] for each in found["stale"]] == ["unet", "vae_decoder"]


def test_stale_engines_are_built_again_as_they_were_asked_for(upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(upgraded).manifest.engines
    assert main(["build", str(upgraded), "--stale", "--json"]) == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)["engines"]] == ["done", "done"]
    after = Bundle.open(upgraded)
    assert [engine.version for engine in after.manifest.engines] == ["2", "2"]
    assert [engine.profiles for engine in after.manifest.engines] == [engine.profiles for engine in before]
    assert not set(after.manifest.files) & {engine.files[0] for engine in before}, "the stale ones are gone"
    assert {path.name for path in (upgraded / "engines").iterdir()} == {
        Path(engine.files[0]).name for engine in after.manifest.engines
    }
    assert stale_engines(after) == []


def test_a_stale_engine_whose_successor_is_there_just_goes(upgraded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in build_engines(upgraded, BuildRequest(backend="fake", size="64x64,128x64", components=("unet",))):
        pass
    assert [event.component for event in rebuild_stale(upgraded) if event.state == "done"] == ["vae_decoder"]
    assert sorted(engine.name.split("-")[0] for engine in Bundle.open(upgraded).manifest.engines) == ["unet", "vae_decoder"]


def test_a_library_that_went_away_makes_nothing_stale(upgraded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)  # type: ignore[arg-type]
    assert stale_engines(Bundle.open(upgraded)) == []
