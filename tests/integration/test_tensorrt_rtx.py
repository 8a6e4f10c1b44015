"""Real TensorRT-RTX engines, built without a GPU, in an environment of NumPy and the library alone: no torch, no onnx."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from integration.reference import psnr
from integration.test_environments import ROOT, run
from once import once

from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.changes.change import remove_engine
from sdruntime.bundle.tasks import GUIDANCE, task_of
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline

RTX = "1.7.1.116"
PROMPT = "a cat in the red and"
TASKS = tuple((task, tiny.ONE_KIND.get(task, "sd1")) for task in tiny.TASKS)
LATER = ("depth", "refining", "upscaling")  # in `make test-full`
GPU_TARGETS = ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "ampere+"]


@pytest.fixture(scope="session")
def python() -> Path:
    """Made once, and kept beside the main environment; the runtime in it is always the tree's."""
    folder = ROOT / f".venv-tensorrt-rtx{RTX}"
    python = folder / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if not (folder / ".ready").exists():
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(*install, "numpy", f"tensorrt-rtx=={RTX}")
        (folder / ".ready").touch()
    run(*install, "--no-deps", "--force-reinstall", ROOT / "runtime")
    return python


def bare(bundle: Path, place: Path) -> Path:
    """A copy without the engines that other tests have put in."""
    copy = Bundle.open(shutil.copytree(bundle, place))
    for engine in copy.manifest.engines:
        copy = remove_engine(copy, engine)
    return copy.folder


def built(python: Path, bundle: Path, *arguments: str) -> dict[str, dict[str, object]]:
    """Return what `sdruntime build --json` reports of each component's engine."""
    report = json.loads(run(python, "-m", "sdruntime", "build", bundle, "--backend", "tensorrt-rtx", "--json", *arguments))
    return {engine["component"]: engine for engine in report["engines"]}


def test_nothing_but_numpy_and_the_library_is_there(python: Path) -> None:
    packages = {row["name"].lower().replace("_", "-") for row in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert {name for name in packages if not name.startswith("tensorrt-rtx")} <= {
        "sdruntime",
        "numpy",
        "pip",
        "setuptools",
        "wheel",
    }


@pytest.mark.parametrize(
    ("task", "kind"), [pytest.param(*pair, marks=pytest.mark.full if pair[0] in LATER else ()) for pair in TASKS]
)
def test_unets_of_tasks_are_built_in_half_precision(
    task: str,
    kind: tiny.Kind,
    python: Path,
    tmp_path_factory: pytest.TempPathFactory,
    exported_once: Callable[..., Path],
    tmp_path: Path,
) -> None:
    write = functools.partial(tiny.write_task_checkpoint, kind=kind, task=task)
    checkpoint = once(tmp_path_factory, f"checkpoints/tiny-{task}-{kind}", write)
    bundle = bare(exported_once(checkpoint, precision="fp16", audit=False), tmp_path / "bundle")
    engines = built(python, bundle, "--target", "sm86", "--component", "unet", "--no-verify")
    assert int(str(engines["unet"]["bytes"])) > 100_000
    unet = Bundle.open(bundle).manifest.components["unet"]
    assert [tensor.name for tensor in unet.inputs][3:] == {"lcm": [GUIDANCE]}.get(task) or task_of(unet) == task


def write_other(folder: Path, name: str) -> Path:
    """An SDXL checkpoint with a pruned UNet, or an SD1 one with another VAE."""
    tiny.write_checkpoint(folder, "sdxl" if name in tiny.PRUNED else "sd1")
    if name in tiny.PRUNED:
        tiny.prune(folder, name)
    else:
        {"AutoencoderTiny": tiny.write_tiny_vae, "AsymmetricAutoencoderKL": tiny.write_asymmetric_vae}[name](folder / "vae")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", name]}), encoding="utf-8")
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", [*tiny.PRUNED, "AutoencoderTiny", "AsymmetricAutoencoderKL"])
@pytest.mark.parametrize("shapes", [(), ("--size", "64x64:72x104:128x128")], ids=["fixed", "dynamic"])
def test_pruned_unets_and_other_vaes_are_built_in_half_precision(
    name: str,
    shapes: tuple[str, ...],
    python: Path,
    tmp_path_factory: pytest.TempPathFactory,
    exported_once: Callable[..., Path],
    tmp_path: Path,
) -> None:
    checkpoint = once(tmp_path_factory, f"checkpoints/tiny-{name}", functools.partial(write_other, name=name))
    bundle = bare(exported_once(checkpoint, precision="fp16", audit=False), tmp_path / "bundle")
    engines = built(python, bundle, "--target", "sm86", "--no-verify", *shapes)
    assert list(engines) == list(Bundle.open(bundle).manifest.components)
    assert {engine["state"] for engine in engines.values()} == {"done"}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_an_image_encoder_and_a_unet_with_an_ip_adapter_are_built_in_half_precision(
    kind: str, python: Path, sd1_checkpoint: Path, sd1_ip_adapters: Path, export: Callable[..., Path]
) -> None:
    adapter = sd1_ip_adapters / kind / "adapter.safetensors"
    bundle = export(sd1_checkpoint, precision="fp16", audit=False, ip_adapter=str(adapter))
    names = ("--component", "unet", "--component", "image_encoder")
    for shapes in ((), ("--size", "64x64:72x104:128x128")):
        engines = built(python, bundle, "--target", "sm86", "--no-verify", *names, *shapes)
        assert sorted(engines) == ["image_encoder", "unet"]
        assert engines["unet"]["state"] == "done"
        assert engines["image_encoder"]["state"] == ("present" if shapes else "done")  # it has no sizes of its own


def test_a_controlnet_a_t2i_adapter_and_a_unet_that_takes_both_are_built_in_half_precision(
    python: Path, sd1_checkpoint: Path, sd1_controlnets: Path, export: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = tiny.write_t2i_adapter(tmp_path / "adapter", sd1_checkpoint)
    nets = {"controlnet": str(sd1_controlnets / "canny"), "t2i_adapter": str(adapter)}
    bundle = export(sd1_checkpoint, precision="fp16", audit=False, controlnets=nets)
    names = ("controlnet", "t2i_adapter", "unet")
    engines = built(
        python, bundle, "--target", "sm86", "--no-verify", *(part for name in names for part in ("--component", name))
    )
    assert {name: engine["state"] for name, engine in engines.items()} == dict.fromkeys(names, "done")
    opened = Bundle.open(bundle).manifest
    assert {engine.component: engine.precision for engine in opened.engines} == dict.fromkeys(names, "fp16")
    residuals, features = (opened.components[name].outputs for name in ("controlnet", "t2i_adapter"))
    taken = opened.components["unet"].optional_inputs
    assert len(residuals) > 3
    assert taken[len(features) :] == residuals
    assert [tensor.name for tensor in taken[: len(features)]] == [tensor.name for tensor in features]


def test_engines_are_added_to_the_shapes_bundle(python: Path, shapes_bundle: Path, tmp_path: Path) -> None:
    bundle = bare(shapes_bundle, tmp_path / "bundle")
    before = Bundle.open(bundle).manifest
    engines = built(python, bundle)
    after = Bundle.open(bundle)
    assert list(engines) == list(before.components)
    assert after.changed_files() == []
    assert {path: after.manifest.files[path] for path in before.files} == before.files
    for engine in after.manifest.engines:
        assert (engine.backend, engine.version, engine.target, engine.platform) == (
            "tensorrt-rtx",
            RTX,
            "ampere+",
            "linux-x86_64",
        )
        assert [low for low, best, high in engine.profiles[0].values() if engine.component == "unet" and low != high] == []
        assert after.manifest.files[engine.files[0]].size == engines[engine.component]["bytes"]
        assert 50e6 < float(str(engines[engine.component]["peak_memory"])) < 4e9
    assert {engine["state"] for engine in built(python, bundle).values()} == {"present"}
    assert Bundle.open(bundle).manifest == after.manifest


# (bundle, shapes, target): the full matrix is in `make test-full`
FAST = [
    ("sd1", (), "ampere+"),
    ("sd1_fp16", (), "ampere+"),
    ("sd1_fp16", ("--size", "64x64:128x128", "--batch", "1:4", "--chunks", "1:3"), "sm75"),
    ("sd1_bf16", (), "sm89"),
    ("sdxl_fp16", (), "sm120"),
]
DYNAMIC = ("--size", "64x64:64x64:128x128", "--batch", "1:2:4", "--chunks", "1:3")
FULL = [
    (name, shapes, target)
    for name in ("sd1", "sd1_fp16", "sd1_bf16", "sd2_fp16", "sdxl_fp16")
    for shapes in ((), DYNAMIC)
    for target in GPU_TARGETS
    if not (target == "sm75" and name in ("sd1", "sd1_bf16"))  # refused: the next test
]


def check_matrix(python: Path, bundle: Path, shapes: tuple[str, ...], target: str) -> None:
    engines = built(python, bundle, "--target", target, *shapes)
    opened = Bundle.open(bundle)
    assert list(engines) == list(opened.manifest.components)
    assert {engine.target for engine in opened.manifest.engines} == {target}
    precisions = {engine.component: engine.precision for engine in opened.manifest.engines}
    assert precisions.pop("step") == "fp32"
    assert set(precisions.values()) == {opened.manifest.precision}
    for engine in opened.manifest.engines:
        weights = sum(opened.manifest.files[path].size for path in opened.manifest.components[engine.component].files[1:])
        assert opened.manifest.files[engine.files[0]].size > weights


@pytest.mark.parametrize(("name", "shapes", "target"), FAST)
def test_every_component_builds(
    python: Path, request: pytest.FixtureRequest, tmp_path: Path, name: str, shapes: tuple[str, ...], target: str
) -> None:
    check_matrix(python, bare(request.getfixturevalue(f"{name}_bundle"), tmp_path / "bundle"), shapes, target)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "shapes", "target"), [("sd2_fp16", ("--size", "64x64,128x64", "--batch", "1,2"), "sm86"), *FULL]
)
def test_every_component_builds_for_every_target(
    python: Path, request: pytest.FixtureRequest, tmp_path: Path, name: str, shapes: tuple[str, ...], target: str
) -> None:
    check_matrix(python, bare(request.getfixturevalue(f"{name}_bundle"), tmp_path / "bundle"), shapes, target)


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("sd1", ("--target", "sm75"), 2, "no fp32 matrix product for Turing: export with --precision fp16"),
        ("sd1_bf16", ("--target", "sm75"), 2, "bf16 needs compute capability 8.0"),
        ("sd1_fp16", ("--target", "sm87"), 2, "unknown target 'sm87': did you mean sm"),
        ("sd1_fp16", ("--target", "current"), 3, "no NVIDIA GPU found; name a target to build for: sm75"),
        ("sd1_fp16", ("--option", "strip=true"), 2, "building with it needs an RTX GPU"),
        ("sd1_fp16", ("--option", "version_compatible=true"), 2, "it ships no lean runtime"),
        ("sd1_fp16", ("--option", "optimization_level=9"), 2, "0 (fastest build) to 5"),
        ("sd1_fp16", ("--option", "optimisation_level=3"), 2, "did you mean optimization_level?"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_work(
    python: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    bundle = bare(request.getfixturevalue(f"{name}_bundle"), tmp_path / "bundle")
    before = Bundle.open(bundle).manifest
    command = [python, "-m", "sdruntime", "build", bundle, "--backend", "tensorrt-rtx", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert message in done.stderr
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert Bundle.open(bundle).manifest == before


def test_a_graph_that_does_not_parse_names_node_and_reason(python: Path, sd1_fp16_bundle: Path, tmp_path: Path) -> None:
    import onnx

    from sdruntime.bundle.bundle import file_spec
    from sdruntime.bundle.manifest import load_manifest, save_manifest

    bundle = bare(sd1_fp16_bundle, tmp_path / "bundle")
    path = bundle / "vae_decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Softmaximum"
    path.write_bytes(model.SerializeToString())
    manifest = load_manifest(bundle)
    files = {**manifest.files, "vae_decoder/model.onnx": file_spec(path)}
    save_manifest(bundle, dataclasses.replace(manifest, files=files))
    command = [python, "-m", "sdruntime", "build", bundle, "--backend", "tensorrt-rtx", "--component", "vae_decoder"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "vae_decoder: TensorRT 1.7.1.116 cannot parse its ONNX: node " in done.stderr
    assert "(Softmaximum)" in done.stderr
    assert Bundle.open(bundle).manifest.engines == ()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_ended_leaves_a_valid_bundle_and_goes_on_later(
    python: Path, shapes_bundle: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    bundle = bare(shapes_bundle, tmp_path / "bundle")
    command = [str(python), "-m", "sdruntime", "build", str(bundle), "--backend", "tensorrt-rtx"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stderr is not None
    for line in child.stderr:
        if "build unet" in line:
            os.killpg(child.pid, ending)
            break
    _, notes = child.communicate(timeout=60)
    if ending == signal.SIGINT:
        assert (child.returncode, notes.splitlines()[-1:]) == (130, ["interrupted"])
    else:
        assert child.returncode == -ending
    opened = Bundle.open(bundle)
    assert opened.changed_files() == []
    assert [engine.component for engine in opened.manifest.engines] == ["text_encoder", "vae_encoder", "vae_decoder"]
    states = {component: engine["state"] for component, engine in built(python, bundle).items()}
    assert states == dict.fromkeys(("text_encoder", "vae_encoder", "vae_decoder"), "present") | {"unet": "done", "step": "done"}
    assert [path.name for path in bundle.iterdir() if path.name.startswith(".building")] == []


@pytest.mark.parametrize("name", ["sd1_fp16", "sdxl_fp16"])
def test_the_very_graph_of_the_engine_gives_the_fp32_picture(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    """Without a GPU to run the engine, ONNX Runtime runs the ONNX that it is built from; the image matches that of fp32."""
    pictures = []
    for each in (name, name.removesuffix("_fp16")):
        bundle = bare(request.getfixturevalue(f"{each}_bundle"), tmp_path / each)
        for _ in build_engines(bundle, BuildRequest(backend="onnxruntime")):
            pass
        with Pipeline.open(bundle) as pipe:
            pictures.append(pipe(PROMPT, steps=20, seed=3).pixels[0])
    assert np.std(pictures[1]) >= 10
    assert psnr(*pictures) >= 30
