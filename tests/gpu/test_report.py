"""reports/*.json and docs/support.md: what is in them, what must never be, and that the page is what the reports say."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu.conftest import PROMPT
from places import ROOT
from trt.machine import Machine
from trt.surface import VERSIONS

from benchmarks.gpu import bench, check, report, support
from benchmarks.gpu.clean import clean, cleaned
from sdexport.bench import timing
from sdruntime.backends.trt import worker
from sdruntime.errors import EngineError

FIXTURE = Path(__file__).with_name("fixture-report.json")


@pytest.fixture
def made(
    here: Machine,
    sd1_bundle: Path,
    sd1_fp16_bundle: Path,
    sd1_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, dict[str, Any]]:
    """Reports of a fake machine, tiny checkpoints in place of the real ones."""
    monkeypatch.setattr(bench, "CASES", {"sd15": (2.0, ((20, 1), (3, 4)))})
    monkeypatch.setattr(timing, "WARM", 1)
    monkeypatch.setattr(timing, "LEAST", 2)
    monkeypatch.setattr(check, "CYCLES", 1)
    wanted = report.Wanted(
        shapes=[sd1_bundle, sd1_fp16_bundle],
        checkpoint=sd1_checkpoint,
        prompt=PROMPT,
        bench=bench.Options(
            models=["sd15"],
            bundles={"sd15": Path(shutil.copytree(sd1_fp16_bundle, tmp_path / "sd15"))},
            seconds=0.01,
            compiled=False,
            apart=False,
            rival_device="cpu",
        ),
    )
    return report.reports(wanted)


def test_a_report_of_each_library_that_is_here(
    here: Machine,
    made: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = report.write(made, tmp_path / "reports")
    gpu = {"tensorrt": "nvidia-h100-80gb-hbm3", "tensorrt-rtx": "nvidia-geforce-rtx-3060"}[here.backend]
    names = [f"{gpu}-{here.backend}-{here.trt.__version__}.json", f"{gpu}-onnxruntime-"]
    assert [path.name[: len(name)] for path, name in zip(paths, names, strict=True)] == names
    ours = json.loads(paths[0].read_text(encoding="utf-8"))
    assert (ours["schema"], report.status(ours)) == (report.SCHEMA, "ran")
    assert set(ours["gpu"]) == {"name", "capability", "memory", "cuda", "driver"}
    assert [each["precision"] for each in ours["checks"]] == ["fp32", "fp16"]
    assert all(min(each["psnr_diffusers"].values()) >= 30 for each in ours["checks"])
    short = ours["benchmarks"]["sd15"]
    assert [(case["steps"], case["batch"]) for case in short["cases"]] == [(20, 1)]
    assert short["cases"][0]["contestants"][here.backend]["p50_ms"] > 0
    assert short["loops"]["device"]["waits_per_step"] == 0
    assert report.print_summary(made) == 0
    assert f"{here.backend} {here.trt.__version__}: ran: PSNR against the CPU" in capsys.readouterr().out
    page = support.page([ours, json.loads(paths[1].read_text(encoding="utf-8"))])
    assert f"| {here.gpus.name} (" in page
    assert "ms |" in page.split("## On GPUs")[1]
    text = paths[0].read_text(encoding="utf-8")
    for private in (str(Path.home()) + "/", str(tmp_path), str(ROOT), "/tmp/"):
        assert private not in text
    for required, code in ((here.backend, 0), ("onnxruntime", 1)):
        monkeypatch.setenv("REQUIRE", required)
        assert report.print_summary(made) == code


def test_a_backend_that_fails_has_a_report_that_says_so(
    h100: Callable[[str], Machine], sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise EngineError(f"cannot parse {sd1_bundle}/unet/model.onnx | node 7")

    monkeypatch.setattr(worker, "work", refuse)
    h100("tensorrt")
    quick = bench.Options(models=[], backends=["tensorrt"], apart=False, rivals=False)
    made = report.reports(report.Wanted(shapes=[sd1_bundle], checkpoint=None, bench=quick, prompt=PROMPT))
    assert report.status(made["tensorrt"]) == "failed"
    assert report.print_summary(made) == 1
    row = next(line for line in support.page(list(made.values())).splitlines() if line.startswith("| NVIDIA H100"))
    assert "failed: fp32: loaded, then: EngineError: cannot parse .../model.onnx / node 7" in row


def test_a_gpu_that_the_library_does_not_list_is_told_and_no_fault(
    h100: Callable[[str], Machine], sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100("tensorrt_rtx")
    quick = bench.Options(models=[], backends=["tensorrt-rtx"], apart=False, rivals=False)
    made = report.reports(report.Wanted(shapes=[sd1_bundle], checkpoint=None, bench=quick, prompt=PROMPT))
    assert report.status(made["tensorrt-rtx"]) == "failed"
    page = support.page(list(made.values()))
    assert "| failed (a GPU that this library does not list): fp32: loaded, then: EngineError: " in page
    assert "incompatible device" in page
    assert report.print_summary(made) == 0
    monkeypatch.setenv("REQUIRE", "tensorrt-rtx")
    assert report.print_summary(made) == 1


def test_the_page_is_what_is_generated() -> None:
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert page == support.page(support.read(ROOT / "reports")), "run: python -m benchmarks.gpu.support"
    if not list((ROOT / "reports").glob("*.json")):
        assert "**Nothing in this project has run on a GPU so far.**" in page


def test_a_report_makes_a_row_and_ends_the_confession() -> None:
    page = support.page([json.loads(FIXTURE.read_text(encoding="utf-8"))])
    assert "Nothing in this project has run" not in page
    row = "NVIDIA GeForce RTX 4070 (8.9) | TensorRT 11.4.0.106 | ran | 61.3 dB | 41.2 dB | 412 ms | 580.95.05, 13.0 | 2026-11-20"
    assert f"| {row} |" in page
    assert "| TensorRT 11.4.0.106 | ran on NVIDIA GeForce RTX 4070, calls checked against the API |" in page
    assert "| TensorRT 10.3.0 | calls checked against the API |" in page


def test_a_library_that_nobody_checked_is_listed_where_it_ran() -> None:
    other = json.loads(FIXTURE.read_text(encoding="utf-8"))
    other["library"] = {"name": "onnxruntime", "version": "1.31.1", "target": "cuda", "missing": ""}
    page = support.page([other])
    assert "| ONNX Runtime with CUDA 1.31.1 | ran on NVIDIA GeForce RTX 4070 |" in page
    assert "| ONNX Runtime with CUDA | untested, but for the versions above |" in page


def test_the_versions_are_those_that_the_tests_hold() -> None:
    assert [(version.module.replace("_", "-"), version.version) for version in VERSIONS] == list(support.CHECKED)
    text = (ROOT / "tests" / "integration" / "test_tensorrt_rtx.py").read_text(encoding="utf-8")
    assert [("tensorrt-rtx", version) for version in re.findall(r'^RTX = "(.+)"$', text, flags=re.MULTILINE)] == list(
        support.BUILT
    )


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"a\.json: schema 99"):
        support.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/models/unet.plan: too old", ".../unet.plan: too old"),
        ("'/opt/x/lib/libnvinfer.so.11': cannot open", "'.../libnvinfer.so.11': cannot open"),
        ("~/sd/model.onnx", ".../model.onnx"),
        ("C:\\Users\\ann\\model.onnx", ".../model.onnx"),
        ("fetched from https://example.org/a/b.whl by ann@example.org", "fetched from (address)/a/b.whl by (address)"),
        ("built with tensorrt 11.4.0.106: here is 10.3.0", "built with tensorrt 11.4.0.106: here is 10.3.0"),
        ("1/2 of 3 / 4, and/or", "1/2 of 3 / 4, and/or"),
        ("node /down_blocks.0/attn/MatMul", "node .../MatMul"),
    ],
)
def test_what_leaves_the_machine_is_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_names_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "anns-box.lan")
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("USER", "ann")
    document = {"error": ["Ann on anns-box.lan", 1, None, "an annotation"], "anns-box": 2.5}
    assert cleaned(document) == {"error": ["(name) on (name)", 1, None, "an annotation"], "(name)": 2.5}
