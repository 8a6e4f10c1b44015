"""The defaults of a bundle's manifest stand in for what a request leaves open, in Python, in a queue and on the command line."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURE

from sdruntime.__main__ import main
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.model import Defaults
from sdruntime.engines.shapes import Shapes
from sdruntime.errors import BundleError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.serving.batcher import Batcher
from sdruntime.serving.describe import pipeline_document

FEW = Defaults(steps=3, guidance=1.0, sampler="euler_a")


def test_what_a_request_leaves_open_is_the_models_own() -> None:
    assert Request(prompt="x").completed(Defaults()) == Request(prompt="x", steps=20, guidance=7.5)
    assert Request(prompt="x").completed(FEW) == Request(prompt="x", steps=3, guidance=1.0, sampler="euler_a")
    given = Request(prompt="x", steps=9, guidance=[4.0, 2.0], sampler="ddim")
    assert given.completed(FEW) is given
    own = Request(prompt="x", sigmas=[10.0, 1.0, 0.0]).completed(FEW)
    assert own.steps is None  # the levels have their own number
    assert Request(prompt="x", image_guidance=2.0).completed(FEW).image_guidance == 2.0


@pytest.fixture
def turbo(small_bundle: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(small_bundle, tmp_path / "turbo"))
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["model"]["defaults"] = {"steps": 3, "guidance": 1.0, "sampler": "euler_a"}
    path.write_text(json.dumps(document))
    return folder


def test_a_pipeline_and_a_queue_use_them(turbo: Path, small_bundle: Path) -> None:
    with Pipeline.open(turbo) as pipe:
        image = pipe("a cat", seed=1, size=(64, 64)).images[0]
        assert (image.request.steps, image.request.guidance, image.sampler) == (3, 1.0, "euler_a")
        assert image.text()["parameters"].splitlines()[-1].startswith("Steps: 3, Sampler: Euler a, ")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stream = pipe.stream("a cat", negative="a dog", seed=1, size=(64, 64))
        assert [str(warning.message) for warning in caught] == [
            "the negative prompt has no effect at guidance 1: set guidance above 1"
        ]
        assert [len(job.rows) for job in stream.jobs] == [1]
        with Batcher(pipe) as batcher:
            future = batcher.submit(Request(prompt="a cat", seed=1, size=(64, 64)))
            assert (future.result().pixels == image.pixels).all()
    with Pipeline.open(small_bundle) as pipe:
        named = pipe("a cat", seed=1, size=(64, 64), steps=3, guidance=1.0, sampler="euler_a").images[0]
        assert (named.pixels == image.pixels).all()


def test_the_command_line_uses_and_shows_them(turbo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cat.png"
    assert main(["generate", str(turbo), "a cat", "--seed", "1", "--size", "64x64", "-o", str(out)]) == 0
    assert b"Steps: 3, Sampler: Euler a, " in out.read_bytes()
    capsys.readouterr()
    assert main(["inspect", str(turbo)]) == 0
    assert "defaults: steps 3, guidance 1, sampler euler_a" in capsys.readouterr().out


def test_a_default_size_counts_where_the_request_names_none(small_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_bundle, tmp_path / "wide"))
    document = json.loads((folder / "manifest.json").read_text())
    document["model"]["defaults"] = {"steps": 1, "size": [128, 64]}
    (folder / "manifest.json").write_text(json.dumps(document))
    with Pipeline.open(folder) as pipe:
        wide = pipe("a cat", seed=1).images[0]
        assert wide.size == (128, 64)
        assert (pipe("a cat", seed=1, size=(128, 64)).images[0].pixels == wide.pixels).all()
        assert pipe("a cat", image=np.zeros((64, 64, 3), np.uint8), strength=1.0).images[0].size == (64, 64)
        assert pipeline_document(pipe)["sizes"]["default"] == [128, 64]
        assert Shapes.parse(pipe.model, static=True).sizes == (((128, 64),) * 3,)


def test_a_table_is_that_of_the_defaults(turbo: Path, small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for arguments in (
        [str(turbo)],
        [str(small_bundle), "--steps", "3", "--sampler", "euler_a"],
        [str(turbo), "--steps", "5", "--sampler", "ddim"],
        [str(small_bundle), "--steps", "5", "--sampler", "ddim"],
    ):
        assert main(["table", *arguments, "--json"]) == 0
        tables.append(json.loads(capsys.readouterr().out)["table"])
    assert tables[0] == tables[1] != tables[2] == tables[3]
    assert main(["table", str(turbo), "--sigmas", "9,4,0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["table"]["t"]) == 2


def test_a_manifest_without_defaults_has_none_and_wrong_ones_are_faults(turbo: Path) -> None:
    assert Bundle.open(FIXTURE).manifest.model.defaults == Defaults()
    path = turbo / "manifest.json"
    for wrong in ({"steps": 0}, {"guidance": -1.0}, {"sampler": "quux"}, {"size": [65, 64]}, {"size": [64]}, {"speed": 1}):
        document = json.loads(path.read_text())
        document["model"]["defaults"] = wrong
        path.write_text(json.dumps(document))
        with pytest.raises(BundleError, match=next(iter(wrong))):
            Bundle.open(turbo)
