from __future__ import annotations

import dataclasses

import pytest

from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.engines.memory import MemoryPlan, Part, memory_plan
from sdruntime.errors import OutOfSpace

MIB = 1 << 20
TEXT = Part(component="text_encoder", engine="t", weights=100 * MIB, activations=20 * MIB, buffers=MIB)
UNET = Part(component="unet", engine="u", weights=1700 * MIB, activations=300 * MIB, buffers=2 * MIB)
VAE = Part(component="vae_decoder", engine="v", weights=90 * MIB, activations=900 * MIB, buffers=6 * MIB)
PLAN = MemoryPlan(parts=(TEXT, UNET, VAE))


def test_weights_add_up_and_activations_share_a_place() -> None:
    assert PLAN.arena == 900 * MIB
    assert PLAN.total == (100 + 1700 + 90 + 1 + 2 + 6 + 900) * MIB
    assert PLAN.lowest == (1700 + 300 + 2) * MIB


@pytest.mark.parametrize(
    ("free", "settings", "message"),
    [
        (2800 * MIB, {}, None),
        (2700 * MIB, {}, "need 2,934,964,224 bytes and 2,831,155,200 are free: open it with --low-memory"),
        (2700 * MIB, {"low_memory": True}, None),
        (2000 * MIB, {"low_memory": True}, "are free: close other programs that use the GPU, or build engines for a smaller"),
        (1000 * MIB, {}, "close other programs that use the GPU"),
        (9000 * MIB, {"budget": 2700 * MIB}, "the budget is 2,831,155,200: open it with --low-memory"),
        (9000 * MIB, {"budget": 2700 * MIB, "low_memory": True}, None),
        (2000 * MIB, {"budget": 9000 * MIB, "low_memory": True}, "2,097,152,000 are free"),
    ],
)
def test_too_little_is_refused_with_the_numbers_and_the_option_that_helps(
    free: int, settings: dict[str, int], message: str | None
) -> None:
    if message is None:
        PLAN.check(free, where="sd15 on a GPU", **settings)
        return
    with pytest.raises(OutOfSpace, match=message) as caught:
        PLAN.check(free, where="sd15 on a GPU", **settings)
    assert all(part.component in str(caught.value) for part in PLAN.parts)


def test_what_is_not_known_is_said() -> None:
    unknown = MemoryPlan(parts=(dataclasses.replace(UNET, activations=None), VAE))
    assert not unknown.complete
    assert "activations unknown until it is opened" in unknown.lines()[0]
    assert unknown.lines()[-1].startswith("all at once     at least ")


def test_buffers_are_those_of_the_largest_profile(bundle: Bundle) -> None:
    for _ in build_engines(
        bundle.folder, BuildRequest(backend="fake", size="64x64,128x64", batch="1,2", guidance="on", chunks="1")
    ):
        pass
    engines = [dataclasses.replace(engine, target="sm86") for engine in Bundle.open(bundle.folder).manifest.engines]
    parts = {part.component: part for part in memory_plan(bundle.manifest, []).parts}
    assert parts == {}
    manifest = Bundle.open(bundle.folder).manifest
    parts = {part.component: part for part in memory_plan(manifest, engines).parts}
    rows, cells = 4, 4 * 8 * 16
    assert parts["unet"].buffers == 4 * (2 * rows * cells + rows + rows * 77 * 8)  # sample and out_sample, timestep, text
    assert parts["vae_decoder"].buffers == 4 * (2 * cells + 2 * 3 * 64 * 128)
    assert parts["unet"].weights == manifest.files[next(e for e in engines if e.component == "unet").files[0]].size


def test_engines_of_the_cpu_take_nothing_of_a_gpu(bundle: Bundle) -> None:
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake")):
        pass
    manifest = Bundle.open(bundle.folder).manifest
    assert memory_plan(manifest, manifest.engines).total == 0
