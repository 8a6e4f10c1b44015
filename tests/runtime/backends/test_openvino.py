"""The OpenVINO backend beside ONNX Runtime's, on the bundle that is kept for ever."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from places import FIXTURE

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine, EngineOptions
from sdruntime.backends.base.feeds import shape_of
from sdruntime.backends.ov.build import has_bf16, library
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import save_manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.engines.choose import Machine, choose_engine
from sdruntime.engines.shapes import Shapes
from sdruntime.errors import BundleError, EngineError, LibraryMissing, SettingError, UnknownName
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino", reason="OpenVINO is not installed")

BF16 = {"inference_precision": "bf16"}
PROMPT = "the red cat and the sand"
ASKED: dict[str, Any] = {"seed": 7, "steps": 4, "sampler": "dpmpp_2m", "size": (64, 64), "guidance": 5.0}


def build(folder: Path, backend: str, *, size: str = "64x64", **settings: Any) -> Bundle:
    for _ in build_engines(folder, BuildRequest(backend=backend, size=size, **settings)):
        pass
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of both, OpenVINO's of one size."""
    place = Path(copytree(FIXTURE, tmp_path_factory.mktemp("openvino") / "bundle"))
    build(place, "onnxruntime", size="64x64:128x128")
    build(place, "openvino")
    return place


def test_engines_upsample_in_fewer_products(folder: Path) -> None:
    """The fixture is of fp16, so its weights are too."""
    for engine in Bundle.open(folder).manifest.engines:
        if engine.backend == "openvino" and engine.component in ("unet", "vae_decoder"):
            text = (folder / engine.files[0]).read_text()
            assert '"Interpolate"' not in text
            assert '"DepthToSpace"' in text


def psnr(ours: Array, theirs: Array) -> float:
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def feeds(engine: Engine, factor: int, seed: int = 0, **dims: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    found = {}
    for tensor in engine.component.inputs:
        shape = shape_of(tensor, dims, factor)
        whole = tensor.dtype != "float32"
        found[tensor.name] = (random.integers(0, 500, shape) if whole else random.standard_normal(shape)).astype(tensor.dtype)
    return found


def outputs(folder: Path, backend: str, **settings: Any) -> Mapping[str, Mapping[str, Array]]:
    """Every component's, for the same inputs."""
    found = {}
    with Pipeline.open(folder, backend=backend, **settings) as pipe:
        for name in ("text_encoder", "vae_encoder", "vae_decoder", "unet"):
            dims = {"batch": 1, "height": 8, "width": 8, "sequence": 77}
            dims |= {"vae_encoder": {"height": 64, "width": 64}, "unet": {"batch": 2}}.get(name, {})
            sizes = {key: dims[key] for key in pipe.bundle.manifest.components[name].dimensions if key != "batch"}
            engine = pipe.engine(name, rows=dims["batch"], **sizes)
            assert engine.spec.backend == backend
            found[name] = engine(feeds(engine, pipe.model.vae_factor, **dims))
    return found


def test_every_component_computes_what_onnx_runtime_computes(folder: Path) -> None:
    ours, theirs = outputs(folder, "openvino"), outputs(folder, "onnxruntime")
    for name in ours:
        for tensor, values in theirs[name].items():
            # the fixture is of fp16: ONNX Runtime rounds between nodes, OpenVINO computes in f32 throughout
            assert np.abs(ours[name][tensor] - values).max() <= 4e-3 * np.abs(values).max(), f"{name}.{tensor}"


@pytest.fixture(scope="module")
def pictures(folder: Path) -> dict[str, Array]:
    drawn = {}
    for backend in ("onnxruntime", "openvino"):
        with Pipeline.open(folder, backend=backend) as pipe:
            drawn[backend] = pipe(PROMPT, **ASKED).pixels[0]
    assert drawn["onnxruntime"].std() >= 10
    return drawn


def test_the_picture_is_onnx_runtimes(pictures: dict[str, Array]) -> None:
    assert psnr(pictures["openvino"], pictures["onnxruntime"]) >= 45


def test_in_fp32_both_compute_the_same(sd1_bundle: Path, tmp_path: Path) -> None:
    folder = Path(copytree(sd1_bundle, tmp_path / "bundle"))
    build(folder, "onnxruntime", size="64x64:128x128")
    build(folder, "openvino")
    ours, theirs = outputs(folder, "openvino"), outputs(folder, "onnxruntime")
    for name in theirs:
        for tensor, values in theirs[name].items():
            assert np.abs(ours[name][tensor] - values).max() <= 1e-4 * np.abs(values).max(), f"{name}.{tensor}"
    drawn = []
    for backend in ("openvino", "onnxruntime"):
        with Pipeline.open(folder, backend=backend) as pipe:
            drawn.append(pipe(PROMPT, **ASKED).pixels[0])
    assert drawn[1].std() >= 10
    assert psnr(*drawn) >= 60


def test_bf16_where_the_cpu_has_it_and_the_option_asks(pictures: dict[str, Array], tmp_path: Path) -> None:
    if not has_bf16(library().Core()):
        with pytest.raises(SettingError, match="this CPU does not support bf16"):
            build(Path(copytree(FIXTURE, tmp_path / "bundle")), "openvino", options=BF16)
        pytest.skip("this CPU has no bf16")
    folder = Path(copytree(FIXTURE, tmp_path / "bundle"))
    bundle = build(folder, "openvino", options=BF16)
    assert {engine.precision for engine in bundle.manifest.engines} == {"bf16"}
    with Pipeline.open(folder, backend="openvino") as pipe:
        picture = pipe(PROMPT, **ASKED).pixels[0]
    assert 30 <= psnr(picture, pictures["openvino"]) < float("inf")


def test_an_option_that_is_not_known_or_not_readable_is_refused(folder: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean inference_precision"):
        build(folder, "openvino", options={"inference_precison": "bf16"})
    with pytest.raises(SettingError, match="f32, or bf16 if the CPU supports it"):
        build(folder, "openvino", options={"inference_precision": "fp8"})


def test_jobs_at_different_steps_and_rows_beyond_the_engine_draw_what_they_draw_alone(folder: Path) -> None:
    requests = [
        Request(prompt="a cat", seed=1, steps=6, sampler="dpmpp_2m", size=(64, 64)),
        Request(prompt="the sand", seed=2, steps=3, sampler="euler_a", size=(64, 64)),
        Request(prompt="a cat", seed=3, steps=4, sampler="ddim", guidance=1.0, size=(64, 64)),
    ]
    with Pipeline.open(folder, backend="openvino") as pipe:
        together = pipe(requests).pixels
        alone = [pipe(each).pixels[0] for each in requests]
    for ours, theirs in zip(together, alone, strict=True):
        assert theirs.std() >= 10
        assert psnr(ours, theirs) >= 60


def test_ranges_and_several_profiles(tmp_path: Path) -> None:
    folder = Path(copytree(FIXTURE, tmp_path / "bundle"))
    build(folder, "onnxruntime", size="64x64:128x128")
    build(folder, "openvino", size="64x64:128x64,128x128", batch="1:2")
    pictures = []
    for backend in ("onnxruntime", "openvino"):
        with Pipeline.open(folder, backend=backend) as pipe:
            pictures.append([pipe("a cat", **(ASKED | {"size": size})).pixels[0] for size in ((128, 64), (64, 64), (128, 128))])
    for ours, theirs in zip(*pictures, strict=True):
        assert psnr(ours, theirs) >= 45
    with Pipeline.open(folder, backend="openvino") as pipe, pytest.raises(EngineError, match="--size 64x128"):
        pipe("a cat", size=(64, 128))


def test_outputs_are_the_callers_and_inputs_may_be_read_only(folder: Path) -> None:
    with Pipeline.open(folder, backend="openvino", options=EngineOptions(threads=1)) as pipe:
        engine = pipe.engine("unet", rows=2, height=8, width=8)
        first, second = (feeds(engine, 8, seed, batch=2, height=8, width=8, sequence=77) for seed in (1, 2))
        for array in first.values():
            array.flags.writeable = False
        out = engine(first)["out_sample"]
        kept = out.copy()
        other = engine(second)["out_sample"]
        assert not np.shares_memory(out, other)
        np.testing.assert_array_equal(out, kept)
        out[:] = 0
        np.testing.assert_array_equal(engine(first)["out_sample"], kept)
        engine.close()
        with pytest.raises(Exception, match="is closed"):
            engine(first)


@pytest.mark.parametrize("ending", [".bin", ".xml"])
def test_a_changed_byte_is_refused(folder: Path, tmp_path: Path, ending: str) -> None:
    changed = Path(copytree(folder, tmp_path / "bundle"))
    path = next((changed / "engines").glob(f"unet-openvino*{ending}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=rf"unet-openvino.*\{ending}: changed"), Pipeline.open(changed, backend="openvino"):
        pass


def test_what_openvino_cannot_read_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    broken = Path(copytree(folder, tmp_path / "bundle"))
    path = next((broken / "engines").glob("unet-openvino*.xml"))
    path.write_bytes(path.read_bytes()[:5000])
    manifest = Bundle.open(folder).manifest
    name = f"engines/{path.name}"
    files = dict(manifest.files) | {name: file_spec(path)}
    save_manifest(broken, dataclasses.replace(manifest, files=files))
    with (
        pytest.raises(EngineError, match=r"unet-openvino.*: OpenVINO .* cannot open it"),
        Pipeline.open(broken, backend="openvino"),
    ):
        pass


def test_where_nothing_is_said_the_models_own_size_is_built(folder: Path) -> None:
    bundle = Bundle.open(folder)
    shapes = BuildRequest(backend="openvino").shapes(bundle.manifest.model)
    assert shapes == Shapes.parse(bundle.manifest.model, static=True)


def test_prompts_of_several_chunks(folder: Path, tmp_path: Path) -> None:
    folder = Path(copytree(folder, tmp_path / "bundle"))
    build(folder, "openvino", size="64x64", chunks="1:3", components=("unet",))
    request = Request(prompt="a (red:1.3) cat BREAK [dog|sea]", prompt_syntax="a1111", steps=3, seed=3, size=(64, 64))
    images = []
    for backend in ("openvino", "onnxruntime"):
        with Pipeline.open(folder, backend=backend) as pipe:
            images.append(pipe(request).pixels[0])
    assert images[1].std() >= 10
    assert psnr(*images) >= 50


def test_importing_it_sends_nothing(tmp_path: Path) -> None:
    code = "from sdruntime.backends.ov.build import library; library(); import sys; print('openvino_telemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_its_absence_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(LibraryMissing, match=r"pip install \"sdruntime\[openvino\]\""):
        build(folder, "openvino")
    machine = Machine.here(names=("onnxruntime", "openvino"))
    assert choose_engine(Bundle.open(folder), "unet", machine).backend == "onnxruntime"


@pytest.mark.parametrize(("slow", "chosen"), [("onnxruntime", "openvino"), ("openvino", "onnxruntime")])
def test_auto_takes_what_was_measured_to_be_quicker_and_measures_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, chosen: str
) -> None:
    measured = []

    def timed(calls: Mapping[str, Any]) -> dict[str, float]:
        measured.append(list(calls))
        return {name: 2.0 if name == slow else 1.0 for name in calls}

    monkeypatch.setattr("sdruntime.engines.speed.least_seconds", timed)
    monkeypatch.setenv("SDRUNTIME_CACHE", str(tmp_path))
    for _ in range(2):
        with Pipeline.open(folder) as pipe:
            assert pipe.engine("unet", rows=2, height=8, width=8).spec.backend == chosen
            assert pipe.engine("unet", rows=2, height=16, width=16).spec.backend == "onnxruntime"  # the only one of this size
            assert pipe.engine("vae_decoder", height=8, width=8).spec.backend == chosen
    assert measured == [["onnxruntime", "openvino"]]
    with Pipeline.open(folder, options=EngineOptions(measure=False)) as pipe:
        assert pipe.engine("unet", rows=2, height=8, width=8).spec.backend == "onnxruntime"
