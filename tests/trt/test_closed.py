"""A closed engine raises the error of every backend, and touches nothing that was released."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from trt.machine import Machine

from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.registry import backend
from sdruntime.bundle.bundle import Bundle
from sdruntime.errors import SdruntimeError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

CLOSED = r"^engine \S+ is closed: open it again$"


def test_a_closed_engine_says_so(here: Machine, small_folder: Path) -> None:
    bundle, shared = Bundle.open(small_folder), Shared()
    spec = next(each for each in bundle.manifest.engines if each.component == "text_encoder")
    engine = backend(here.backend).open_engine(bundle, spec, EngineOptions(), shared)
    feeds = {"input_ids": np.zeros((1, bundle.manifest.text_length), np.int32)}
    engine(feeds)
    for _ in range(2):
        engine.close()
        for given in (feeds, {}):
            with pytest.raises(SdruntimeError, match=CLOSED) as caught:
                engine(given)
            assert type(caught.value) is SdruntimeError
    shared.close()


def test_a_loop_on_the_device_ends_with_its_engine(here: Machine, small_folder: Path) -> None:
    with Pipeline.open(small_folder, backend=here.backend) as pipe:
        jobs = pipe.jobs([Request(prompt="a cat", seed=1, steps=6, sampler="ddim", size=(64, 64))])
        [call] = pipe.device_steppers(jobs)
        for _ in range(3):
            call.advance()
        pipe.engine("unet", rows=2, height=8, width=8).close()
        with pytest.raises(SdruntimeError, match=CLOSED):
            call.advance()
        with pytest.raises(SdruntimeError, match=CLOSED):
            pipe.device_steppers(jobs)
        with pytest.raises(SdruntimeError, match=CLOSED):
            call.finish()
        with pytest.raises(SdruntimeError, match=CLOSED):
            jobs[0].run.x  # noqa: B018
