"""Memory on the fake device: a plan before anything is loaded, one component at a time, one arena for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trt.conftest import psnr, with_engines
from trt.machine import Machine
from trt.surface import Surface

from sdruntime.backends.base.engine import EngineOptions
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.memory import memory_plan
from sdruntime.errors import OutOfSpace
from sdruntime.pipeline.pipeline import Pipeline

PROMPT = "a cat in the red and"


@pytest.fixture
def folder(here: Machine, sd1_bundle: Path, tmp_path: Path) -> Path:
    return with_engines(sd1_bundle, tmp_path / "bundle", here)


def device_bytes(here: Machine) -> int:
    return here.gpus.memory.total - here.gpus.memory.free_bytes(0)


def test_the_plan_is_what_is_taken(here: Machine, folder: Path) -> None:
    """Every engine of a pipeline loaded and used: weights, buffers and one arena; the fake counts each byte."""
    manifest = Bundle.open(folder).manifest
    plan = memory_plan(manifest, [engine for engine in manifest.engines if engine.component not in ("vae_encoder", "step")])
    assert plan.complete
    with Pipeline.open(folder, backend=here.backend) as pipe:
        stream = pipe.stream(PROMPT, steps=2, seed=1)
        for _ in stream:
            pass
        assert stream.result.pixels[0].std() >= 10
        taken = device_bytes(here)
    assert device_bytes(here) == 0
    assert 0.9 * plan.total <= taken <= 1.02 * plan.total + (1 << 16)  # buffers end on whole blocks of 256 bytes


def test_low_memory_holds_one_component_at_a_time_and_draws_the_same(here: Machine, folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    plan = memory_plan(manifest, [engine for engine in manifest.engines if engine.component != "vae_encoder"])
    pictures, most = [], []
    for low in (False, True):
        with Pipeline.open(folder, backend=here.backend, options=EngineOptions(low_memory=low)) as pipe:
            stream = pipe.stream(PROMPT, steps=3, seed=1, on_device=True)
            peak = 0
            for _ in stream:
                peak = max(peak, device_bytes(here))
            pictures.append(stream.result.pixels[0])
            most.append(max(peak, device_bytes(here)))
            held = {engine.spec.component for engine in (pipe.engines.opened or {}).values()}
            assert held == ({"vae_decoder"} if low else {"text_encoder", "unet", "vae_decoder", "step"})
            again = pipe([PROMPT, "a cat"], steps=3, seed=1).pixels  # what was closed is opened again
            assert psnr(again[0], pictures[-1]) >= 60
    assert psnr(*pictures) == float("inf")
    assert most[1] < most[0]
    assert most[1] <= plan.lowest + plan.arena + (1 << 20)


def test_a_unet_is_kept_while_its_jobs_are_on_their_way(here: Machine, folder: Path) -> None:
    with Pipeline.open(folder, backend=here.backend, options=EngineOptions(low_memory=True)) as pipe:
        stream = pipe.stream(PROMPT, steps=4, seed=1, on_device=True)
        for state in stream:
            preview = pipe.decode([state.jobs[0].run.x])[0]
            assert preview.shape == (3, 64, 64)
        assert stream.result.pixels[0].std() >= 10


def test_too_little_memory_is_refused_before_anything_is_loaded(
    here: Machine, folder: Path, machine: Callable[..., Machine], surfaces: dict[str, Surface]
) -> None:
    manifest = Bundle.open(folder).manifest
    plan = memory_plan(manifest, [engine for engine in manifest.engines if engine.component not in ("vae_encoder", "step")])
    between = (plan.lowest + plan.total) // 2
    small = machine(surfaces["tensorrt 11.4.0.106"], total=between)
    with pytest.raises(OutOfSpace, match="open it with --low-memory"), Pipeline.open(folder, backend=small.backend):
        pass
    assert small.gpus.counts["cuMemAlloc_v2"] == 0
    with pytest.raises(OutOfSpace, match="the budget is 1,000"):
        Pipeline.open(folder, backend=small.backend, options=EngineOptions(memory=1000)).__enter__()


def test_free_memory_of_an_integrated_gpu_is_the_system_s(machine: Callable[..., Machine], surfaces: dict[str, Surface]) -> None:
    from sdruntime.system.cuda import Cuda
    from sdruntime.system.memory import available_memory

    machine(surfaces["tensorrt 10.3.0"], integrated=True, capability=(8, 7), total=1 << 20, name="Orin")
    with Cuda.open() as cuda:
        assert cuda.free_memory() > 1 << 20
        assert cuda.free_memory() == pytest.approx(available_memory(), rel=0.2)
