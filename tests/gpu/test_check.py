"""What `make gpu-test` asserts and `make gpu-report` writes, on the fakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import PROMPT
from trt.machine import Machine

from benchmarks.gpu import tasks
from benchmarks.gpu.check import FLOORS, LOOP_FLOOR, faults
from sdruntime.backends.trt import worker
from sdruntime.errors import EngineError


def checked(bundle: Path, backend: str, reference: Path) -> dict[str, Any]:
    job = {"bundle": str(bundle), "backend": backend, "prompt": PROMPT, "reference": str(reference), "diffusers": ""}
    return tasks.run("check", job, apart=False)


def test_a_backend_draws_the_cpus_pictures_and_leaves_nothing(here: Machine, sd1_bundle: Path, reference: Path) -> None:
    told = checked(sd1_bundle, here.backend, reference)
    assert faults(told) == []
    assert (told["backend"], told["stage"], told["precision"]) == (here.backend, "drawn", "fp32")
    assert told["target"] == {"tensorrt": "sm90", "tensorrt-rtx": "sm86"}[here.backend]
    assert set(told["built"]) == {"text_encoder", "vae_encoder", "vae_decoder", "unet", "step"}
    assert set(told["psnr"]) == set(told["psnr_loop"]) == {"one", "four", "unlike", "image"}
    assert min(told["psnr"].values()) >= FLOORS["fp32"]
    assert min(told["psnr_loop"].values()) >= LOOP_FLOOR
    assert told["loops"]["device"]["waits_per_step"] == 0
    assert told["loops"]["device"]["waits"] == 1
    assert told["loops"]["numpy"]["waits_per_step"] == 1
    assert told["left"] == 0


def test_half_precision_is_held_against_the_same_pictures(here: Machine, sd1_fp16_bundle: Path, reference: Path) -> None:
    told = checked(sd1_fp16_bundle, here.backend, reference)
    assert faults(told) == []
    assert told["precision"] == "fp16"
    assert FLOORS["fp16"] <= min(told["psnr"].values()) < 120


def test_a_library_that_is_not_there_is_told_with_its_reason(
    machine: Callable[..., Machine], sd1_bundle: Path, reference: Path
) -> None:
    machine(None)
    for backend, reason in (("tensorrt", "tensorrt cannot be imported"), ("onnxruntime", "[onnxruntime-gpu]")):
        told = checked(sd1_bundle, backend, reference)
        assert told["stage"] == "missing"
        assert reason in told["missing"]
        assert [reason in each for each in faults(told)] == [True]


def test_a_gpu_that_tensorrt_rtx_does_not_list_is_tried_all_the_same(
    h100: Callable[[str], Machine], sd1_bundle: Path, reference: Path
) -> None:
    """As a fake would have it: what a real H100 says is for a real one to say, and is reported in the same way."""
    h100("tensorrt_rtx")
    told = checked(sd1_bundle, "tensorrt-rtx", reference)
    assert (told["stage"], told["target"]) == ("loaded", "ampere+")
    assert "incompatible device" in told["error"]
    assert faults(told) == [f"loaded, then: {told['error']}"]


def test_what_fails_is_told_with_how_far_it_came(
    here: Machine, sd1_bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise EngineError("this GPU is not supported")

    monkeypatch.setattr(worker, "work", refuse)
    told = checked(sd1_bundle, here.backend, reference)
    assert told["stage"] == "loaded"
    assert told["error"] == "EngineError: this GPU is not supported"
    assert faults(told) == ["loaded, then: EngineError: this GPU is not supported"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"psnr": {"one": 39.9}}, "one: PSNR 39.9 dB against the CPU, below 40.0"),
        ({"psnr_loop": {"one": 49.0}}, "one: PSNR 49.0 dB between the loop on the device and NumPy's, below 50.0"),
        ({"std": {"one": 3.0}}, "one: the image is flat (standard deviation 3.0)"),
        ({"loops": {"device": {"waits_per_step": 1.0}}}, "the host waits 1.0 times per step"),
        ({"left": 32 << 20}, "33,554,432 bytes leaked on the GPU after 3 pipelines"),
    ],
)
def test_every_fault_is_found(changes: dict[str, Any], fault: str) -> None:
    sound = {"stage": "drawn", "precision": "fp32", "psnr": {"one": 50.0}, "std": {"one": 60.0}, "loops": {}, "left": 0}
    assert faults(sound) == []
    assert faults(sound | changes) == [fault]
