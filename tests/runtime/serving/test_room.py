"""room.py: jobs, models and workers; the workers are processes with fake engines."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, with_fake_engines

from sdruntime.errors import QueueFull, SdruntimeError, UnknownName
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.serving import room as room_module
from sdruntime.serving import worker as worker_module
from sdruntime.serving.job import RoomJob
from sdruntime.serving.metrics import exposition
from sdruntime.serving.room import LOST, Room

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="workers are reached over Unix sockets"),
    pytest.mark.slow,
]
WAIT = 60.0
OPTIONS = {"backend": "fake", "running": 2, "session": {"seconds": "0.005"}}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: with_fake_engines(make_bundle(folder / name)).folder for name in ("one", "two")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "_TICK", 0.02)


def job(model: str = "one", *, steps: int = 2, **fields: Any) -> RoomJob:
    request = {"prompt": "a cat", "width": 64, "height": 64, "seed": 7, "steps": steps}
    known = {key: fields.pop(key) for key in ("patience", "preview") if key in fields}
    preview = {"preview": True} if known.pop("preview", False) else {}
    return RoomJob(model=model, fields={"request": request | fields, **preview}, **known)


def run(work: Callable[[Room], Awaitable[None]], bundles: dict[str, Path], **settings: Any) -> None:
    async def whole() -> None:
        async with Room(bundles, options=settings.pop("options", OPTIONS), **settings) as room:
            await asyncio.wait_for(work(room), WAIT)
        assert all(model.worker is None for model in room.models.values())

    asyncio.run(whole())


async def over(*jobs: RoomJob) -> list[str]:
    for one in jobs:
        await one.wait()
    return [one.state for one in jobs]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


LONG = 900  # steps: longer than any test


def test_a_job_gives_the_image_and_the_settings_of_the_pipeline(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        assert not room.ready
        first, second = job(steps=3, preview=True), job(seed=8)
        room.submit([first, second])
        assert (room.position(first), room.position(second)) == (0, 1)
        seen = [(now.state, now.step, now.clean is not None) async for now in first.watch()]
        assert await over(first, second) == ["done", "done"]
        assert seen[0] == ("waiting", 0, False)
        assert seen[-1] == ("done", 3, False)
        assert first.finished is not None
        assert first.created <= first.started <= first.ended  # type: ignore[operator]
        with Pipeline.open(bundles["one"], backend="fake") as pipe:
            image = pipe("a cat", seed=7, steps=3, size=(64, 64)).images[0]
        np.testing.assert_array_equal(first.finished.pixels, image.pixels)
        assert first.finished.parameters == image.text()["parameters"]
        assert room.ready
        text = exposition(room.metrics)
        assert 'sdruntime_images_total{outcome="done"} 2\n' in text
        assert 'sdruntime_worker_up{model="one"} 1\n' in text
        assert "sdruntime_steps_total" in text

    run(work, bundles)


def test_jobs_are_taken_all_or_none(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        with pytest.raises(QueueFull, match="holds 2"):
            room.submit([job(), job(), job()])
        with pytest.raises(UnknownName, match="model"):
            room.submit([job(), job("three")])
        assert not room.waiting
        jobs = [job(), job()]
        room.submit(jobs)
        assert await over(*jobs) == ["done", "done"]
        room.stop_taking()
        with pytest.raises(SdruntimeError, match="shutting down"):
            room.submit([job()])
        assert room.rejected.values == {("queue_full",): 3, ("closing",): 1}

    run(work, bundles, queue=2)


def test_jobs_are_cancelled_and_finished_early(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        jobs = [job(steps=LONG) for _ in range(5)]
        room.submit(jobs)
        await until(lambda: jobs[1].step > 1)
        room.finish(jobs[0])
        room.cancel(jobs[1])
        for one in jobs[2:]:
            room.cancel(one)
        assert jobs[4].state == "cancelled"  # it waited
        assert await over(*jobs) == ["done", *["cancelled"] * 4]
        assert jobs[0].finished is not None
        assert jobs[1].failure is not None
        assert jobs[1].failure.code == 130

    run(work, bundles)


def test_a_wrong_job_fails_alone(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        jobs = [job(sampler="nothing"), job()]
        room.submit(jobs)
        assert await over(*jobs) == ["failed", "done"]
        assert jobs[0].failure is not None
        assert (jobs[0].failure.code, "unknown sampler" in jobs[0].failure.message) == (2, True)

    run(work, bundles)


def test_models_take_turns(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models of which one is open at a time: nobody is overtaken more often than the bound."""
    monkeypatch.setattr(room_module, "MOST_OVERTAKES", 3)
    started: list[str] = []

    async def work(room: Room) -> None:
        hold = job(steps=LONG)
        room.submit([hold])
        await until(lambda: hold.step > 0)
        jobs = [job("two"), *(job() for _ in range(8))]
        room.submit(jobs)
        await until(lambda: jobs[3].over)
        await asyncio.sleep(0.05)
        assert [one.state for one in jobs] == ["waiting", *["done"] * 3, *["waiting"] * 5]
        assert jobs[0].overtaken == 3
        room.cancel(hold)
        for one in jobs:
            await one.wait()
        started.extend(one.model for one in sorted(jobs, key=lambda one: one.started or 0))
        assert [model.stage for model in room.models.values()].count("ready") == 1

    run(work, bundles)
    assert started == [*["one"] * 3, "two", *["one"] * 5]


def test_two_models_may_be_open_at_once(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        jobs = [job("one"), job("two"), job("one"), job("two")]
        room.submit(jobs)
        assert await over(*jobs) == ["done"] * 4
        assert {model.stage for model in room.models.values()} == {"ready"}

    run(work, bundles, keep=2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_costs_the_jobs_that_it_runs(bundles: dict[str, Path], how: signal.Signals) -> None:
    messages: list[str] = []

    async def work(room: Room) -> None:
        jobs = [job(steps=LONG), job(steps=LONG), job(steps=LONG), job(), job()]
        room.submit(jobs)
        await until(lambda: jobs[0].step > 0 and len(room.running) == 3)
        worker = room.models["one"].worker
        assert worker is not None
        os.kill(worker.pid, how)
        await until(lambda: jobs[0].over)
        assert not room.ready
        assert await over(*jobs) == ["failed"] * 3 + ["done"] * 2
        assert {one.failure.reason for one in jobs if one.failure} == {LOST}
        assert room.ready
        assert room.restarts.values == {("crash",): 1}

    run(work, bundles, log=lambda level, message: messages.append(message))
    assert any(f"ended by signal {how.value}; the next one starts in 1 s" in message for message in messages)


def test_a_dead_worker_starts_again_without_a_job(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        room.open("one")
        await until(lambda: room.ready)
        worker = room.models["one"].worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: not room.ready)
        await until(lambda: room.ready)

    run(work, bundles)


def test_a_worker_that_hangs_is_ended(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        jobs = [job(steps=LONG), job()]
        room.submit(jobs)
        await until(lambda: jobs[0].step > 0)
        worker = room.models["one"].worker
        assert worker is not None
        room.models["one"].silence = 0.0
        room.watchdog = 0.5
        os.kill(worker.pid, signal.SIGSTOP)
        await until(lambda: jobs[0].over)
        assert jobs[0].failure is not None
        assert jobs[0].failure.reason == LOST
        room.watchdog = WAIT
        last = job()
        room.submit([last])
        assert await over(last) == ["done"]

    run(work, bundles)


def test_a_bundle_that_cannot_be_opened_ends_its_jobs(bundles: dict[str, Path], tmp_path: Path) -> None:
    async def work(room: Room) -> None:
        jobs = [job("none"), job("none"), job("one")]
        room.submit(jobs)
        assert await over(*jobs) == ["failed", "failed", "done"]
        assert jobs[0].failure is not None
        assert (jobs[0].failure.code, "no bundle" in jobs[0].failure.message or "none" in jobs[0].failure.message) == (5, True)
        again = job("none")
        room.submit([again])
        assert await over(again) == ["failed"]

    run(work, {**bundles, "none": tmp_path / "none"})


def test_a_worker_that_never_opens_ends_its_jobs_after_some_tries(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setattr("sdruntime.serving.worker.module_command", lambda *words: [sys.executable, "-c", "raise SystemExit(7)"])

    async def work(room: Room) -> None:
        one = job()
        room.submit([one])
        assert await over(one) == ["failed"]
        assert one.failure is not None
        assert one.failure.message == "3 workers in a row were lost (the worker ended with code 7)"

    run(work, bundles)


def test_a_job_that_waits_for_too_long_ends(bundles: dict[str, Path]) -> None:
    async def work(room: Room) -> None:
        hold = [job(steps=LONG) for _ in range(3)]
        late = job(patience=0.05)
        room.submit([*hold, late])
        assert await over(late) == ["failed"]
        assert late.failure is not None
        assert late.failure.reason == "queue_timeout"

    run(work, bundles)


def test_closing_cancels_what_is_left(bundles: dict[str, Path]) -> None:
    jobs = [job(steps=LONG) for _ in range(5)]

    async def work(room: Room) -> None:
        room.submit(jobs)
        await until(lambda: jobs[0].step > 0)

    run(work, bundles)
    assert {one.state for one in jobs} == {"cancelled"}


@pytest.mark.parametrize("waits", [False, True])
def test_a_room_that_closes_at_once_waits_for_no_worker(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """A stopped worker does not leave by itself; neither would one that opens a large bundle."""
    monkeypatch.setattr(room_module, "_LEAVING", 100 * WAIT)
    monkeypatch.setattr(worker_module, "_PATIENCE", 100 * WAIT)

    async def work(room: Room) -> None:
        long = job(steps=LONG)
        room.submit([long])
        await until(lambda: long.step > 0)
        worker = room.models["one"].worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGSTOP)
        closing = asyncio.ensure_future(room.close()) if waits else None
        await asyncio.sleep(0.05)
        room.close_at_once()
        await (closing or room.close())
        assert long.state == "cancelled"

    run(work, bundles)
