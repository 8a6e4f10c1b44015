"""How far diffusers' own images move when its UNet's outputs are rounded otherwise: a bound for how alike ours can be.

One UNet, in torch, on the trained example at guidance 7.5. "Moved" multiplies each of its outputs by 1 + 6e-8·noise, about one
ulp, or by 1 + 5e-4·noise, about one of float16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.reference import Array, Reference, psnr

from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import run

PROMPT, STEPS, GUIDANCE = "a large green square on the right on a white background", 20, 7.5
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": False, "steps_offset": 1, "set_alpha_to_one": False}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Model = Callable[[Array, float], Array]


class Example:
    def __init__(self, folder: Path) -> None:
        import diffusers
        import torch

        self.torch, self.schedulers, self.pipe = torch, diffusers.schedulers, Reference(folder).pipe
        with torch.no_grad():
            wanted, absent = self.pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
        self.text = torch.cat([absent, wanted])
        self.start = np.random.default_rng(5).standard_normal((4, 8, 8)).astype(np.float32)

    def model(self, relative: float = 0.0) -> Model:
        torch, noise = self.torch, np.random.default_rng(1)

        def guided(x: Array, t: float) -> Array:
            pair = torch.from_numpy(np.stack([x, x]))
            with torch.no_grad():
                absent, wanted = self.pipe.unet(pair, t, encoder_hidden_states=self.text).sample.numpy()
            both = [out * (1 + relative * noise.standard_normal(out.shape)) for out in (absent, wanted)]
            return np.asarray(both[0] + GUIDANCE * (both[1] - both[0]), np.float32)

        return guided

    def theirs(self, config: dict[str, Any], relative: float = 0.0) -> Array:
        scheduler = getattr(self.schedulers, config["_class_name"]).from_config({**STABLE, **config})
        scheduler.set_timesteps(STEPS)
        model, x = self.model(relative), self.torch.from_numpy(self.start)
        for t in scheduler.timesteps:
            x = scheduler.step(self.torch.from_numpy(model(x.numpy(), int(t))), t, x).prev_sample
        return self.decoded(x.numpy())

    def ours(self, config: dict[str, Any]) -> Array:
        def noise() -> Array:
            raise AssertionError("these samplers add none")

        return self.decoded(run(compile_table({**STABLE, **config}, steps=STEPS), self.start, self.model(), noise))

    def decoded(self, x: Array) -> Array:
        with self.torch.no_grad():
            return np.asarray(self.pipe.vae.decode(self.torch.from_numpy(x)[None] / self.pipe.vae.config.scaling_factor).sample)


@pytest.fixture(scope="module")
def example(shapes_checkpoint: Path) -> Example:
    pytest.importorskip("transformers", minversion="5", reason="the example has names that transformers 4 misreads")
    return Example(shapes_checkpoint)


def test_diffusers_pndm_moves_as_far_from_itself_as_ours_is_from_it(example: Example) -> None:
    theirs = example.theirs(PNDM)
    ulp, half = psnr(example.theirs(PNDM, 6e-8), theirs), psnr(example.theirs(PNDM, 5e-4), theirs)
    assert ulp < 100, f"one ulp in the UNet moves PNDM's image to {ulp:.1f} dB"
    assert half < 40, f"one ulp of float16 moves it to {half:.1f} dB"
    assert psnr(example.ours(PNDM), theirs) > ulp - 15


def test_its_ddim_stays(example: Example) -> None:
    theirs = example.theirs(DDIM)
    assert psnr(example.theirs(DDIM, 6e-8), theirs) > 115
    assert psnr(example.theirs(DDIM, 5e-4), theirs) > 60
    assert psnr(example.ours(DDIM), theirs) > 115
