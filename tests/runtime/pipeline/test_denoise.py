from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from bundles import SCHEDULER, TENSORS

from sdruntime.arrays import Array
from sdruntime.backends.fake.engine import FakeEngine
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.errors import SdruntimeError
from sdruntime.pipeline.denoise import Call, denoise
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import Run
from sdruntime.sampling.job import Job, Row, grouped, stacked
from sdruntime.sampling.noise.cpu import NoiseStream

UNET = ComponentSpec(files=("unet/model.onnx",), config="unet/config.json", inputs=TENSORS["unet"][0], outputs=TENSORS["unet"][1])


class Unet(FakeEngine):
    """A fake that computes: each row of its output depends on all of that row's inputs, and on no other row."""

    def __init__(self, *, most: int = 16, least: int = 1) -> None:
        side = (1, 2, 8)
        spec = EngineSpec(
            component="unet",
            backend="fake",
            version="1",
            target="cpu",
            precision="fp32",
            files=("engines/unet.json",),
            profiles=({"batch": (least, least, most), "height": side, "width": side, "sequence": (77, 77, 77)},),
        )
        super().__init__(spec, UNET, fill=0.0, factor=8)
        self.timesteps: list[list[float]] = []

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        super().__call__(feeds)
        self.timesteps.append(feeds["timestep"].tolist())
        text = feeds["encoder_hidden_states"].mean(axis=(1, 2), dtype=np.float64)
        shift = np.sin(feeds["timestep"] / 500) + text
        return {"out_sample": np.tanh(feeds["sample"] * 0.5 + shift[:, None, None, None]).astype(np.float32)}


def host(unet: Unet) -> Callable[[Sequence[Job]], list[Call]]:
    return lambda jobs: [Call(jobs, lambda: unet)]


def row(value: float) -> Row:
    return {"encoder_hidden_states": np.full((77, 8), value, np.float32)}


def job(seed: int, *, steps: int, sampler: str, guidance: float = 1.0, side: int = 4, rescale: float = 0.0) -> Job:
    noise, shape = NoiseStream(seed), (4, side, side)
    table = compile_table(SCHEDULER, steps=steps, sampler=sampler)
    return Job(
        run=Run(table, table.start[1] * noise.normal(shape), lambda: noise.normal(shape)),
        rows=(row(-0.3), row(0.1 * seed)) if guidance > 1 else (row(0.1 * seed),),
        guidance=guidance,
        rescale=rescale,
    )


def crowd() -> list[Job]:
    return [
        job(1, steps=5, sampler="ddim"),
        job(2, steps=9, sampler="euler_a", guidance=7.5),
        job(3, steps=3, sampler="heun", guidance=2.0, rescale=0.7),
        job(4, steps=7, sampler="dpmpp_2m", side=6),
        job(5, steps=4, sampler="unipc", guidance=3.0, side=6),
    ]


@pytest.mark.parametrize(("most", "least"), [(16, 1), (2, 1), (1, 1), (4, 3)])
def test_together_is_as_alone_at_any_batch_size(most: int, least: int) -> None:
    together = crowd()
    rounds = sum(1 for _ in denoise(together, host(Unet(most=most, least=least))))
    assert rounds == max(each.run.steps for each in together)
    for ours, alone in zip(together, crowd(), strict=True):
        for _ in denoise([alone], host(Unet())):
            pass
        np.testing.assert_array_equal(ours.run.x, alone.run.x)


def test_jobs_of_one_shape_share_calls_with_the_unconditional_rows_first() -> None:
    unet = Unet()
    for _ in denoise(crowd()[:3], host(unet)):
        pass
    assert [call["batch"] for call in unet.calls] == [5] * 5 + [2] * 4
    unguided, first, second = (each.run.t for each in crowd()[:3])
    assert unet.timesteps[0] == [first, second, unguided, first, second]


def test_guidance_is_between_the_two_outputs_by_its_definition() -> None:
    guided, unet = job(2, steps=1, sampler="euler", guidance=7.5), Unet()
    sample = np.empty((1, 4, 4, 4), np.float32)
    guided.run.model_input(out=sample[0])
    timestep = np.array([guided.run.t], np.float32)
    without, with_text = (
        unet({"sample": sample, "timestep": timestep, **stacked([row(value)])})["out_sample"][0] for value in (-0.3, 0.2)
    )
    expected = job(2, steps=1, sampler="euler")
    expected.run.advance(without + np.float32(7.5) * (with_text - without))
    for _ in denoise([guided], host(unet)):
        pass
    np.testing.assert_allclose(guided.run.x, expected.run.x, atol=2e-5)


def interval(seed: int, *, steps: int, guidances: tuple[float, ...], sampler: str = "euler_a", rescale: float = 0.0) -> Job:
    made = job(seed, steps=steps, sampler=sampler, guidance=max(guidances), rescale=rescale)
    made.guidances = guidances
    return made


def test_guidance_by_step_is_that_of_each_step() -> None:
    scales = (1.0, 7.5, 3.0, 1.0)
    by_step, by_hand = interval(2, steps=4, guidances=scales, rescale=0.7), job(2, steps=4, sampler="euler_a", guidance=2.0)
    for scale, _ in zip(scales, denoise([by_step], host(Unet())), strict=True):
        sample = np.empty((1, 4, 4, 4), np.float32)
        by_hand.run.model_input(out=sample[0])
        timestep = np.array([by_hand.run.t], np.float32)
        without, with_text = (
            Unet()({"sample": sample, "timestep": timestep, **stacked([each])})["out_sample"] for each in by_hand.rows
        )
        guided = with_text if scale == 1 else without + np.float32(scale) * (with_text - without)
        guided *= 0.7 * with_text.std() / guided.std() + 0.3
        by_hand.run.advance(guided[0])
        np.testing.assert_allclose(by_step.run.x, by_hand.run.x, rtol=2e-5, atol=2e-5)


def test_steps_without_guidance_compute_no_unconditional_rows() -> None:
    unet = Unet()
    jobs = [interval(1, steps=4, guidances=(1.0, 7.0, 7.0, 1.0)), interval(2, steps=4, guidances=(1.0, 1.0, 7.0, 1.0))]
    for _ in denoise(jobs, host(unet)):
        pass
    assert [call["batch"] for call in unet.calls] == [2, 4, 4, 2]


@pytest.mark.parametrize(("most", "least"), [(16, 1), (2, 1), (4, 3)])
def test_intervals_in_a_mixed_batch_are_as_alone(most: int, least: int) -> None:
    def mixed() -> list[Job]:
        return [
            interval(1, steps=4, guidances=(1.0, 7.0, 7.0, 1.0)),
            interval(2, steps=3, guidances=(9.0, 1.0, 4.0), sampler="dpmpp_2m", rescale=0.5),
            *crowd(),
        ]

    together = mixed()
    for _ in denoise(together, host(Unet(most=most, least=least))):
        pass
    for ours, alone in zip(together, mixed(), strict=True):
        for _ in denoise([alone], host(Unet())):
            pass
        np.testing.assert_array_equal(ours.run.x, alone.run.x)


def test_an_edit_between_steps_is_what_the_model_sees_next() -> None:
    edited, unet = job(1, steps=3, sampler="dpmpp_2m"), Unet()
    seen: list[float] = []
    for _ in denoise([edited], host(unet)):
        if not edited.done:
            edited.run.x[:] = edited.run.step
            sample = np.empty((4, 4, 4), np.float32)
            edited.run.model_input(out=sample)
            seen.append(float(sample.mean()))
    assert seen == [1.0, 2.0]


def test_a_stopped_job_stays_as_it_is_and_the_others_go_on() -> None:
    jobs, unet = crowd()[:2], Unet()
    for _ in denoise(jobs, host(unet)):
        if jobs[0].run.step == 2 and not jobs[0].stopped:
            jobs[0].stopped = True
            kept = jobs[0].run.x.copy()
    np.testing.assert_array_equal(jobs[0].run.x, kept)
    assert [each.run.step for each in jobs] == [2, 9]


class Spoilt(Unet):
    """Call `number` goes wrong: one number of `row` is NaN, or the engine raises, then and from then on."""

    def __init__(self, number: int, row: int | None = None) -> None:
        super().__init__()
        self.number, self.row, self.failure = number, row, SdruntimeError("the engine failed")

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = super().__call__(feeds)
        if self.row is None and len(self.calls) >= self.number:
            raise self.failure
        if len(self.calls) == self.number:
            outputs["out_sample"][self.row, 0, 0, 0] = np.nan
        return outputs


@pytest.mark.parametrize(("row", "concerned"), [(None, [0, 1, 2]), (0, [1]), (1, [2]), (2, [0]), (3, [1]), (4, [2])])
def test_an_error_is_that_of_the_jobs_that_it_concerns_and_the_others_go_on(row: int | None, concerned: list[int]) -> None:
    jobs, alone = crowd(), crowd()
    with pytest.raises(SdruntimeError, match="the engine failed" if row is None else "unet, step 2 of") as caught:
        for _ in denoise(jobs, host(Spoilt(3, row))):  # the second step of the first shape
            pass
    assert [k for k, each in enumerate(jobs) if each.error is not None] == concerned
    assert all(jobs[k].error is caught.value for k in concerned)
    rest = [each for each in jobs if each.error is None]
    for _ in denoise(rest, host(Unet())):
        pass
    for ours, reference in zip(jobs, alone, strict=True):
        if ours.error is None:
            for _ in denoise([reference], host(Unet())):
                pass
            np.testing.assert_array_equal(ours.run.x, reference.run.x)


def test_jobs_whose_call_cannot_be_made_are_told_apart() -> None:
    jobs = crowd()

    def steppers(group: Sequence[Job]) -> list[Call]:
        if group[0] is jobs[3]:
            raise SdruntimeError("no engine")
        return [Call(group, Unet)]

    with pytest.raises(SdruntimeError, match="no engine"):
        next(denoise(jobs, steppers))
    assert [each.error is not None for each in jobs] == [False, False, False, True, True]


def test_jobs_join_and_leave_a_live_set() -> None:
    jobs = {each: k for k, each in enumerate(crowd()[:2])}
    late, unet = crowd()[2], Unet()
    for step, _ in enumerate(denoise(jobs, host(unet)), start=1):
        if step == 2:
            jobs[late] = 2
        if step == 4:
            jobs.pop(next(iter(jobs)))
    assert [call["batch"] for call in unet.calls] == [3, 3, 5, 5, 4, 4, 4, 2, 2][: len(unet.calls)]
    assert late.done


def test_a_call_has_zeros_where_only_another_job_has_an_input() -> None:
    hint = {"hint": np.ones((3, 2, 2), np.float32)}
    with_hint, without, other_hint = row(1.0) | hint, row(2.0), row(3.0) | {"hint": np.ones((3, 4, 2), np.float32)}
    jobs = [job(seed, steps=1, sampler="euler", side=6 if seed == 3 else 4) for seed in range(4)]
    for each, inputs in zip(jobs, (with_hint, without, other_hint, without), strict=True):
        each.rows = (inputs,)
    assert grouped(jobs) == [jobs[:2], [jobs[2]], [jobs[3]]]
    feeds = stacked([with_hint, without])
    assert {name: array.shape for name, array in feeds.items()} == {"encoder_hidden_states": (2, 77, 8), "hint": (2, 3, 2, 2)}
    assert feeds["hint"].sum(axis=(1, 2, 3)).tolist() == [12, 0]
