"""What a benchmark tells, and that contestants take turns. No test here asserts a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from sdexport_cli import run

from sdexport.bench import bench as module
from sdexport.bench import contestant, timing
from sdexport.bench.bench import cold_starts, ratios
from sdexport.bench.chart import markdown, svg
from sdexport.bench.subject import costs
from sdexport.errors import BenchError
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.engines.choose import Machine
from sdruntime.system.cuda import Device

PARTS = ("import_s", "load_s", "warmup_s")


@pytest.fixture(scope="module")
def document(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the tiny checkpoint: ONNX Runtime beside the fake, as the command tells it; the files that it wrote are beside it."""
    import shutil

    place = tmp_path_factory.mktemp("bench")
    bundle = Path(shutil.copytree(sd1_bundle, place / "bundle"))
    for name in ("onnxruntime", "fake"):
        for _ in build_engines(bundle, BuildRequest(backend=name)):
            pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STARTS", 1)
        patch.setattr(timing, "WARM", 1)
        patch.setattr(timing, "LEAST", 3)
        patch.setattr(timing, "MOST", 4)
        patch.setattr(module.processor, "busy", lambda seconds: 0.42)
        arguments = ["--backend", "onnxruntime", "--against", "fake", "--against", "tensorrt", "--steps", "2", "--seconds", "60"]
        files = ["--markdown", place / "out.md", "--picture", place / "out.svg"]
        result = run("bench", bundle, *arguments, *files, "--json")
    assert result.exit_code == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    told["files"] = {kind: (place / f"out.{kind}").read_text(encoding="utf-8") for kind in ("md", "svg")}
    return told


def test_the_document_says_what_where_and_how(document: dict[str, Any]) -> None:
    assert document["schema"] == 1
    assert document["machine"].keys() >= {"processor", "cores", "gpus", "system", "load", "busy"}
    assert document["versions"].keys() >= {"sdexport", "python"}
    assert document["settings"].keys() >= {"steps", "batch", "size", "guidance", "seconds", "prompt", "seed", "sampler"}
    assert list(document["contestants"]) == ["onnxruntime", "fake", "tensorrt"]
    assert "no tensorrt engine of" in document["contestants"]["tensorrt"]["error"]
    assert all("build_s" not in each for each in document["contestants"].values())  # nothing was built, so nothing is reported


def test_numbers_stand_in_sane_relations(document: dict[str, Any]) -> None:
    for name in ("onnxruntime", "fake"):
        told = document["contestants"][name]
        assert told["components"].keys() == {"text_encoder", "unet", "vae_decoder"}
        for found in [*told["components"].values(), told["end_to_end"], told["host_outside_unet_per_step"]]:
            assert 0 < found["min_ms"] <= found["p50_ms"] <= found["p95_ms"] <= found["max_ms"]
            assert found["n"] >= 3
        whole = sum(told["cold"][part] for part in PARTS)
        assert 0.5 * told["cold"]["whole_s"] <= whole <= 1.01 * told["cold"]["whole_s"]
        assert all(told["cold"][part] > 0 for part in PARTS)
        assert told["peak_memory"] > 10e6
        assert told["engine_bytes"] > 0
    assert document["ratios"].keys() == {"text_encoder", "unet", "vae_decoder", "end to end"}
    for times in document["ratios"].values():
        assert times.keys() == {"onnxruntime", "fake"}
        assert min(times.values()) == 1


def test_the_chart_has_a_bar_for_each_contestant_in_each_column(document: dict[str, Any]) -> None:
    root = ElementTree.fromstring(document["files"]["svg"])
    bars = [each.attrib for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("class") == "bar"]
    asked = {(column, name) for column, times in document["ratios"].items() for name in times}
    assert sorted((bar["data-component"], bar["data-contestant"]) for bar in bars) == sorted(asked)
    assert all(float(bar["width"]) > 0 and float(bar["x"]) + float(bar["width"]) < float(root.attrib["width"]) for bar in bars)


def test_the_tables_hold_every_column_and_every_failure(document: dict[str, Any]) -> None:
    text = document["files"]["md"]
    for column in (*document["ratios"], "cold start", "peak memory", "host outside"):
        assert f"| {column}" in text
    assert "tensorrt did not run" in text
    cells = re.findall(r"[\d.,]+ \([\d.,]+ to [\d.,]+\) ms, n \d+, \d+\.\d\d ×", text)
    assert len(cells) == 4 * 2, "every cell has its spread and its count"
    assert text.startswith("**Warning: other processes used 42% of this machine"), "a busy machine is named in the first line"
    quiet = document | {"machine": document["machine"] | {"busy": 0.01}}
    assert next(iter(markdown(quiet))).startswith("### ")
    assert "Warning" not in svg(quiet)
    assert "engine build" not in text
    assert list(markdown(document)) == text.splitlines()
    assert svg(document) == document["files"]["svg"]


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM", 1)
    monkeypatch.setattr(timing, "LEAST", 3)
    order: list[str] = []

    def turn(name: str, seconds: float) -> timing.Turn:
        def taking(round_: int) -> list[float]:
            order.append(name)
            if name == "c" and round_ == 1:
                raise RuntimeError("no more")
            return [seconds]

        return taking

    taken = timing.in_turn({"a": turn("a", 1.0), "b": turn("b", 2.0), "c": turn("c", 1.0)}, seconds=4.5)
    assert "".join(order) == "abcabcabcabaa"
    assert taken == {"a": [1.0] * 5, "b": [2.0] * 3, "c": "RuntimeError: no more"}
    order.clear()
    assert timing.in_turn({"a": turn("a", 1.0), "b": turn("b", 1.0)}, seconds=100, until=0) == {"a": [1.0], "b": [1.0]}
    assert "".join(order) == "abab"


def test_no_round_begins_that_would_end_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: 2 rounds to warm up and 5 that count would take 70 seconds, and there are 45."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    def turn(round_: int) -> list[float]:
        now[0] += 10.0
        return [10.0]

    assert timing.in_turn({"a": turn}, seconds=100, until=45) == {"a": [10.0, 10.0]}
    assert now[0] == 40.0
    now[0] = 0.0
    assert timing.in_turn({"a": turn}, seconds=100, until=5) == {"a": [10.0]}, "one round to warm up, one that counts"


def test_a_contestant_that_never_answers_is_ended_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestant, "module_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(3600)"])
    with contestant.Contestant("sleeper", {}, deadline=time.monotonic() + 0.1) as sleeper:
        with pytest.raises(BenchError, match=r"sleeper: no result within the time .* --seconds"):
            sleeper.opened()
        with pytest.raises(BenchError, match="no result within the time"):
            sleeper.measure("generate")


def test_the_busy_part_of_the_machine_is_read_from_its_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(1000, 2000), (1150, 2200), None, None])
    monkeypatch.setattr(module.processor, "_ticks", lambda: next(ticks))
    assert module.processor.busy(0) == 0.25
    assert module.processor.busy(0) is None


def test_of_several_cold_starts_the_middle_one_is_told() -> None:
    class Stub:
        wholes = iter((3.0, 1.0, 2.0))
        closed = 0

        def opened(self) -> dict[str, Any]:
            return {"cold": {"whole_s": next(self.wholes)}}

        def close(self) -> None:
            Stub.closed += 1

    class Broken(Stub):
        def opened(self) -> dict[str, Any]:
            raise BenchError("broken: no")

    with contextlib.ExitStack() as stack:
        found = cold_starts({"one": Stub, "other": Broken}, stack, seconds=100)
        assert found["one"][1]["cold"] == {"whole_s": 2.0, "starts": 3}
        assert found["other"] == "broken: no"
    assert Stub.closed >= 4


def test_ratios_are_to_the_quickest() -> None:
    told = {
        "a": {"components": {"unet": {"p50_ms": 3.0, "n": 5}}, "end_to_end": {"p50_ms": 5.0, "n": 3}},
        "b": {"components": {"unet": {"p50_ms": 0.1, "n": 1}}, "end_to_end": {"p50_ms": 4.0, "n": 3}},
    }
    assert ratios(told) == {"unet": {"a": 1.0}, "end to end": {"a": 1.25, "b": 1.0}}, "a time of one round is compared with none"


def test_what_costs_speed_is_told_in_a_line(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    gpu = Device(name="A GPU", capability=(8, 6), memory=1 << 30, integrated=False, driver="12.8")  # type: ignore[call-arg]
    here = Machine(libraries={}, devices=(gpu,))
    spec = EngineSpec(
        component="unet",
        backend="tensorrt",
        version="10.0",
        target="sm86",
        precision="fp32",
        files=("engines/unet.plan",),
        profiles=({"batch": (1, 2, 2), "height": (8, 64, 64)},),
    )
    on_cpu = dataclasses.replace(spec, component="vae_decoder", backend="onnxruntime", target="cpu")
    found = costs(bundle, [spec, on_cpu], here, guidance=7.5, batch=2, unguided=True)
    assert sum(f"sdexport build path/to/checkpoint --precision fp16 -o {bundle.folder}" in line for line in found) == 1
    for said in (
        "needs no guidance",
        "vae_decoder on the CPU although this machine has A GPU",
        "unet in fp32 on a GPU",
        "range of shapes",
        "2 times",
    ):
        assert sum(said in line for line in found) == 1
    assert all("\n" not in line for line in found)
    static = dataclasses.replace(spec, precision="fp16", profiles=({"batch": (2, 2, 2), "height": (64, 64, 64)},))
    assert costs(bundle, [static], here, guidance=7.5, batch=1, unguided=False) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--against", "tensorflow"], 2, "unknown rival 'tensorflow'"),
        (["--size", "64"], 2, "WIDTHxHEIGHT"),
        (["--steps", "0"], 2, "steps 0: must be at least 1"),
        (["--seconds", "nan"], 2, "seconds nan: must be at least 1"),
        (["--model", "somewhere"], 2, "model somewhere without a rival that runs it: add --against torch"),
        ([], 5, "no engine of text_encoder fits this machine"),
    ],
)
def test_bad_input_gets_one_message_and_its_code(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    bundle = make_bundle(tmp_path / "bundle").folder
    result = run("bench", bundle, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr


def test_a_rival_that_is_not_installed_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle").folder
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = run("bench", bundle, "--against", "torch", "--model", "somewhere")
    assert result.exit_code == 3
    assert "torch cannot run: diffusers is not installed: pip install" in result.stderr


def test_a_bundle_is_left_as_it_was(document: dict[str, Any], sd1_bundle: Path) -> None:
    assert not Bundle.open(sd1_bundle).changed_files()
