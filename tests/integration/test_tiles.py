"""Tiled decoding and encoding in ONNX Runtime against diffusers' `enable_vae_tiling()`, with the tiles that diffusers cuts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdruntime import EngineOptions, Pipeline
from sdruntime.arrays import Array
from sdruntime.pipeline.vae.tiles import Span, TiledEngine

FACTOR, TILE = 8, 8  # the tiny VAE's; latent cells
SIZES = [(8, 16), (14, 20), (18, 9), (15, 26)]


def diffusers_spans(side: int) -> list[Span]:
    return [(start, min(start + TILE, side)) for start in range(0, side, TILE - TILE // 4)]


def random_inputs(height: int, width: int) -> tuple[Array, Array]:
    """Latents and an image of their size."""
    random = np.random.default_rng(height)
    cells = random.standard_normal((1, 4, height, width)).astype(np.float32)
    return cells, random.uniform(-1, 1, (1, 3, height * FACTOR, width * FACTOR)).astype(np.float32)


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path, ready: Any) -> Iterator[Pipeline]:
    pytest.importorskip("diffusers")
    with Pipeline.open(ready(sd1_bundle), options=EngineOptions(threads=1, tile="off")) as opened:
        yield opened


def tiled(pipe: Pipeline, component: str, height: int, width: int) -> TiledEngine:
    cell = {"cell_out": FACTOR} if component == "vae_decoder" else {"cell_in": FACTOR}
    return TiledEngine(partial(pipe.engines.engine, component), diffusers_spans(height), diffusers_spans(width), **cell)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_are_blended_as_in_diffusers_to_the_last_bit(pipe: Pipeline, height: int, width: int) -> None:
    """diffusers' methods, over the outputs of our own engines."""
    import torch
    from diffusers import AutoencoderKL

    decoder, encoder = (partial(pipe.engines.engine, name) for name in ("vae_decoder", "vae_encoder"))

    def decode(tile: Any) -> Any:
        feeds = {"latent_sample": np.ascontiguousarray(tile)}
        return torch.from_numpy(decoder(height=tile.shape[2], width=tile.shape[3])(feeds)["sample"])

    def encode(tile: Any) -> Any:
        outputs = encoder(height=tile.shape[2], width=tile.shape[3])({"sample": np.ascontiguousarray(tile)})
        return torch.from_numpy(np.concatenate([outputs["latent_mean"], outputs["latent_logvar"]], axis=1))

    vae = SimpleNamespace(
        tile_latent_min_size=TILE,
        tile_sample_min_size=TILE * FACTOR,
        tile_overlap_factor=0.25,
        config=SimpleNamespace(use_post_quant_conv=False, use_quant_conv=False),
        blend_v=partial(AutoencoderKL.blend_v, None),
        blend_h=partial(AutoencoderKL.blend_h, None),
        decoder=decode,
        encoder=encode,
    )
    cells, pixels = random_inputs(height, width)
    decoded = tiled(pipe, "vae_decoder", height, width)({"latent_sample": cells})["sample"]
    np.testing.assert_array_equal(decoded, AutoencoderKL.tiled_decode(vae, torch.from_numpy(cells)).sample.numpy())
    encoded = tiled(pipe, "vae_encoder", height, width)({"sample": pixels})
    moments = np.concatenate([encoded["latent_mean"], encoded["latent_logvar"]], axis=1)
    np.testing.assert_array_equal(moments, AutoencoderKL._tiled_encode(vae, torch.from_numpy(pixels)).numpy())


def test_tiled_images_and_latents_are_those_of_the_checkpoint_in_diffusers(pipe: Pipeline, sd1_checkpoint: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(sd1_checkpoint, subfolder="vae").eval()
    vae.enable_tiling()
    assert (vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor) == (TILE, TILE * FACTOR, 0.25)
    cells, pixels = random_inputs(14, 20)
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(cells)).sample.numpy()
        posterior = vae.encode(torch.from_numpy(pixels)).latent_dist
    ours = tiled(pipe, "vae_decoder", 14, 20)({"latent_sample": cells})["sample"]
    assert np.abs(decoded).max() > 0.5
    np.testing.assert_allclose(ours, decoded, atol=2e-5)
    encoded = tiled(pipe, "vae_encoder", 14, 20)({"sample": pixels})
    np.testing.assert_allclose(encoded["latent_mean"], posterior.mean.numpy(), atol=2e-5)
    np.testing.assert_allclose(np.clip(encoded["latent_logvar"], -30, 20), posterior.logvar.numpy(), atol=2e-5)
