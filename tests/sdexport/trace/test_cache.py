"""Traces are found by all that they depend on, and a damaged one is not believed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.families.components import Component, components
from sdexport.trace.cache import cache_folder, load_trace, store_trace, trace_key


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDEXPORT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def unet(sd1_checkpoint: Path) -> Component:
    return components(read_checkpoint(sd1_checkpoint, name="tiny"))[-1]


def test_what_is_kept_is_found(folder: Path) -> None:
    assert load_trace("ab12") is None
    store_trace("ab12", b"graph")
    assert load_trace("ab12") == b"graph"
    assert [path.suffix for path in folder.rglob("*") if path.is_file()] == [".onnx"]


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_changed_byte_is_found_out(folder: Path, position: int) -> None:
    store_trace("ab12", b"a graph of some length")
    path = next(path for path in folder.rglob("*.onnx"))
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(damaged)
    assert load_trace("ab12") is None
    store_trace("ab12", b"again")
    assert load_trace("ab12") == b"again"


def test_a_cut_entry_is_found_out(folder: Path) -> None:
    store_trace("ab12", b"a graph of some length")
    path = next(path for path in folder.rglob("*.onnx"))
    for length in (0, 10, 33):
        path.write_bytes(path.read_bytes()[:length])
        assert load_trace("ab12") is None


def test_the_key_follows_what_a_trace_depends_on(unet: Component, monkeypatch: pytest.MonkeyPatch) -> None:
    key = trace_key(unet)
    assert trace_key(unet) == key
    assert trace_key(dataclasses.replace(unet, config={**unet.config, "act_fn": "gelu"})) != key
    assert trace_key(dataclasses.replace(unet, outputs=unet.inputs[:1])) != key
    assert trace_key(dataclasses.replace(unet, config={**unet.config, "_name_or_path": "elsewhere"})) == key
    monkeypatch.setattr("sdexport.trace.cache.versions", lambda: {"torch": "0.0"})
    assert trace_key(unet) != key


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SDEXPORT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sdexport"


def test_a_trace_has_the_mode_that_the_umask_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDEXPORT_CACHE", str(tmp_path))
    before = os.umask(0o027)
    try:
        store_trace("0" * 64, b"a graph")
    finally:
        os.umask(before)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path.stat().st_mode & 0o777 == 0o640
    assert load_trace("0" * 64) == b"a graph"
