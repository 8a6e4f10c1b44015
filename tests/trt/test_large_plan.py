"""A plan of 1.7 GB is opened where it lies on the disk: no copy of it in this process, and its pages are released at once."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt import fake_engine
from trt.machine import Machine

from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.trt.engine import open_engine
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import FileSpec, save_manifest

SIZE = 1_700_000_000
PAGE = 4096
MOST = 64 << 20  # bytes of anonymous memory


def memory() -> tuple[int, int]:
    """(RssAnon, RssFile) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if name.startswith("Rss")
    }
    return found["RssAnon"], found["RssFile"]


@pytest.fixture
def bundle(small_folder: Path, tmp_path: Path) -> Bundle:
    """The decoder's plan is followed by zeros, which take no room on the disk."""
    folder = Path(shutil.copytree(small_folder, tmp_path / "large"))
    manifest = Bundle.open(folder).manifest
    path = next(engine.files[0] for engine in manifest.engines if engine.component == "vae_decoder")
    digest, zeros = hashlib.sha256((folder / path).read_bytes()), bytes(1 << 24)
    for start in range(manifest.files[path].size, SIZE, len(zeros)):
        digest.update(zeros[: SIZE - start])
    with (folder / path).open("r+b") as file:
        file.truncate(SIZE)
    files = {**manifest.files, path: FileSpec(size=SIZE, sha256=digest.hexdigest())}
    save_manifest(folder, dataclasses.replace(manifest, files=files))
    return Bundle.open(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_opening_a_large_plan_copies_nothing(
    here: Machine, bundle: Bundle, small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = next(engine for engine in bundle.manifest.engines if engine.component == "vae_decoder")
    plan = (small_folder / spec.files[0]).read_bytes()
    real, during = fake_engine.Runtime.deserialize_cuda_engine, []

    def deserialize(self: Any, serialized_engine: Any) -> Any:
        pages = np.frombuffer(serialized_engine, np.uint8)
        assert len(pages) == SIZE
        assert int(pages[::PAGE].astype(bool).sum()) > 0
        during.append(memory())
        del pages
        return real(self, plan)

    monkeypatch.setattr(fake_engine.Runtime, "deserialize_cuda_engine", deserialize)
    shared = Shared()
    before = memory()
    with open_engine(bundle, spec, EngineOptions(), shared) as engine:
        after = memory()
        out = engine({"latent_sample": np.ones((1, 4, 8, 8), np.float32)})["sample"]
    shared.close()
    assert (out == 4).all()
    assert during[0][0] - before[0] <= MOST
    assert after[0] - before[0] <= MOST
    assert during[0][1] - before[1] >= SIZE // 2  # it was mapped, and looked at
    assert after[1] - before[1] <= MOST
