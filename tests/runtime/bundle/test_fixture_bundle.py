"""A bundle of the first format revision, kept for ever: whatever changes, it still opens, builds and generates the same image.

It was exported from the tiny random SD1 checkpoint of tests/tiny.py in fp16; its image's numbers lie in tests/golden.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURE, GOLDEN

from sdruntime.bundle.bundle import Bundle
from sdruntime.pipeline.pipeline import Pipeline

STORED = GOLDEN / "fixture-bundle-1.npz"
ASKED = {"seed": 7, "steps": 4, "sampler": "dpmpp_2m", "size": (64, 64), "guidance": 5.0}


def test_it_opens_whole() -> None:
    bundle = Bundle.open(FIXTURE)
    assert bundle.changed_files() == []
    assert bundle.manifest.revision == 1
    assert bundle.manifest.model.family == "sd1"
    assert bundle.manifest.precision == "fp16"
    assert list(bundle.manifest.components) == ["text_encoder", "vae_encoder", "vae_decoder", "unet"]


def test_it_draws_the_stored_picture(small_bundle: Path) -> None:
    expected = np.load(STORED)["image"]
    assert expected.std() >= 10
    with Pipeline.open(small_bundle) as pipe:
        image = pipe("the red cat and the sand", **ASKED).pixels[0]
    error = np.abs(image.astype(int) - expected.astype(int))
    assert error.mean() < 0.5  # of 255: engines round fp16 each in their own way
    assert error.max() <= 8


def test_image_to_image_begins_from_the_picture(small_bundle: Path) -> None:
    expected = np.load(STORED)["image"]
    with Pipeline.open(small_bundle) as pipe:
        near, far = (
            pipe("a cat", image=expected, strength=strength, **{**ASKED, "steps": 20, "size": None}).pixels[0].astype(int)
            for strength in (0.05, 1.0)
        )
    assert np.abs(near - expected).mean() < np.abs(far - expected).mean()


def test_the_engines_open_from_memory_that_was_hashed(small_bundle: Path, tmp_path: Path) -> None:
    """No path in an engine is followed: its data file is found by the manifest, and checked, or the engine is refused."""
    from sdruntime.errors import BundleError

    folder = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    data = next((folder / "engines").glob("unet-*.onnx.data"))
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    with pytest.raises(BundleError, match=r"unet-.*\.onnx\.data: changed since it was written"), Pipeline.open(folder):
        pass
