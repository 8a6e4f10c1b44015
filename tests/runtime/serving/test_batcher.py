from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from computed import SIZE, Feeds, Parts, request_for

from sdruntime.arrays import Array
from sdruntime.errors import NotFinite, QueueFull, QueueTimeout, SdruntimeError, SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.job import Job
from sdruntime.serving.batcher import Batcher, ImageFuture, Progress

WAIT = 60  # seconds after which a test is given up


def crowd() -> list[Request]:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return [
        request_for(1, steps=5),
        request_for(2, steps=9, sampler="euler_a", guidance=1.0),
        request_for(3, steps=3, sampler="heun", negative="dog", rescale=0.7),
        request_for(4, steps=7, sampler="dpmpp_2m", size=(128, 64)),
        request_for(5, steps=4, sampler="unipc", size=(128, 64)),
        request_for(6, steps=8, image=image, size=None, strength=0.5, options={"eta": 1.0}),
        request_for(7, steps=6, sampler="dpmpp_2m_sde", schedule="karras"),
        request_for(2**64 - 1, steps=2, sampler="lcm"),
    ]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path / "bundle")


@pytest.fixture
def pipe(parts: Parts) -> Iterator[Pipeline]:
    with parts.pipeline() as opened:
        yield opened


@pytest.fixture
def batcher(pipe: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipe) as opened:
        yield opened


def test_a_lone_job_draws_the_pipeline_s_picture_to_the_byte(parts: Parts, pipe: Pipeline) -> None:
    alone = [pipe(request).images[0] for request in crowd()]
    with Batcher(pipe) as batcher:
        for request, reference in zip(crowd(), alone, strict=True):
            drawing = batcher.submit(request)
            picture = drawing.result(WAIT)
            np.testing.assert_array_equal(picture.pixels, reference.pixels)
            assert picture.pixels.std() > 1
            assert picture.text() == reference.text()
            assert drawing.warnings == []


def test_jobs_in_company_draw_what_they_draw_alone_where_rows_do_not_meet(parts: Parts, pipe: Pipeline) -> None:
    alone = [pipe(request).pixels[0] for request in crowd()]
    with Batcher(pipe) as batcher:
        held: list[ImageFuture] = []
        parts.at_call(len(parts.unet.calls) + 1, lambda: held.extend(map(batcher.submit, crowd()[1:])))
        first = batcher.submit(crowd()[0])
        pictures = [first.result(WAIT).pixels, *(each.result(WAIT).pixels for each in held)]
    for ours, reference in zip(pictures, alone, strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_a_job_that_arrives_during_a_step_is_in_the_next_one(parts: Parts, batcher: Batcher) -> None:
    told: list[tuple[int, int]] = []  # calls before, step
    late: list[ImageFuture] = []

    def progress(at: Progress) -> None:
        told.append((len(parts.unet.calls), at.step))

    parts.at_call(2, lambda: late.append(batcher.submit(request_for(2, steps=3), progress=progress)))
    batcher.submit(request_for(1, steps=6)).result(WAIT)
    late[0].result(WAIT)
    assert parts.unet.rows == [2, 2, 4, 4, 4, 2]
    assert told == [(2, 0), (3, 1), (4, 2), (5, 3)]


def test_jobs_of_other_sizes_run_beside_in_calls_of_their_own(parts: Parts, batcher: Batcher) -> None:
    held: list[ImageFuture] = []
    parts.at_call(1, lambda: held.extend(batcher.submit(request_for(k, steps=2, size=(128, 64))) for k in (2, 3)))
    batcher.submit(request_for(1, steps=3)).result(WAIT)
    assert all(each.wait(WAIT) for each in held)
    assert [(call["batch"], call["width"]) for call in parts.unet.calls] == [(2, 8), (2, 8), (4, 16), (2, 8), (4, 16)]


def test_calls_are_split_to_what_the_engine_takes(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "bundle", most=3)
    with parts.pipeline() as pipe, Batcher(pipe, running=4) as batcher:
        held: list[ImageFuture] = []
        parts.at_call(1, lambda: held.extend(map(batcher.submit, [request_for(2, steps=1), request_for(3, steps=1)])))
        batcher.submit(request_for(1, steps=2)).result(WAIT)
        assert all(each.wait(WAIT) for each in held)
        assert parts.unet.rows == [2, 3, 3]
        assert Batcher(pipe).running == 1  # a second one would not fit into a call


def test_jobs_beyond_those_that_run_wait_in_order(parts: Parts, pipe: Pipeline) -> None:
    order: list[int] = []
    with Batcher(pipe, running=1) as batcher:
        drawings = [batcher.submit(request_for(k, steps=2), done=lambda each: order.append(each.result().seed)) for k in range(5)]
        assert all(each.wait(WAIT) for each in drawings)
    assert order == list(range(5))
    assert parts.unet.rows == [2] * 10


def test_a_full_queue_is_told_and_a_cancelled_job_makes_room(parts: Parts, pipe: Pipeline) -> None:
    faults: list[str] = []
    held: list[ImageFuture] = []

    def fill() -> None:
        held.extend(batcher.submit(request_for(k)) for k in (2, 3))
        with pytest.raises(QueueFull, match=r"3 requests are running or waiting, and the queue holds 2 besides the 1 that run"):
            batcher.submit(request_for(4))
        assert held[0].cancel()
        assert (held[0].done(), held[0].cancelled()) == (True, True)
        held.append(batcher.submit(request_for(5)))

    with Batcher(pipe, queue=2, running=1) as batcher:
        parts.at_call(2, lambda: _collect(faults, fill))
        batcher.submit(request_for(1)).result(WAIT)
        assert faults == []
        assert [each.result(WAIT).seed for each in held[1:]] == [3, 5]
        assert held[0].timings.denoise == 0


def test_a_cancelled_job_ends_at_the_next_boundary_and_the_others_go_on(parts: Parts, batcher: Batcher) -> None:
    late: list[ImageFuture] = []
    running: list[bool] = []

    def act(feeds: Feeds) -> None:
        if len(parts.unet.calls) == 1:
            late.append(batcher.submit(request_for(2, steps=50)))
        if len(parts.unet.calls) == 3:
            running.extend([late[0].running(), late[0].cancel(), late[0].cancel(), late[0].done()])

    parts.unet.before = act
    drawing = batcher.submit(request_for(1, steps=5))
    assert drawing.result(WAIT).pixels.std() > 1
    with pytest.raises(CancelledError):
        late[0].result(WAIT)
    assert running == [True, True, True, False]
    assert (late[0].cancelled(), late[0].running(), late[0].cancel(), drawing.cancel()) == (True, False, True, False)
    assert parts.unet.rows == [2, 4, 4, 2, 2]


def test_progress_can_cancel(parts: Parts, batcher: Batcher) -> None:
    drawing: list[ImageFuture] = []
    ready = threading.Event()

    def progress(at: Progress) -> None:
        ready.wait(WAIT)
        if at.step == 2:
            drawing[0].cancel()

    drawing.append(batcher.submit(request_for(steps=9), progress=progress))
    ready.set()
    assert drawing[0].wait(WAIT)
    assert drawing[0].cancelled()
    assert len(parts.unet.calls) == 2


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"size": (60, 64)}, SettingError, "size 60x64: both sides must be multiples of 64"),
        ({"sampler": "ddim", "schedule": "karras"}, SettingError, "ddim uses the trained timesteps"),
        ({"steps": 999, "sampler": "lcm"}, SettingError, "999 steps: at most 50, as the model was distilled"),
        ({"options": {"predict_x0": True}}, SettingError, "option predict_x0: ddim has no such option"),
    ],
)
def test_a_wrong_setting_ends_its_job_alone(
    parts: Parts, batcher: Batcher, wrong: dict[str, Any], kind: type[Exception], text: str
) -> None:
    held: list[ImageFuture] = []
    parts.at_call(1, lambda: held.append(batcher.submit(request_for(2, **wrong))))
    assert batcher.submit(request_for(1)).result(WAIT).pixels.std() > 1
    with pytest.raises(kind, match=text):
        held[0].result(WAIT)
    assert parts.unet.rows == [2] * 4


def test_numbers_that_are_not_finite_end_the_job_whose_row_they_are_in(parts: Parts, pipe: Pipeline) -> None:
    alone = [pipe(request_for(k, steps=5)).pixels[0] for k in (1, 3)]
    parts.unet.calls.clear()

    def spoil(outputs: dict[str, Array]) -> None:
        if len(parts.unet.calls) == 3:  # unconditional rows of jobs 1 to 3, then conditional ones
            outputs["out_sample"][4, 0, 0, 0] = np.nan

    with Batcher(pipe) as batcher:
        held: list[ImageFuture] = []
        parts.at_call(1, lambda: held.extend(batcher.submit(request_for(k, steps=5)) for k in (2, 3)))
        parts.unet.after = spoil
        first = batcher.submit(request_for(1, steps=5))
        np.testing.assert_array_equal(first.result(WAIT).pixels, alone[0])
        with pytest.raises(NotFinite, match=r"unet, step 2 of 5, sampler ddim: 1 of 256 numbers"):
            held[0].result(WAIT)
        np.testing.assert_array_equal(held[1].result(WAIT).pixels, alone[1])
    assert parts.unet.rows == [2, 6, 6, 4, 4, 4, 2]


@pytest.mark.parametrize("component", ["text_encoder", "vae_decoder"])
def test_a_failure_beside_the_loop_ends_its_job_alone(parts: Parts, batcher: Batcher, component: str) -> None:
    engine = parts.engines[component]
    seen = len(engine.calls)

    def fail(feeds: Feeds) -> None:
        if len(engine.calls) == seen + 2:
            raise SdruntimeError("the engine failed")

    engine.before = fail
    held: list[ImageFuture] = []
    parts.at_call(1, lambda: held.append(batcher.submit(request_for(2))))
    assert batcher.submit(request_for(1)).result(WAIT).pixels.std() > 1
    with pytest.raises(SdruntimeError, match="the engine failed"):
        held[0].result(WAIT)
    assert batcher.submit(request_for(3)).result(WAIT).pixels.std() > 1


def test_an_engine_that_fails_ends_the_jobs_of_that_call(parts: Parts, batcher: Batcher) -> None:
    """A job of another size that was done in the same round gets its image."""
    held: list[ImageFuture] = []
    parts.at_call(
        1, lambda: held.extend([batcher.submit(request_for(2, size=(128, 64))), batcher.submit(request_for(3, steps=9))])
    )

    def fail(outputs: dict[str, Array]) -> None:
        if outputs["out_sample"].shape[3] == 16 and len(parts.unet.calls) == 5:
            raise SdruntimeError("the engine failed")

    parts.unet.after = fail
    assert batcher.submit(request_for(1, steps=3)).result(WAIT).pixels.std() > 1  # its last step is that round's
    with pytest.raises(SdruntimeError, match="the engine failed"):
        held[0].result(WAIT)
    assert held[1].result(WAIT).pixels.std() > 1
    assert batcher.submit(request_for(4, size=(128, 64))).result(WAIT).pixels.std() > 1


def test_what_progress_raises_ends_its_job_alone(batcher: Batcher) -> None:
    def fail(at: Progress) -> None:
        if at.step == 2:
            raise RuntimeError("no terminal")

    bad, good = batcher.submit(request_for(1), progress=fail), batcher.submit(request_for(2))
    with pytest.raises(RuntimeError, match="no terminal"):
        bad.result(WAIT)
    assert good.result(WAIT).pixels.std() > 1


def test_a_preview_is_a_copy_of_the_latents(batcher: Batcher) -> None:
    told: list[Progress] = []

    def progress(at: Progress) -> None:
        assert at.latents is not None
        assert (at.clean is None) == (at.step == 0)
        clean = None if at.clean is None else at.clean.copy()
        told.append(Progress(step=at.step, steps=at.steps, latents=at.latents.copy(), clean=clean))
        at.latents[:] = np.nan  # nobody else's
        if at.clean is not None:
            at.clean[:] = np.nan

    assert batcher.submit(request_for(steps=3), progress=progress, preview=True).result(WAIT).pixels.std() > 1
    assert [(at.step, at.steps) for at in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert len({at.latents.tobytes() for at in told if at.latents is not None}) == 4
    assert len({at.clean.tobytes() for at in told if at.clean is not None}) == 3
    plain: list[Progress] = []
    batcher.submit(request_for(steps=1), progress=plain.append).result(WAIT)
    assert [at.latents for at in plain] == [None, None]


def test_timings_and_warnings(parts: Parts, batcher: Batcher) -> None:
    words = "word " * 40
    with_flat = parts.engines["vae_decoder"]
    with_flat.after = lambda outputs: outputs["sample"].fill(0)
    drawing = batcher.submit(Request(prompt=words, negative=words + "more", seed=3, steps=2, size=SIZE))
    drawing.result(WAIT)
    parts_of_it = (drawing.timings.queued, drawing.timings.encode, drawing.timings.denoise, drawing.timings.decode)
    assert min(parts_of_it) > 0
    assert sum(parts_of_it) <= drawing.timings.total
    assert len(drawing.warnings) == 3
    assert "image 0 (seed 3) is one colour all over" in drawing.warnings[-1]
    assert "of 'word word" in drawing.warnings[0]


def test_closing_cancels_what_is_not_done_and_takes_nothing_more(parts: Parts, pipe: Pipeline) -> None:
    threads = threading.active_count()
    drawings: list[ImageFuture] = []
    with Batcher(pipe, running=2) as batcher:
        started = threading.Event()
        parts.at_call(2, started.set)
        drawings += [batcher.submit(request_for(k, steps=900)) for k in range(5)]
        assert started.wait(WAIT)
    assert [each.cancelled() for each in drawings] == [True] * 5
    assert threading.active_count() == threads
    with pytest.raises(SdruntimeError, match="the batcher is not open"):
        batcher.submit(request_for())
    batcher.close()
    assert pipe(request_for()).pixels[0].std() > 1  # the pipeline is free again


def test_a_callback_may_close(pipe: Pipeline) -> None:
    submitted = threading.Event()

    def close(at: Progress) -> None:
        if at.step == 3:
            submitted.wait(WAIT)
            batcher.close()

    with Batcher(pipe) as batcher:
        drawings = [batcher.submit(request_for(k, steps=9), progress=close) for k in range(2)]
        submitted.set()
        assert all(each.wait(WAIT) and each.cancelled() for each in drawings)


def test_a_thread_that_ends_loses_no_job(parts: Parts, pipe: Pipeline) -> None:
    submitted = threading.Event()

    def leave() -> None:
        submitted.wait(WAIT)
        raise SystemExit

    with Batcher(pipe, running=1) as batcher:
        parts.at_call(2, leave)
        drawings = [batcher.submit(request_for(k)) for k in range(3)]
        submitted.set()
        for each in drawings:
            with pytest.raises(SystemExit):
                each.result(WAIT)
        with pytest.raises(SdruntimeError, match="not open"):
            batcher.submit(request_for())


@pytest.mark.parametrize("limits", [{"queue": 0}, {"running": 0}, {"running": -1}])
def test_limits_below_one_are_refused(pipe: Pipeline, limits: dict[str, int]) -> None:
    with pytest.raises(SettingError, match="at least 1 image"):
        Batcher(pipe, **limits)


def test_asyncio_can_wait_for_a_drawing_and_cancel_it(batcher: Batcher) -> None:
    async def both() -> tuple[np.ndarray, bool]:
        done = await asyncio.wrap_future(batcher.submit(request_for(1)))
        long = asyncio.wrap_future(inner := batcher.submit(request_for(2, steps=900)))
        long.cancel()
        await asyncio.sleep(0)  # lets the loop hand it on
        return done.pixels, inner.wait(WAIT) and inner.cancelled()

    image, cancelled = asyncio.run(both())
    assert image.std() > 1
    assert cancelled


def test_many_threads_with_random_cancels_lose_nothing(parts: Parts, pipe: Pipeline) -> None:
    """Each job ends, with its own image, cancelled, or with its own fault; and nothing of them stays."""
    requests = {seed: request_for(seed, steps=1 + seed % 7, size=(64, 64 + 64 * (seed % 2))) for seed in range(24)}
    alone = {seed: pipe(request).pixels[0] for seed, request in requests.items()}
    threads = threading.active_count()
    gc.collect()
    jobs = sum(type(each) in (Job, ImageFuture) for each in gc.get_objects())

    def client(number: int) -> dict[str, int]:
        chance, ends = random.Random(number), {"done": 0, "cancelled": 0, "refused": 0, "wrong": 0}
        for _ in range(40):
            seed = chance.randrange(24)
            try:
                drawing = batcher.submit(requests[seed] if chance.random() > 0.1 else request_for(seed, size=(1, 1)))
            except QueueFull:
                ends["refused"] += 1
                continue
            if chance.random() < 0.3:
                drawing.wait(chance.random() * 0.005)
                drawing.cancel()
            try:
                np.testing.assert_array_equal(drawing.result(WAIT).pixels, alone[seed])
                ends["done"] += 1
            except CancelledError:
                ends["cancelled"] += 1
            except SettingError:
                ends["wrong"] += 1
        return ends

    with Batcher(pipe, queue=3, running=4) as batcher, ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(client, range(8)))
        assert batcher._unfinished == {}
        assert batcher._jobs == {}
    assert [sum(each.values()) for each in ends] == [40] * 8
    for name in ends[0]:
        assert sum(each[name] for each in ends) > 0, name
    assert threading.active_count() == threads
    gc.collect()
    assert sum(type(each) in (Job, ImageFuture) for each in gc.get_objects()) == jobs


def _collect(faults: list[str], act: Callable[[], object]) -> None:
    """A failed assertion on the thread that draws is reported to the test."""
    try:
        act()
    except BaseException as error:
        faults.append(f"{type(error).__name__}: {error}")


def test_several_requests_are_taken_all_or_none(parts: Parts, pipe: Pipeline) -> None:
    requests = [Request(prompt="x", seed=seed, steps=4, size=(64, 64)) for seed in range(4)]
    with Batcher(pipe, queue=2, running=1) as batcher:
        with pytest.raises(QueueFull):
            batcher.submit_all(requests)
        assert batcher.counts.waiting + batcher.counts.running == 0
        futures = batcher.submit_all(requests[:3])
        images = [future.result(WAIT) for future in futures]
        assert [image.seed for image in images] == [0, 1, 2]
        counts = batcher.counts
    assert (counts.waiting, counts.running, counts.steps) == (0, 0, 12)
    assert 0 <= time.monotonic() - counts.last_step < WAIT


def test_a_request_that_waits_for_too_long_does_not_start(parts: Parts, pipe: Pipeline) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        entered.set()
        assert leave.wait(WAIT)

    with Batcher(pipe, running=1) as batcher:
        first = batcher.submit(Request(prompt="x", steps=2, size=(64, 64)), progress=hold)
        assert entered.wait(WAIT)
        late = batcher.submit(Request(prompt="x", steps=2, size=(64, 64)), patience=0.0)
        patient = batcher.submit(Request(prompt="x", steps=2, size=(64, 64)), patience=WAIT)
        time.sleep(0.01)
        leave.set()
        with pytest.raises(QueueTimeout, match=r"waited for \d+\.\d s and did not start"):
            late.result(WAIT)
        assert first.result(WAIT).seed == 0
        assert patient.result(WAIT).seed == 0


def test_a_job_that_finishes_early_gives_the_estimate_of_its_image(parts: Parts, pipe: Pipeline) -> None:
    """What `preview` shows in full after that step, decoded."""
    request = Request(prompt="x", seed=3, steps=5, size=(64, 64))
    stream = pipe.stream(request)
    for state in stream:
        if state.step == 2:
            [expected] = pipe.preview(state.jobs, "full")
            break
    futures: list[ImageFuture] = []

    def finish(progress: Progress) -> None:
        if progress.step == 2:
            assert futures[0].finish()

    with Batcher(pipe) as batcher:
        with batcher._changed:
            futures.append(batcher.submit(request, progress=finish))
        image = futures[0].result(WAIT)
        assert not futures[0].finish()
        np.testing.assert_array_equal(image.pixels, expected)
        whole = batcher.submit(request).result(WAIT)
        assert not np.array_equal(whole.pixels, image.pixels)


def test_a_request_that_waits_is_cancelled_when_it_is_to_finish(parts: Parts, pipe: Pipeline) -> None:
    entered, leave = threading.Event(), threading.Event()
    with Batcher(pipe, running=1) as batcher:
        first = batcher.submit(Request(prompt="x", steps=1, size=(64, 64)), progress=lambda _: (entered.set(), leave.wait(WAIT)))
        assert entered.wait(WAIT)
        second = batcher.submit(Request(prompt="x", steps=1, size=(64, 64)))
        assert second.finish()
        assert second.cancelled()
        leave.set()
        assert first.result(WAIT).seed == 0
