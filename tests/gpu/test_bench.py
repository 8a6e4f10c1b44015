"""The benchmark on the fakes, tiny checkpoints for full-size ones: every key of its document, and how a failure is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trt.machine import Machine

from benchmarks.gpu import bench, tasks
from benchmarks.gpu.table import lines
from sdexport.bench import timing
from sdexport.bench.diffusers import COMPILED, EAGER
from sdruntime.backends.trt.binding import Binding
from sdruntime.errors import EngineError
from sdruntime.verification.metrics import EQUAL

pytest.importorskip("diffusers", reason="the rival")
CASES = {"sd15": (2.0, ((4, 1), (3, 4)))}
TIMES = {"max_ms", "p50_ms", "p95_ms", "min_ms", "n"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_num_threads(1)  # tiny networks are quickest so
    monkeypatch.setattr(bench, "CASES", CASES)
    monkeypatch.setattr(bench, "QUEUE", {"sd15": 8})
    monkeypatch.setattr(timing, "WARM", 1)
    monkeypatch.setattr(timing, "LEAST", 2)


def options(bundle: Path, checkpoint: Path, **changes: Any) -> bench.Options:
    settings: dict[str, Any] = {
        "models": ["sd15"],
        "bundles": {"sd15": bundle},
        "checkpoints": {"sd15": checkpoint},
        "seconds": 0.01,
        "compiled": False,
        "apart": False,
        "rival_device": "cpu",
    }
    return bench.Options(**(settings | changes))


@pytest.fixture
def bundle(sd1_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_bundle, tmp_path / "bundle"))


def run(asked: bench.Options, folder: Path) -> tuple[int, dict[str, Any]]:
    path = folder / "results" / "gpu.json"
    code = bench.bench(asked, json_file=path)
    return code, json.loads(path.read_text(encoding="utf-8"))


def test_a_run_tells_everything(
    here: Machine, bundle: Path, sd1_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = run(options(bundle, sd1_checkpoint), tmp_path)
    assert (code, bench.failures(document), bench.ran(document)) == (0, [], [here.backend])
    assert document["schema"] == bench.SCHEMA
    assert document["gpu"]["name"] == here.gpus.name
    assert document["versions"][here.backend] == here.trt.__version__
    assert "cannot" in document["backends"]["onnxruntime"]["missing"] or "cuda" in document["backends"]["onnxruntime"]["missing"]
    model = document["models"]["sd15"]
    assert model["precision"] == "fp32"
    ours = model["backends"][here.backend]
    assert set(ours["built"]) == {"text_encoder", "vae_encoder", "vae_decoder", "unet", "step"}
    assert [len(ours["components"][name]) for name in ("text_encoder", "unet", "vae_decoder")] == [1, 2, 2]
    assert [each["dims"]["batch"] for each in ours["components"]["unet"]] == [2, 8]
    for each in (one for part in ours["components"].values() for one in part):
        assert set(each["call"]) == set(each["device"]) == TIMES
        assert 0 < each["device"]["min_ms"] <= each["device"]["p50_ms"] <= each["device"]["p95_ms"]
    assert ours["psnr_numpy_loop"] >= 50
    assert (ours["loops"]["device"]["waits_per_step"], ours["loops"]["numpy"]["waits_per_step"]) == (0, 1)
    assert ours["loops"]["device"]["driver_calls"]["cuGraphLaunch"] > 0
    assert all({"wall_ms", "cpu_ms", "outside_unet_ms"} <= set(each) for each in ours["loops"].values())
    assert ours["psnr_whole_loop"] >= 50
    assert [set(each) for each in ours["pictures"].values()] == [TIMES, TIMES]
    assert ours["memory"] > 0
    assert ours["memory_after_close"] == 0
    assert [(case["steps"], case["batch"]) for case in model["cases"]] == [(4, 1), (3, 4)]
    for case in model["cases"]:
        assert set(case["contestants"]) == {EAGER, here.backend, f"{here.backend}, NumPy loop"}
        assert all(set(each) >= TIMES for each in case["contestants"].values())
        assert case["contestants"][here.backend]["psnr"] >= 60  # against diffusers on the CPU, fp32 both
        assert case["contestants"][here.backend]["std"] >= 10
        assert set(case["times_as_fast"][here.backend]) == {EAGER, f"{here.backend}, NumPy loop"}
    queue = model["queue"][here.backend]
    assert queue["jobs"] == 8
    assert queue["together"]["psnr"] >= 60
    assert queue["times_as_fast"] > 0
    told = capsys.readouterr().out
    assert f"## {here.gpus.name}" in told
    assert f"| 4 | 1 | {here.backend} |" in told
    assert f"8 jobs of 4 steps, {here.backend}: together" in told


@pytest.mark.parametrize("here", ["tensorrt"], indirect=True)
def test_the_compiled_rival_joins_the_race_of_each_case(
    here: Machine, bundle: Path, sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda what, **how: asked.append(how) or what)
    _, document = run(options(bundle, sd1_checkpoint, compiled=True, short=True), tmp_path)
    assert asked == [{"mode": "max-autotune", "fullgraph": True}] * 2
    (case,) = document["models"]["sd15"]["cases"]
    assert {EAGER, COMPILED, here.backend} <= set(case["contestants"])
    assert case["times_as_fast"][here.backend][COMPILED] > 0
    assert case["compile_s"] >= 0


@pytest.mark.parametrize("here", ["tensorrt"], indirect=True)
def test_a_compiler_that_fails_leaves_the_eager_race(
    here: Machine, bundle: Path, sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr(torch, "compile", refuse)
    code, document = run(options(bundle, sd1_checkpoint, compiled=True, short=True), tmp_path)
    assert code == 1
    assert bench.failures(document) == ["sd15: torch.compile failed: RuntimeError: no compiler is here"]
    assert document["models"]["sd15"]["queue"][here.backend]["times_as_fast"] > 0
    assert EAGER in document["models"]["sd15"]["cases"][0]["contestants"]


@pytest.mark.parametrize("here", ["tensorrt"], indirect=True)
def test_a_backend_that_fails_is_told_and_the_rest_goes_on(
    here: Machine, bundle: Path, sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise EngineError(f"{Path.home()}/models/unet.plan is of another GPU")

    monkeypatch.setattr(Binding, "enqueue", refuse)
    code, document = run(options(bundle, sd1_checkpoint, short=True), tmp_path)
    assert code == 1
    assert bench.failures(document) == [f"sd15, {here.backend}: EngineError: .../unet.plan is of another GPU"]
    assert bench.ran(document) == []
    (case,) = document["models"]["sd15"]["cases"]
    assert list(case["contestants"]) == [EAGER]
    assert any("failed: EngineError" in line for line in lines(document))


@pytest.mark.parametrize("here", ["tensorrt"], indirect=True)
def test_what_is_required_and_does_not_run_is_a_failure(
    here: Machine, bundle: Path, sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("REQUIRE", f"{here.backend},onnxruntime")
    code, _ = run(options(bundle, sd1_checkpoint, short=True, rivals=False), tmp_path)
    assert code == 1
    assert capsys.readouterr().err.count("FAILED REQUIRE: onnxruntime did not run: ") == 1


@pytest.mark.parametrize("here", ["tensorrt"], indirect=True)
def test_without_diffusers_a_bundle_must_be_named(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sdexport.bench.diffusers.why_unavailable", lambda device="cuda": "diffusers is not installed")
    code, document = run(options(tmp_path, tmp_path, bundles={}, checkpoints={}, work=tmp_path / "work"), tmp_path)
    assert code == 1
    assert document["diffusers"] == "diffusers is not installed"
    assert "pass it with --bundle sd15=" in document["models"]["sd15"]["error"]


@pytest.mark.parametrize("text", ["--models=sd3", "--backends=openvino"])
def test_an_unknown_name_is_a_fault_of_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main([text])
    assert ended.value.code == 2
    assert "known are" in capsys.readouterr().err


def job(bundle: Path) -> dict[str, Any]:
    return {"bundle": str(bundle), "backend": "tensorrt", "prompt": "", "reference": "", "diffusers": ""}


def test_a_child_tells_what_it_found(tmp_path: Path) -> None:
    told = tasks.run("check", job(tmp_path / "nowhere"))
    assert "nowhere" in told["error"]


def test_a_child_draws(sd1_checkpoint: Path, tmp_path: Path) -> None:
    import numpy as np

    asked = {"checkpoint": str(sd1_checkpoint), "prompt": "a cat", "device": "cpu", "out": str(tmp_path / "pictures.npz")}
    assert tasks.run("diffusers_pictures", asked) == {"out": asked["out"]}
    with np.load(asked["out"]) as kept:
        assert {name: each.shape for name, each in kept.items()} == {"one": (1, 64, 64, 3), "four": (4, 64, 64, 3)}


@pytest.mark.full
@pytest.mark.parametrize("here", ["tensorrt"], indirect=True)
def test_a_checkpoint_is_exported_where_no_bundle_is_named(here: Machine, sd1_checkpoint: Path, tmp_path: Path) -> None:
    asked = options(tmp_path, sd1_checkpoint, bundles={}, work=tmp_path / "work", rivals=False, short=True)
    code, document = run(asked, tmp_path)
    assert (code, document["models"]["sd15"]["precision"]) == (0, "fp16")
    assert document["models"]["sd15"]["export_s"] > 0
    assert (tmp_path / "work" / "sd15-fp16" / "manifest.json").exists()
    _, again = run(asked, tmp_path)
    assert "export_s" not in again["models"]["sd15"]
    assert again["models"]["sd15"]["backends"][here.backend]["built"]["unet"] == {"present": True}


def test_a_child_that_is_killed_or_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, sys, time\ntime.sleep(float(os.environ['LATE']))\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LATE", "0")
    assert tasks.run("check", job(tmp_path))["error"].startswith("check: its process ended with signal 6")
    monkeypatch.setenv("LATE", "60")
    assert tasks.run("check", job(tmp_path), limit=0.5)["error"].startswith("check: stopped after 0 s")


def test_likeness_of_pictures() -> None:
    import numpy as np

    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert timing.psnr([black], [black]) == EQUAL
    assert timing.psnr([black, black], [black, white]) == 0
    assert timing.psnr([black], [black + np.uint8(1)]) == pytest.approx(48.13, abs=0.01)


def test_a_race_drops_who_fails_and_stops_in_time() -> None:
    import numpy as np

    calls: list[str] = []

    def draw(name: str) -> Callable[[int], list[Any]]:
        def drawing(seed: int) -> list[Any]:
            calls.append(name)
            if name == "b" and calls.count("b") == 2:
                raise ValueError("b is out")
            return [np.zeros((2, 2, 3), np.uint8)]

        return drawing

    told = timing.race({"a": draw("a"), "b": draw("b"), "c": draw("c")}, seconds=0, until=0)
    assert calls[:6] == ["a", "b", "c"] * 2
    assert told["b"] == {"error": "ValueError: b is out"}
    assert (told["a"]["n"], told["c"]["n"]) == (1, 1)
