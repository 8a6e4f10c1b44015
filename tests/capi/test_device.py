"""The library on a GPU: the caller's stream, memory limits, device buffers, and what remains allocated.

The GPU is the strict fake of CUDA and TensorRT in the host's own interpreter. It has no function that stalls a whole device, and
rejects data races.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capi.building import HERE, ROOT, Library, run
from trt.conftest import NEWEST, read, small_with_engines
from trt.surface import VERSIONS

from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.memory import memory_plan

UNSUPPORTED, CLOSED, TOO_SMALL, CANCELLED = 5, 7, 10, 14
BYTES = 3 * 128 * 64
SECOND = "GPU-01010101-0101-0101-0101-010101010101"
Statuses = list[tuple[int, int, str]]
Drive = Callable[..., "Output"]


class Output:
    """What the host printed."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __getitem__(self, what: str) -> Statuses:
        """Return (code, reason, message) of each status of one call."""
        statuses = re.findall(rf"^{what} (\d+) (\d+) (.*)$", self.text, flags=re.MULTILINE)
        return [(int(code), int(reason), message) for code, reason, message in statuses]

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The state of the fake at each "report"."""
        return [json.loads(line) for line in re.findall(r"^report (.*)$", self.text, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def surface() -> Any:
    return read(next(version for version in VERSIONS if str(version) == NEWEST))


@pytest.fixture(scope="module")
def small(surface: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with engines of the fake TensorRT."""
    return small_with_engines(tmp_path_factory.mktemp("small"), surface)


@pytest.fixture
def drive(library: Library, surface: Any, small: Path, tmp_path: Path) -> Drive:
    """Return a function that runs device.c: drive(*words, isolation=…, **settings of Gpus).

    It first opens a folder that is not a bundle. This starts the interpreter, so that the host has a GPU for streams and buffers.
    """
    program = library.program("device.c", flags=["-rdynamic"])

    def run_host(*words: object, isolation: str = "in-process", full: tuple[int, ...] = (), **gpus: Any) -> Output:
        (tmp_path / "machine").write_bytes(pickle.dumps((surface, full, gpus)))
        folders = (HERE / "strict", ROOT / "runtime", ROOT / "tests", ROOT, sysconfig.get_path("purelib"))
        variables = {
            "PYTHONPATH": ":".join(map(str, folders)),
            "STRICT_MACHINE": str(tmp_path / "machine"),
            "SDRUNTIME_CACHE": str(tmp_path / "cache"),
            "SDRUNTIME_PYTHON": sys.prefix,
        }
        start = (f"isolation={isolation}", f"bundle={tmp_path}", "open", f"bundle={small}", f"out={tmp_path / 'rows'}")
        output = Output(run(program, *start, *map(str, words), env=variables))
        assert output["open"][0][0] == 5, output.text
        assert "traceback" not in output.text.lower(), output.text
        return output

    return run_host


def test_all_work_uses_the_callers_stream_and_the_device_buffer_equals_the_rows(drive: Drive, tmp_path: Path) -> None:
    host, device = tmp_path / "host", tmp_path / "device"
    job = ("open", f"out={host}", "generate", f"buffer={BYTES}", f"out={device}", "generate", "generate")
    output = drive("stream", *job, "report", "close", "report", "release", "report")
    assert [status[0] for status in output["job"] + output["close"]] == [0] * 4
    rows = host.read_bytes()
    assert len(rows) == BYTES
    assert np.frombuffer(rows, np.uint8).std() >= 1
    assert device.read_bytes() == rows
    assert Path(f"{device}.device").read_bytes() == rows
    generated, closed, released = output.reports
    [caller] = generated["streams"]
    assert generated["counts"]["cuStreamCreate"] == 1  # by the host
    assert generated["counts"]["launches"] > 0
    assert closed["streams"] == [caller]
    assert sorted(re.findall("cuMemAlloc|stream", leak)[0] for leak in closed["left"]) == ["cuMemAlloc", "stream"]  # the host's
    assert released["left"] == []
    assert released["retained"] == [0]


def test_the_library_creates_a_stream_if_the_caller_passes_none(drive: Drive, tmp_path: Path) -> None:
    output = drive("open", "generate", f"buffer={BYTES + 7}", "generate", "close", "report", "release", "report")
    rows = (tmp_path / "rows").read_bytes()
    assert (tmp_path / "rows.device").read_bytes() == rows
    assert np.frombuffer(rows, np.uint8).std() >= 1
    closed, released = output.reports
    assert (len(closed["streams"]), closed["counts"]["cuStreamCreate"]) == (1, 1)
    assert (released["left"], released["retained"]) == ([], [0])


def test_the_default_streams_are_rejected(drive: Drive) -> None:
    output = drive("stream=1", "open", "stream=2", "open", "report")
    for number, (code, _, message) in enumerate(output["open"][1:], start=1):
        assert code == 2
        assert message.startswith(f"stream {number} is a default stream")
    [report] = output.reports
    assert (report["left"], report["retained"]) == ([], [0])


def test_a_too_small_device_buffer_is_rejected_with_both_sizes(drive: Drive) -> None:
    words = (f"size={BYTES - 1}", "generate", "size=0", "generate", f"size={BYTES}", "generate")
    output = drive("open", f"buffer={BYTES}", *words, "close")
    short, none, enough = output["job"]
    assert short[:2] == none[:2] == (2, TOO_SMALL)
    assert re.search(r"device_buffer.* 24,575 bytes at 0x\w+, but the image has 24,576", short[2])
    assert re.search(r"device_buffer.* 0 bytes at 0x\w+, but the image has 24,576", none[2])
    assert enough == (0, 0, "")


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_memory_limit_that_is_too_low_is_rejected_with_both_numbers(drive: Drive, small: Path, isolation: str) -> None:
    manifest = Bundle.open(small).manifest
    need = memory_plan(manifest, [engine for engine in manifest.engines if engine.component != "step"]).total
    words = [word for cap in (need - 1, 1000, need) for word in (f"memory={cap}", "open")]
    output = drive(*words, "generate", "close", isolation=isolation)
    *rejected, opened = output["open"][1:]
    for cap, (code, _, message) in zip((need - 1, 1000), rejected, strict=True):
        assert code == 3
        assert f"the engines need {need:,} bytes and the budget is {cap:,}" in message
    assert opened == output["job"][0] == (0, 0, "")


def test_a_rejected_open_allocates_nothing(drive: Drive) -> None:
    [report] = drive("memory=1000", "open", "report").reports
    assert (report["left"], report["retained"], report["counts"].get("cuMemAlloc_v2", 0)) == ([], [0], 0)


def test_a_device_is_selected_by_index_or_uuid(drive: Drive) -> None:
    names = ("0", "1", "cuda:1", SECOND, SECOND.lower(), SECOND[:9])
    words = [word for name in names for word in (f"device={name}", "open", "report", "generate", "close")]
    output = drive(*words, "report", devices=2)
    assert output["open"][1:] == output["job"] == output["close"] == [(0, 0, "")] * len(names)
    assert [report["devices"] for report in output.reports] == [[0], [1], [1], [1], [1], [1], []]
    assert (output.reports[-1]["left"], output.reports[-1]["retained"]) == ([], [0, 0])


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_an_unknown_device_is_reported(drive: Drive, isolation: str) -> None:
    wrong = {
        "2": (3, r"device 2: the driver shows 2 \(Fake RTX 3060, Fake RTX 3060\), counted from 0"),
        "cuda:7": (3, r"device 7: the driver shows 2 "),
        "GPU-ffffffff": (3, r"device 'GPU-ffffffff': 0 GPUs have a UUID that begins with it; available: GPU-0000.*, GPU-0101"),
        "the second": (2, r"device 'the second': expected a number, cuda:NUMBER, or a UUID"),
    }
    output = drive(*(word for name in wrong for word in (f"device={name}", "open")), isolation=isolation, devices=2)
    for (expected, pattern), (code, _, message) in zip(wrong.values(), output["open"][1:], strict=True):
        assert code == expected
        assert re.search(pattern, message)


def test_a_worker_uses_the_requested_device(drive: Drive) -> None:
    """The first GPU of the machine has no memory left."""
    output = drive("device=0", "open", f"device={SECOND}", "open", "generate", "close", isolation="process", devices=2, full=(0,))
    none, other = output["open"][1:]
    assert none[0] == 3
    assert "0 are free" in none[2]
    assert other == output["job"][0] == (0, 0, "")


def test_a_worker_rejects_streams_and_buffers_of_the_host(drive: Drive) -> None:
    output = drive("open", f"buffer={BYTES}", "generate", "close", "stream", "open", isolation="process")
    assert output["open"][1] == (0, 0, "")
    for (code, reason, message), what in (
        (output["submit"][0], "device_buffer: device memory"),
        (output["open"][2], "stream: a CUDA stream"),
    ):
        assert (code, reason) == (2, UNSUPPORTED)
        assert message == f"{what} belongs to one process; open with SDR_ISOLATION_IN_PROCESS"


@pytest.mark.parametrize("word", ["stream", f"buffer={BYTES}"])
def test_cpu_engines_support_neither_stream_nor_buffer(drive: Drive, bundle: Path, word: str) -> None:
    output = drive(f"bundle={bundle}", word, "open", "generate")
    code, reason, message = (output["open"][1:] + output["job"])[-1]
    assert (code, reason) == (2, UNSUPPORTED)
    assert re.search(r"stream: engines of onnxruntime cannot use|device_buffer of job \d+: the engines run on the CPU", message)


def test_no_work_is_queued_after_a_job_is_cancelled_or_the_runtime_closed(drive: Drive) -> None:
    """Nothing that needs the engines or the buffer remains queued on the caller's stream."""
    cancelled = ("start", "cancel", "end", "generate")
    closed_early = ("start", "close", "report", "end", "release", "report")
    output = drive("stream", f"buffer={BYTES}", "open", *cancelled, *closed_early)
    assert [status[:2] for status in output["job"]] == [(130, CANCELLED), (0, 0), (130, CLOSED)]
    closed, released = output.reports
    assert closed["queued"] == 0
    assert len(closed["left"]) == 2  # the host's own
    assert (released["left"], released["retained"]) == ([], [0])


def test_fifty_cycles_leak_nothing(drive: Drive) -> None:
    cycle = ("open", "generate", "close")
    output = drive("stream", f"buffer={BYTES}", *cycle, "report", *cycle * 49, "report", "release", "report")
    assert output["job"] == output["close"] == [(0, 0, "")] * 50
    one, fifty, released = output.reports
    assert fifty["left"] == one["left"]
    assert len(one["left"]) == 2  # the host's own
    assert fifty["retained"] == one["retained"]
    assert (released["left"], released["retained"]) == ([], [0])
