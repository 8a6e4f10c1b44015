"""One clear error for each fault, of its class and with its numbers; nothing is left on the device, and the next call works."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt.fake_driver import ERRORS
from trt.machine import Machine

from sdruntime.backends.base.engine import EngineOptions
from sdruntime.errors import EngineError, OutOfSpace
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.stream import Stream
from sdruntime.system.cuda import CudaError

REQUESTS = [
    Request(prompt="a cat", seed=1, steps=3, size=(64, 64), sampler="dpmpp_2m"),
    Request(prompt="a dog", seed=2, steps=4, size=(128, 64), sampler="euler_a"),
]
# what is called to give something back, too: it tells nothing then
_QUIET = {
    *("cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuEventDestroy_v2", "cuGraphExecDestroy", "cuGraphDestroy"),
    *("cuDevicePrimaryCtxRelease_v2", "cuStreamSynchronize", "cuCtxSetCurrent"),
}
_EVERY = {
    *("cuMemAlloc_v2", "cuMemHostAlloc", "cuMemGetInfo_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"),
    *("cuStreamCreate", "cuStreamSynchronize", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"),
}
_GRAPHS = {
    *("cuMemcpyDtoDAsync_v2", "cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch"),
    *("cuEventCreate", "cuEventRecord", "cuEventQuery"),
}
LOOPS = {False: _EVERY, True: _EVERY | _GRAPHS}


@pytest.fixture
def folder(small_folder: Path) -> Path:
    return small_folder


def draw(pipe: Pipeline, *, on_device: bool) -> list[np.ndarray]:
    stream = pipe.stream(REQUESTS, on_device=on_device)
    for _ in stream:
        pass
    return stream.result.pixels


def whole(folder: Path, here: Machine, *, on_device: bool) -> list[np.ndarray]:
    """A pipeline opened, used and closed."""
    with Pipeline.open(folder, backend=here.backend) as pipe:
        return draw(pipe, on_device=on_device)


def same(ours: list[np.ndarray], reference: list[np.ndarray]) -> bool:
    return all((one == other).all() for one, other in zip(ours, reference, strict=True))


def calls_of(folder: Path, here: Machine, *, on_device: bool) -> Counter[str]:
    before = Counter(here.gpus.counts)
    whole(folder, here, on_device=on_device)
    found = here.gpus.counts - before
    return Counter({name: count for name, count in found.items() if name.startswith("cu")})


def assert_nothing_left(here: Machine) -> None:
    assert here.gpus.leaks() == []
    assert here.driver.retained == [0]


@pytest.mark.parametrize("on_device", [False, True], ids=["numpy", "device"])
def test_memory_that_runs_out_at_any_allocation(here: Machine, folder: Path, on_device: bool) -> None:
    reference = whole(folder, here, on_device=on_device)
    counted = calls_of(folder, here, on_device=on_device)
    for name, free in (("cuMemAlloc_v2", "bytes are needed on Fake RTX 3060, and"), ("cuMemHostAlloc", "page-locked")):
        assert counted[name] >= 8
        for k in range(counted[name]):
            with Pipeline.open(folder, backend=here.backend) as pipe:
                here.driver.fail_next(name, 2, after=k)
                with pytest.raises(OutOfSpace, match=free) as caught:
                    draw(pipe, on_device=on_device)
                assert "are free: close other programs that use the GPU" in str(caught.value)
                again = draw(pipe, on_device=on_device)  # where there is room again, the same pipeline generates the same
                assert same(again, reference)
            assert_nothing_left(here)  # though the error, with all that its traceback sees, is still here


@pytest.mark.parametrize(("on_device", "code"), [(False, 719), (True, 700)], ids=["numpy-719", "device-700"])
def test_a_device_that_breaks_down_at_any_call(here: Machine, folder: Path, on_device: bool, code: int) -> None:
    """From then on every call fails, as it is after an illegal access: the first error is the one that is reported."""
    reference = whole(folder, here, on_device=on_device)
    told: Counter[str] = Counter()
    for name, count in calls_of(folder, here, on_device=on_device).items():
        if name.startswith(("cuDevice", "cuDriver")) and name != "cuDevicePrimaryCtxRetain":
            continue
        for k in range(0, count, 1 if name != "cuCtxSetCurrent" else 11):
            here.driver.break_next(name, code, after=k)
            images, error = [], None
            try:
                images = whole(folder, here, on_device=on_device)
            except CudaError as caught:
                error = caught
            assert_nothing_left(here)
            here.gpus.broken = 0
            if error is None:  # the images were there already
                assert name in _QUIET
                assert same(images, reference)
                continue
            function, _, rest = str(error).partition(" ")
            assert rest == f"failed on device 0: {ERRORS[code][0]} ({code}): {ERRORS[code][1]}"
            assert function == name or name in _QUIET
            assert error.exit_code == 1
            told[function] += 1
    assert set(told) >= LOOPS[on_device]


_ONCE = _GRAPHS - {"cuStreamEndCapture"} | {"cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"}


def test_a_call_that_fails_once_spoils_one_drawing(here: Machine, folder: Path) -> None:
    reference = whole(folder, here, on_device=True)
    counted = calls_of(folder, here, on_device=True)
    for name in sorted(_ONCE):
        for k in range(counted[name]):
            with Pipeline.open(folder, backend=here.backend) as pipe:
                here.driver.fail_next(name, 1, after=k)
                with pytest.raises(CudaError, match=rf"^{name} failed on device 0: CUDA_ERROR_INVALID_VALUE \(1\)"):
                    draw(pipe, on_device=True)
                again = draw(pipe, on_device=True)
                assert same(again, reference)
            assert_nothing_left(here)


@pytest.mark.parametrize("on_device", [False, True], ids=["numpy", "device"])
def test_an_engine_that_does_not_run(here: Machine, folder: Path, on_device: bool) -> None:
    reference = whole(folder, here, on_device=on_device)
    before = here.gpus.counts["executions"]
    whole(folder, here, on_device=on_device)
    for k in range(here.gpus.counts["executions"] - before):
        with Pipeline.open(folder, backend=here.backend) as pipe:
            here.trt.fail_next("IExecutionContext.execute_async_v3", False, after=k)
            with pytest.raises(EngineError, match=r"^engine \S+: TensorRT did not run: no reason was given$") as caught:
                draw(pipe, on_device=on_device)
            assert caught.value.exit_code == 5
            again = draw(pipe, on_device=on_device)
            assert same(again, reference)
        assert_nothing_left(here)


@pytest.mark.parametrize("path", ["ICudaEngine.create_execution_context", "IExecutionContext.set_optimization_profile_async"])
def test_a_context_that_cannot_be_had(here: Machine, folder: Path, path: str) -> None:
    with Pipeline.open(folder, backend=here.backend) as pipe:
        here.trt.fail_next(path, None if "create" in path else False)
        with pytest.raises(EngineError, match=r"TensorRT (could not create an execution context|did not accept its profile 0)"):
            draw(pipe, on_device=True)
        draw(pipe, on_device=True)


def test_the_error_of_the_block_is_the_one_that_is_seen(here: Machine, folder: Path) -> None:
    """Though the device broke down meanwhile, and the loop under way learns of it at the end only."""
    for step in range(1, 4):
        streams = []

        def block(step: int = step, streams: list[Stream] = streams) -> None:
            with Pipeline.open(folder, backend=here.backend) as pipe:
                streams.append(pipe.stream(REQUESTS, on_device=True))
                for state in streams[0]:
                    if state.step == step:
                        here.driver.break_next("cuMemcpyDtoHAsync_v2", 700)
                        raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as caught:
            block()
        assert caught.value.__context__ is None
        with pytest.raises(CudaError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):  # not latents of an earlier step
            _ = streams[0].jobs[0].run.x
        assert_nothing_left(here)
        here.gpus.broken = 0


def test_a_loop_that_is_left_early_on_a_broken_device_gives_no_picture(here: Machine, folder: Path) -> None:
    with Pipeline.open(folder, backend=here.backend) as pipe:
        stream = pipe.stream(REQUESTS, on_device=True)
        next(iter(stream))
        here.driver.break_next("cuStreamSynchronize", 719)
        with pytest.raises(CudaError, match="cuStreamSynchronize failed on device 0: CUDA_ERROR_LAUNCH_FAILED"):
            _ = stream.result
    assert_nothing_left(here)
    here.gpus.broken = 0


def test_a_device_that_breaks_down_in_a_whole_loop(here: Machine, small_folder: Path) -> None:
    """All steps as one graph, in the second image."""
    prompts, once = ["a cat", "a dog"], {"steps": 4, "seed": 1, "size": (64, 64), "sampler": "dpmpp_2m"}
    options = EngineOptions(whole_loop=True)
    with Pipeline.open(small_folder, options=options) as pipe:
        reference = pipe(prompts, **once).pixels
        before = Counter(here.gpus.counts)
        assert same(pipe(prompts, **once).pixels, reference)
        counted = here.gpus.counts - before
    assert counted["launches"] == 1
    for name in sorted(_GRAPHS & set(counted)):
        for k in range(counted[name]):
            for code, plan in ((1, here.driver.fail_next), (700, here.driver.break_next)):
                if code == 1 and name == "cuStreamEndCapture":
                    continue
                with Pipeline.open(small_folder, options=options) as pipe:
                    pipe(prompts, **once)
                    plan(name, code, after=k)
                    with pytest.raises(CudaError, match=rf"^{name} failed on device 0: {ERRORS[code][0]}"):
                        pipe(prompts, **once)
                    if code == 1:
                        assert same(pipe(prompts, **once).pixels, reference)
                here.gpus.broken = 0
                assert_nothing_left(here)


def test_weights_that_the_library_finds_no_room_for(here: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each engine in turn, as it is opened."""
    memory, real = here.gpus.memory, here.gpus.memory.allocate
    for k in range(4):
        asked: list[str] = []

        def allocate(size: int, device: int, label: str, k: int = k, asked: list[str] = asked) -> Any:
            asked += [label] if label == "engine weights" else []
            return None if label == "engine weights" and len(asked) == k + 1 else real(size, device, label)

        monkeypatch.setattr(memory, "allocate", allocate)
        with pytest.raises(
            OutOfSpace, match=r"^engine \S+: [\d,]+ bytes .* do not fit on Fake RTX 3060, where [\d,]+ are free"
        ) as caught:
            whole(folder, here, on_device=True)
        assert caught.value.exit_code == 3
        assert_nothing_left(here)
