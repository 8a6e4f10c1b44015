"""A bundle whose text encoder takes 248 tokens: profiles, reference cases, prompts and warnings follow its input_ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bundles
import pytest

from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import TensorSpec
from sdruntime.engines.shapes import Shapes
from sdruntime.errors import BundleError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.verification.golden import cases_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    ids = TensorSpec(name="input_ids", dtype="int32", shape=("batch", 248))
    hidden = TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", 248, 8))
    monkeypatch.setitem(bundles.TENSORS, "text_encoder", ((ids,), (hidden,)))
    return bundles.make_bundle(tmp_path / "long").folder


def edit(folder: Path, shape: list[Any]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["components"]["text_encoder"]["inputs"][0]["shape"] = shape
    path.write_text(json.dumps(document))


def test_everything_takes_the_length_of_the_encoder(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert manifest.text_length == 248
    profiles = Shapes.parse(manifest.model, chunks="1:3").profiles("unet", manifest)
    assert {profile["sequence"] for profile in profiles} == {(248, 248, 744)}
    cases = cases_of(manifest, {"text_encoder": 514})
    assert {case.dims["sequence"] for case in cases if case.component == "unet"} == {248}


def test_a_prompt_is_cut_at_the_length_of_the_encoder(folder: Path) -> None:
    with Pipeline.open(bundles.with_fake_engines(Bundle.open(folder)), backend="fake") as pipe:
        pipe("a " * 246, steps=1, size=(64, 64), seed=1, guidance=1.0)
        with pytest.warns(UserWarning, match=r"takes 248 tokens; of 'a a .* this was cut: 'a a a a'"):
            pipe("a " * 250, steps=1, size=(64, 64), seed=1, guidance=1.0)
        assert pipe.stream("a", size=(64, 64)).jobs[0].rows[-1]["encoder_hidden_states"].shape == (248, 8)


@pytest.mark.parametrize("shape", [["batch"], ["batch", "sequence"], ["batch", 2], ["batch", 5000], ["batch", 77, 1]])
def test_an_encoder_whose_length_is_not_clear_is_refused(folder: Path, shape: list[Any]) -> None:
    edit(folder, shape)
    with pytest.raises(BundleError, match=r"component text_encoder: input_ids takes .* tokens, not 3 to 4,096"):
        Bundle.open(folder)
