"""Tiles of large images: which are chosen, how they are called, and what users learn of them."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import FIXTURE

from sdruntime import Bundle, EngineError, EngineOptions, Pipeline, SettingError
from sdruntime.backends.base.engine import CPU, CUDA
from sdruntime.backends.fake.engine import FakeEngine
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.vae import tile_size
from sdruntime.pipeline.vae.tiles import TiledEngine, even_spans

VAE = ("vae_decoder", "vae_encoder")


@pytest.mark.parametrize(
    ("side", "tile", "overlap", "expected"),
    [
        (64, 64, 0.25, [(0, 64)]),
        (40, 64, 0.25, [(0, 40)]),
        (65, 64, 0.25, [(0, 64), (1, 65)]),
        (112, 64, 0.25, [(0, 64), (48, 112)]),
        (113, 64, 0.25, [(0, 64), (24, 88), (49, 113)]),
        (128, 64, 0.5, [(0, 64), (32, 96), (64, 128)]),
    ],
)
def test_tiles_have_one_size_and_reach_from_end_to_end(
    side: int, tile: int, overlap: float, expected: list[tuple[int, int]]
) -> None:
    assert even_spans(side, tile, overlap) == expected


@pytest.fixture
def made(bundle: Bundle) -> Path:
    """A bundle with fake engines: up to 512x512 for the VAE, up to 4096x4096 for the UNet."""
    _build(bundle.folder, "fake", size="64x64:512x512", components=VAE)
    _build(bundle.folder, "fake", size="64x64:4096x4096", components=("text_encoder", "unet"))
    return bundle.folder


def _build(folder: Path, backend: str, **settings: Any) -> None:
    for _ in build_engines(folder, BuildRequest(backend=backend, **settings)):
        pass


def _decoded(pipe: Pipeline) -> list[dict[str, int]]:
    """The calls of the decoder's fake engine."""
    engines = [engine for engine in (pipe.engines.opened or {}).values() if engine.spec.component == "vae_decoder"]
    assert all(isinstance(engine, FakeEngine) for engine in engines)
    return [call for engine in engines for call in engine.calls]  # type: ignore[attr-defined]


def test_an_image_beyond_the_decoder_s_profile_is_decoded_in_its_largest_tiles(made: Path) -> None:
    with Pipeline.open(made, backend="fake") as pipe:
        with pytest.warns(
            UserWarning,
            match="^size 1024x384: the VAE takes the image in 3 overlapping tiles of 512x384, .*no engine takes the whole",
        ):
            image = pipe("a fox", steps=1, seed=1, size=(1024, 384)).images[0]
        assert _decoded(pipe) == [{"batch": 1, "height": 48, "width": 64}] * 3
        assert image.shape == (384, 1024, 3)
        assert "VAE tile: 512x384" in image.text()["parameters"]
        start = np.zeros((384, 1024, 3), np.uint8)
        with pytest.warns(UserWarning, match="3 overlapping tiles"):  # the encoder runs on tiles too
            assert pipe("a fox", steps=2, image=start, strength=0.5).pixels[0].shape == (384, 1024, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "VAE tile" not in pipe("a fox", steps=1, size=(512, 512)).images[0].text()["parameters"]


def test_a_large_image_on_a_cpu_is_decoded_in_tiles_though_the_engine_takes_it(made: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tile_size, "MOST_CPU_PIXELS", 256 * 256)
    monkeypatch.setattr(tile_size, "CPU_TILE", 128)
    with Pipeline.open(made, backend="fake") as pipe:
        with pytest.warns(UserWarning, match="--tile off takes it whole"):
            pipe("a fox", steps=1, size=(256, 320))
        assert _decoded(pipe) == [{"batch": 1, "height": 16, "width": 16}] * 9


def test_the_user_chooses_the_tiles(made: Path) -> None:
    with Pipeline.open(
        made, backend="fake", options=EngineOptions(tile=np.int64(128))
    ) as pipe:  # no warning: pytest makes it an error
        pipe("a fox", steps=1, size=(64, 320))
        assert _decoded(pipe) == [{"batch": 1, "height": 16, "width": 8}] * 3
    for options, size in ((EngineOptions(tile="off"), (640, 64)), (EngineOptions(tile=640), (1024, 64))):
        pipe = Pipeline.open(made, backend="fake", options=options)
        with pytest.raises(EngineError, match=r"built for 64x64 to 512x512.*; requested is 640x64"):
            pipe("a fox", steps=1, size=size)


def test_a_gpu_takes_as_many_tiles_in_a_call_as_its_profile_and_a_cpu_one(made: Path) -> None:
    bundle = Bundle.open(made)
    spec = next(engine for engine in bundle.manifest.engines if engine.component == "vae_decoder")
    for target, batches in ((CUDA, [8, 8, 2]), (CPU, [1] * 18)):
        one = FakeEngine(dataclasses.replace(spec, target=target), bundle.manifest.components["vae_decoder"], fill=0.5, factor=8)
        spans = even_spans(40, 16)
        tiled = TiledEngine(lambda one=one, **dims: one, spans, spans, cell_out=8)
        images = tiled({"latent_sample": np.zeros((2, 4, 40, 40), np.float32)})["sample"]
        assert [call["batch"] for call in one.calls] == batches
        assert images.shape == (2, 3, 320, 320)
        np.testing.assert_array_equal(images, np.float32(0.5))


@pytest.mark.parametrize("tile", [0, -8, True, 64.0, None, "large"])
def test_a_tile_of_another_kind_is_refused(tile: Any) -> None:
    with pytest.raises(SettingError, match='expected "auto", "off" or the side of a tile in pixels, such as 1024'):
        EngineOptions(tile=tile)


@pytest.mark.parametrize(
    ("tile", "message"),
    [(100, "multiple of 8 pixels, .* nearest is 96"), (56, "at least 64, since neighbours overlap; the nearest is 64")],
)
def test_a_tile_that_the_vae_cannot_take_is_refused(made: Path, tile: int, message: str) -> None:
    with pytest.raises(SettingError, match=f"^tile {tile}: .*{message}"):
        Pipeline.open(made, backend="fake", options=EngineOptions(tile=tile))


def test_tiles_of_an_engine_with_one_shape_change_the_image_a_little(tmp_path: Path) -> None:
    """The same random VAE, as an engine for every size and as one that takes only two tiles of 64x64."""
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "bundle"))
    _build(folder, "onnxruntime", size="64x64", batch="2")
    latents = np.random.default_rng(1).standard_normal((4, 12, 20)).astype(np.float32)
    with Pipeline.open(folder, options=EngineOptions(threads=1)) as pipe:
        tiled = pipe.decode([latents])[0]
        again = pipe.decode([latents, latents[:, ::-1]])[0]
    shutil.rmtree(folder)
    shutil.copytree(FIXTURE, folder)
    _build(folder, "onnxruntime")
    with Pipeline.open(folder, options=EngineOptions(threads=1, tile="off")) as pipe:
        whole = pipe.decode([latents])[0]
    np.testing.assert_allclose(tiled, again, atol=1e-5)
    assert tiled.shape == whole.shape == (3, 96, 160)
    assert 0 < np.abs(tiled - whole).mean() < 0.5 * whole.std()
