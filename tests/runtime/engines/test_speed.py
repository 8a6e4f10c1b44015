"""Which CPU engine is quickest: what is compared, how it is timed, and that this happens once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bundles import with_fake_engines

from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.cli.describe import bundle_document, bundle_lines
from sdruntime.engines import speed
from sdruntime.engines.choose import Machine, choose_engine, kind
from sdruntime.engines.speed import Race, cpu_speeds, least_seconds, measure
from sdruntime.system.cuda import Device

LIBRARIES = {
    "onnxruntime": Library(version="1.32.0", targets=("cuda", "cpu")),
    "openvino": Library(version="2026.4.1", targets=("cpu",)),
}
HERE = Machine(libraries=LIBRARIES)
SIZES = {"height": 64, "width": 64}
SPEEDS = {"onnxruntime": 2.0, "openvino": 1.5, "openvino inference_precision=bf16": 0.8}


def unet(backend: str, *, rows: tuple[int, int] = (1, 16), cells: tuple[int, int] = (8, 256), **changes: object) -> EngineSpec:
    low, high = cells
    side = (low, min(max(64, low), high), high)
    spec = EngineSpec(
        component="unet",
        backend=backend,
        version=LIBRARIES[backend].version or "",
        target="cpu",
        precision="fp32",
        files=(f"engines/{backend}{len(changes)}{BACKENDS[backend].ending}",),
        profiles=({"batch": (rows[0], *rows), "height": side, "width": side, "sequence": (77, 77, 77)},),
    )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def with_engines(bundle: Bundle, *engines: EngineSpec) -> Bundle:
    files = {path: bundle.manifest.files["unet/model.onnx"] for each in engines for path in each.files}
    manifest = dataclasses.replace(bundle.manifest, engines=engines, files=dict(bundle.manifest.files) | files)
    return dataclasses.replace(bundle, manifest=manifest)


@pytest.fixture
def both(bundle: Bundle) -> Bundle:
    return with_engines(bundle, unet("onnxruntime"), unet("openvino", rows=(2, 2), cells=(64, 64)))


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Race]:
    """The races that were run, each of which the stub decides by SPEEDS."""
    races = []

    def run(bundle: Bundle, race: Race, options: EngineOptions) -> dict[str, float]:
        races.append(race)
        return {name: SPEEDS[name] for name in race.engines}

    monkeypatch.setattr(speed, "measure", run)
    monkeypatch.setenv("SDRUNTIME_CACHE", str(tmp_path / "cache"))
    return races


def test_the_measured_speed_decides_on_a_cpu_and_onnx_runtime_where_there_is_none(both: Bundle) -> None:
    measured = dataclasses.replace(HERE, speeds=SPEEDS)
    assert choose_engine(both, "unet", HERE, rows=2, **SIZES).backend == "onnxruntime"
    assert choose_engine(both, "unet", measured, rows=2, **SIZES).backend == "openvino"
    assert choose_engine(both, "unet", measured, rows=2, height=32, width=64).backend == "onnxruntime"
    assert choose_engine(both, "unet", measured, rows=2, name="onnxruntime", **SIZES).backend == "onnxruntime"


@pytest.mark.parametrize(("rows", "chosen"), [(1, "onnxruntime"), (2, "openvino"), (3, "openvino"), (4, "openvino")])
def test_rows_that_are_computed_for_nothing_count(both: Bundle, rows: int, chosen: str) -> None:
    measured = dataclasses.replace(HERE, speeds={"onnxruntime": 2.0, "openvino": 1.4})
    assert choose_engine(both, "unet", measured, rows=rows, **SIZES).backend == chosen


def test_a_gpu_goes_before_the_quickest_cpu(bundle: Bundle) -> None:
    here = Machine(libraries=LIBRARIES, devices=(Device(name="a GPU", capability=(9, 0), memory=1 << 36),), speeds=SPEEDS)
    three = with_engines(bundle, unet("openvino"), unet("onnxruntime", target="cuda"), unet("onnxruntime"))
    assert choose_engine(three, "unet", here, **SIZES).target == "cuda"


def test_it_is_measured_once_for_each_processor_and_number_of_threads(
    both: Bundle, races: list[Race], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"onnxruntime": 2.0, "openvino": 1.5}
    assert cpu_speeds(both, HERE, EngineOptions()) == expected
    assert cpu_speeds(both, HERE, EngineOptions()) == expected
    assert [dict(race.dims) for race in races] == [{"batch": 2, **SIZES, "sequence": 77}]
    assert "onnxruntime 2 s" in "\n".join(bundle_lines(both, HERE))
    assert bundle_document(both, HERE)["cpu_seconds"] == expected
    cpu_speeds(both, HERE, EngineOptions(threads=1))
    monkeypatch.setattr(speed.processor, "fingerprint", lambda: "another x4")
    assert bundle_document(both, HERE)["cpu_seconds"] is None
    cpu_speeds(both, HERE, EngineOptions())
    assert len(races) == 3


def test_what_was_kept_and_cannot_be_read_is_measured_again(both: Bundle, races: list[Race], tmp_path: Path) -> None:
    cpu_speeds(both, HERE, EngineOptions())
    (kept,) = (tmp_path / "cache" / "cpu").iterdir()
    for text in ("", "[]", '{"seconds": 3}', '{"seconds": {"openvino": "fast"}}'):
        kept.write_text(text)
        assert cpu_speeds(both, HERE, EngineOptions()) == {"onnxruntime": 2.0, "openvino": 1.5}
    assert len(races) == 5


def test_nothing_is_measured_where_there_is_nothing_to_compare(bundle: Bundle, both: Bundle, races: list[Race]) -> None:
    apart = with_engines(bundle, unet("onnxruntime", cells=(8, 32)), unet("openvino", cells=(64, 64)))
    one = with_engines(bundle, unet("onnxruntime"), unet("openvino", version="2025.1.0"))
    for each in (apart, one, with_fake_engines(bundle)):
        assert cpu_speeds(each, HERE, EngineOptions()) == {}
    assert cpu_speeds(both, HERE, EngineOptions(measure=False)) == {}
    assert cpu_speeds(both, HERE, EngineOptions(session={"session.intra_op.allow_spinning": "0"})) == {}
    assert races == []


def test_too_little_memory_for_both_is_left_alone(both: Bundle, races: list[Race], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "available_memory", lambda: 1)
    assert cpu_speeds(both, HERE, EngineOptions()) == {}
    assert races == []


def test_settings_make_a_kind_of_its_own() -> None:
    assert kind(unet("openvino", options={"inference_precision": "bf16"})) == "openvino inference_precision=bf16"


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 3), (1.0, 2), (60.0, 1)])
def test_calls_are_timed_in_turn_and_no_longer_than_needed(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    clock, called = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call(name: str, cost: float) -> None:
        called.append(name)
        clock[0] += cost * (1.5 if len(called) <= 2 else 1)

    found = least_seconds({"a": lambda: call("a", seconds), "b": lambda: call("b", 2 * seconds)})
    assert called == ["a", "b"] * rounds
    assert found == pytest.approx({"a": seconds * (1 if rounds > 1 else 1.5), "b": 2 * seconds * (1 if rounds > 1 else 1.5)})


def test_an_engine_that_does_not_open_is_told_of_and_left_out(bundle: Bundle) -> None:
    ready = with_fake_engines(bundle)
    (sound,) = (engine for engine in ready.manifest.engines if engine.component == "unet")
    lost = dataclasses.replace(sound, files=("engines/lost.json",))
    race = Race(engines={"sound": sound, "lost": lost}, dims={"batch": 2, **SIZES, "sequence": 77}, name="cpu/x.json")
    with pytest.warns(RuntimeWarning, match="lost was not timed"):
        assert list(measure(ready, race, EngineOptions())) == ["sound"]
