"""The library on a GPU, which is the strict fake of CUDA and TensorRT in a host's own interpreter: on whose stream it works, with
how much memory, where pictures go, what is left. The fake has no function that stalls a whole device, and refuses races."""

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
Drive = Callable[..., "Said"]


class Said:
    """What the host printed."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __getitem__(self, what: str) -> Statuses:
        """(code, reason, message) of each status of one kind."""
        found = re.findall(rf"^{what} (\d+) (\d+) (.*)$", self.text, flags=re.MULTILINE)
        return [(int(code), int(reason), message) for code, reason, message in found]

    @property
    def told(self) -> list[dict[str, Any]]:
        """Of the fake, each time that it was asked."""
        return [json.loads(line) for line in re.findall(r"^tell (.*)$", self.text, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def surface() -> Any:
    return read(next(version for version in VERSIONS if str(version) == NEWEST))


@pytest.fixture(scope="module")
def small(surface: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of the fake TensorRT."""
    return small_with_engines(tmp_path_factory.mktemp("small"), surface)


@pytest.fixture
def drive(library: Library, surface: Any, small: Path, tmp_path: Path) -> Drive:
    """drive(*words of device.c, isolation, **settings of Gpus). A first open, of no bundle, starts the interpreter, so that the
    host has a GPU to make streams and buffers on."""
    program = library.program("device.c", flags=["-rdynamic"])

    def driven(*words: object, isolation: str = "in-process", full: tuple[int, ...] = (), **gpus: Any) -> Said:
        (tmp_path / "machine").write_bytes(pickle.dumps((surface, full, gpus)))
        folders = (HERE / "strict", ROOT / "runtime", ROOT / "tests", ROOT, sysconfig.get_path("purelib"))
        variables = {
            "PYTHONPATH": ":".join(map(str, folders)),
            "STRICT_MACHINE": str(tmp_path / "machine"),
            "SDRUNTIME_CACHE": str(tmp_path / "cache"),
            "SDRUNTIME_PYTHON": sys.prefix,
        }
        start = (f"isolation={isolation}", f"bundle={tmp_path}", "open", f"bundle={small}", f"out={tmp_path / 'rows'}")
        said = Said(run(program, *start, *map(str, words), env=variables))
        assert said["open"][0][0] == 5, said.text
        assert "traceback" not in said.text.lower(), said.text
        return said

    return driven


def test_all_work_is_on_the_caller_s_stream_and_the_device_gets_the_host_s_bytes(drive: Drive, tmp_path: Path) -> None:
    host, device = tmp_path / "host", tmp_path / "device"
    job = ("open", f"out={host}", "draw", f"buffer={BYTES}", f"out={device}", "draw", "draw")
    said = drive("stream", *job, "tell", "close", "tell", "leave", "tell")
    assert [each[0] for each in said["job"] + said["close"]] == [0] * 4
    rows = host.read_bytes()
    assert len(rows) == BYTES
    assert np.frombuffer(rows, np.uint8).std() >= 1
    assert device.read_bytes() == rows
    assert Path(f"{device}.device").read_bytes() == rows
    drawn, closed, left = said.told
    [caller] = drawn["streams"]
    assert drawn["counts"]["cuStreamCreate"] == 1  # by the host
    assert drawn["counts"]["launches"] > 0
    assert closed["streams"] == [caller]
    assert sorted(re.findall("cuMemAlloc|stream", each)[0] for each in closed["left"]) == ["cuMemAlloc", "stream"]  # the host's
    assert left["left"] == []
    assert left["retained"] == [0]


def test_without_a_stream_of_the_caller_s_there_is_one_of_the_library_s(drive: Drive, tmp_path: Path) -> None:
    said = drive("open", "draw", f"buffer={BYTES + 7}", "draw", "close", "tell", "leave", "tell")
    rows = (tmp_path / "rows").read_bytes()
    assert (tmp_path / "rows.device").read_bytes() == rows
    assert np.frombuffer(rows, np.uint8).std() >= 1
    closed, left = said.told
    assert (len(closed["streams"]), closed["counts"]["cuStreamCreate"]) == (1, 1)
    assert (left["left"], left["retained"]) == ([], [0])


def test_the_default_streams_are_refused(drive: Drive) -> None:
    said = drive("stream=1", "open", "stream=2", "open", "tell")
    for number, found in enumerate(said["open"][1:], start=1):
        assert found[0] == 2
        assert found[2].startswith(f"stream {number} is a default stream")
    [told] = said.told
    assert (told["left"], told["retained"]) == ([], [0])


def test_a_device_buffer_that_is_too_small_is_refused_with_both_sizes(drive: Drive) -> None:
    said = drive("open", f"buffer={BYTES}", f"size={BYTES - 1}", "draw", "size=0", "draw", f"size={BYTES}", "draw", "close")
    short, none, enough = said["job"]
    assert short[:2] == none[:2] == (2, TOO_SMALL)
    assert re.search(r"device_buffer.* 24,575 bytes at 0x\w+, but the image has 24,576", short[2])
    assert re.search(r"device_buffer.* 0 bytes at 0x\w+, but the image has 24,576", none[2])
    assert enough == (0, 0, "")


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_cap_below_the_need_is_refused_with_both_numbers(drive: Drive, small: Path, isolation: str) -> None:
    manifest = Bundle.open(small).manifest
    need = memory_plan(manifest, [each for each in manifest.engines if each.component != "step"]).total
    words = [word for cap in (need - 1, 1000, need) for word in (f"memory={cap}", "open")]
    said = drive(*words, "draw", "close", isolation=isolation)
    *refused, opened = said["open"][1:]
    for cap, (code, _, message) in zip((need - 1, 1000), refused, strict=True):
        assert code == 3
        assert f"the engines need {need:,} bytes and the budget is {cap:,}" in message
    assert opened == said["job"][0] == (0, 0, "")


def test_what_is_refused_allocates_nothing(drive: Drive) -> None:
    [told] = drive("memory=1000", "open", "tell").told
    assert (told["left"], told["retained"], told["counts"].get("cuMemAlloc_v2", 0)) == ([], [0], 0)


def test_a_device_is_told_by_its_number_or_its_uuid(drive: Drive) -> None:
    names = ("0", "1", "cuda:1", SECOND, SECOND.lower(), SECOND[:9])
    words = [word for name in names for word in (f"device={name}", "open", "tell", "draw", "close")]
    said = drive(*words, "tell", devices=2)
    assert said["open"][1:] == said["job"] == said["close"] == [(0, 0, "")] * len(names)
    assert [each["devices"] for each in said.told] == [[0], [1], [1], [1], [1], [1], []]
    assert (said.told[-1]["left"], said.told[-1]["retained"]) == ([], [0, 0])


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_device_that_is_not_there_is_told(drive: Drive, isolation: str) -> None:
    wrong = {
        "2": (3, r"device 2: the driver shows 2 \(Fake RTX 3060, Fake RTX 3060\), counted from 0"),
        "cuda:7": (3, r"device 7: the driver shows 2 "),
        "GPU-ffffffff": (3, r"device 'GPU-ffffffff': 0 GPUs have a UUID that begins with it; available: GPU-0000.*, GPU-0101"),
        "the second": (2, r"device 'the second': expected a number, cuda:NUMBER, or a UUID"),
    }
    said = drive(*(word for name in wrong for word in (f"device={name}", "open")), isolation=isolation, devices=2)
    for (code, pattern), found in zip(wrong.values(), said["open"][1:], strict=True):
        assert found[0] == code
        assert re.search(pattern, found[2])


def test_a_worker_takes_the_device(drive: Drive) -> None:
    """The first of its GPUs has no memory left."""
    said = drive("device=0", "open", f"device={SECOND}", "open", "draw", "close", isolation="process", devices=2, full=(0,))
    none, other = said["open"][1:]
    assert none[0] == 3
    assert "0 are free" in none[2]
    assert other == said["job"][0] == (0, 0, "")


def test_a_worker_refuses_what_belongs_to_the_host_s_process(drive: Drive) -> None:
    said = drive("open", f"buffer={BYTES}", "draw", "close", "stream", "open", isolation="process")
    assert said["open"][1] == (0, 0, "")
    for (code, reason, message), what in (
        (said["submit"][0], "device_buffer: device memory"),
        (said["open"][2], "stream: a CUDA stream"),
    ):
        assert (code, reason) == (2, UNSUPPORTED)
        assert message == f"{what} belongs to one process; open with SDR_ISOLATION_IN_PROCESS"


@pytest.mark.parametrize("asked", ["stream", f"buffer={BYTES}"])
def test_engines_of_the_cpu_take_neither_stream_nor_buffer(drive: Drive, bundle: Path, asked: str) -> None:
    said = drive(f"bundle={bundle}", asked, "open", "draw")
    code, reason, message = (said["open"][1:] + said["job"])[-1]
    assert (code, reason) == (2, UNSUPPORTED)
    assert re.search(
        r"stream: engines of onnxruntime do not work on|device_buffer of job \d+: the engines run on the CPU", message
    )


def test_what_is_under_way_is_over_when_the_job_is_cancelled_or_the_runtime_closed(drive: Drive) -> None:
    """Nothing is queued on the caller's stream any more that needs the engines or the buffer."""
    said = drive(
        "stream", f"buffer={BYTES}", "open", "start", "cancel", "end", "draw", "start", "close", "tell", "end", "leave", "tell"
    )
    assert [each[:2] for each in said["job"]] == [(130, CANCELLED), (0, 0), (130, CLOSED)]
    closed, left = said.told
    assert closed["queued"] == 0
    assert len(closed["left"]) == 2  # the host's own
    assert (left["left"], left["retained"]) == ([], [0])


def test_fifty_cycles_leave_nothing(drive: Drive) -> None:
    cycle = ("open", "draw", "close")
    said = drive("stream", f"buffer={BYTES}", *cycle, "tell", *cycle * 49, "tell", "leave", "tell")
    assert said["job"] == said["close"] == [(0, 0, "")] * 50
    one, fifty, left = said.told
    assert fifty["left"] == one["left"]
    assert len(one["left"]) == 2  # the host's own
    assert fifty["retained"] == one["retained"]
    assert (left["left"], left["retained"]) == ([], [0])
