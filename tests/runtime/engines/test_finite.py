"""No bad image leaves silently: single NaN and Inf anywhere in an engine's outputs, and images of one colour."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from sdruntime.arrays import Array
from sdruntime.backends.fake.engine import FakeEngine
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.engines.finite import checked_rows, is_finite
from sdruntime.errors import NotFinite
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

BAD = (np.nan, np.inf, -np.inf)


@pytest.fixture
def pipe(bundle: Bundle) -> Iterator[Pipeline]:
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", size="64x64:128x128")):
        pass
    with Pipeline.open(bundle.folder, backend="fake") as opened:
        yield opened


class Planted(FakeEngine):
    """A fake that writes one number into one place of an output, in call `call`."""

    def __init__(self, like: FakeEngine, output: str, place: int, number: float, *, call: int = 0) -> None:
        super().__init__(like.spec, like.component, fill=0.25, factor=8)
        self.output, self.place, self.number, self.call = output, place, number, call

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = {name: array.copy() for name, array in super().__call__(feeds).items()}
        if len(self.calls) - 1 == self.call:
            outputs[self.output].reshape(-1)[self.place % outputs[self.output].size] = self.number
        return outputs


def fake(pipe: Pipeline, component: str) -> FakeEngine:
    engine = pipe.engine(component)
    assert isinstance(engine, FakeEngine)
    return engine


def plant(pipe: Pipeline, component: str, place: int, number: float, *, call: int = 0) -> None:
    engine = fake(pipe, component)
    assert pipe.engines.opened is not None
    pipe.engines.opened[engine.spec.name] = Planted(engine, engine.component.outputs[0].name, place, number, call=call)


def test_ten_thousand_single_numbers_are_caught(pipe: Pipeline) -> None:
    """At random places of every output of every component, among numbers of any size."""
    random = np.random.default_rng(5)
    shapes = {"batch": 2, "height": 8, "width": 8, "sequence": 77}
    caught = 0
    for component in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        engine = fake(pipe, component)
        sides = {"height": 64, "width": 64} if component == "vae_encoder" else {}
        feeds = {
            spec.name: np.zeros([(shapes | sides)[dim] if isinstance(dim, str) else dim for dim in spec.shape], spec.dtype)
            for spec in engine.component.inputs
        }
        outputs = {name: random.standard_normal(array.shape).astype(np.float32) for name, array in engine(feeds).items()}
        name = next(iter(outputs))
        engine.__class__ = type("Filled", (FakeEngine,), {"__call__": lambda self, feeds, outputs=outputs: outputs})
        flat = outputs[name].reshape(-1)
        assert checked_rows(engine, feeds, str) is outputs
        for _ in range(2500):
            place, scale = random.integers(flat.size), 10.0 ** random.integers(-3, 3)
            former, flat[place] = flat[place], random.choice(BAD) * scale
            try:
                checked_rows(engine, feeds, str)
            except NotFinite as error:
                caught += component in str(error)
            flat[place] = former
    assert caught == 10_000


def test_large_numbers_are_no_fault() -> None:
    assert is_finite(np.full((4, 64, 64), 3e38, np.float32)), "their sum is infinite"
    assert is_finite(np.array([3e38, 3e38, -3e38, -3e38] * 999, np.float32))
    assert not is_finite(np.array([np.inf, -np.inf], np.float32))


@pytest.mark.parametrize("number", BAD)
def test_the_unet_is_named_with_its_step_and_sampler(pipe: Pipeline, number: float) -> None:
    plant(pipe, "unet", place=300, number=number, call=2)
    with pytest.raises(
        NotFinite, match=r"unet, step 3 of 5, sampler euler: 1 of 256 numbers of out_sample are NaN or inf"
    ) as caught:
        pipe("a prompt", steps=5, sampler="euler", seed=1, size=(64, 64))
    assert str(caught.value).endswith(
        f"in fp32 this is no overflow: check the engine with `sdruntime verify {pipe.bundle.folder}`"
    )
    assert caught.value.exit_code == 1


def test_of_several_pictures_the_bad_ones_step_and_sampler_are_told(pipe: Pipeline) -> None:
    requests = [
        Request(prompt="one", steps=2, guidance=1, size=(64, 64)),
        Request(prompt="two", steps=4, sampler="heun", guidance=1, size=(64, 64)),
    ]
    plant(pipe, "unet", place=4 * 8 * 8, number=np.nan, call=1)
    with pytest.raises(NotFinite, match=r"unet, step 2 of 7, sampler heun"):
        pipe(requests)


def test_the_text_encoder_is_named_with_its_text(pipe: Pipeline) -> None:
    plant(pipe, "text_encoder", place=0, number=np.nan)
    with pytest.raises(
        NotFinite, match=r"text_encoder, text 'a prompt': 1 of 616 numbers of last_hidden_state.*`sdruntime verify \S+`$"
    ):
        pipe("a prompt", steps=2, size=(64, 64))


def test_the_vae_is_named_after_the_step_that_it_decodes(pipe: Pipeline) -> None:
    plant(pipe, "vae_decoder", place=7, number=np.inf)
    with pytest.raises(
        NotFinite, match=r"vae_decoder, after step 2 of 2, sampler ddim: 1 of 12,288 numbers of sample.*`sdruntime verify \S+`$"
    ):
        pipe("a prompt", steps=2, size=(64, 64))


def test_the_vae_encoder_is_looked_at_too(pipe: Pipeline) -> None:
    plant(pipe, "vae_encoder", place=7, number=np.nan)
    with pytest.raises(
        NotFinite, match=r"vae_encoder, the initial image: 1 of 256 numbers of latent_mean.*`sdruntime verify \S+`$"
    ):
        pipe("a prompt", steps=4, image=np.zeros((64, 64, 3), np.uint8))


def test_what_an_edit_spoilt_is_not_laid_on_the_engine(pipe: Pipeline) -> None:
    stream = pipe.stream("a prompt", steps=4, size=(64, 64))
    states = iter(stream)
    for state in states:
        if state.step == state.steps:
            state.jobs[0].run.x[:] = np.nan
            break
    with pytest.raises(
        NotFinite, match=r"unet, after step 4 of 4, sampler ddim: the latents are no longer finite.*`sdruntime verify \S+`$"
    ):
        next(states)
    engine = Planted(fake(pipe, "vae_decoder"), "sample", 3, np.nan)
    with pytest.raises(NotFinite, match=r"vae_decoder, 0: .*; so are numbers of its input \(latent_sample\)"):
        checked_rows(engine, {"latent_sample": np.full((1, 4, 8, 8), np.nan, np.float32)}, str)


def test_half_precision_is_told_what_to_build(pipe: Pipeline) -> None:
    engine = fake(pipe, "vae_decoder")
    half = Planted(engine, "sample", 3, np.nan)
    half.spec = dataclasses.replace(engine.spec, precision="fp16")
    feeds = {"latent_sample": np.zeros((1, 4, 8, 8), np.float32)}
    with pytest.raises(NotFinite, match="fp16 overflowed: build the bundle with --precision bf16 or fp32"):
        checked_rows(half, feeds, str)


def test_a_picture_of_one_colour_is_a_warning_of_the_result(pipe: Pipeline) -> None:
    result = pipe("a prompt", steps=2, size=(64, 64), seed=9, count=2)
    assert len(result.warnings) == 2
    assert result.warnings[0].startswith("image 0 (seed 9) is one colour all over, [128, 128, 128]")
    result.images[1].pixels[3, 3] = 1
    assert len(result.warnings) == 1
