"""A bundle whose files change under it: the same image or an error, never another image, and no signal."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import FIXTURE, TESTS

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine, EngineOptions, Shared
from sdruntime.backends.base.feeds import shape_of
from sdruntime.backends.registry import backend
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import save_manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import BundleError, SettingError
from sdruntime.pipeline.text.conditioning import Conditioner

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime")
BACKENDS = ("onnxruntime", "openvino")
COMPONENTS = ("text_encoder", "unet", "vae_decoder")
DIMS = {"height": 8, "width": 8, "sequence": 77}


@pytest.fixture(scope="module", params=BACKENDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of one backend."""
    pytest.importorskip(request.param)
    folder = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp(request.param) / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend=request.param, size="64x64:128x128", components=COMPONENTS)):
        pass
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def opened(folder: Path, component: str) -> Engine:
    bundle = Bundle.open(folder)
    spec = next(engine for engine in bundle.manifest.engines if engine.component == component)
    found = backend(spec.backend).open_engine(bundle, spec, EngineOptions(threads=1), Shared())
    return found


def weights(folder: Path, component: str) -> Path:
    spec = next(engine for engine in Bundle.open(folder).manifest.engines if engine.component == component)
    return folder / spec.files[-1]


def outputs(engine: Engine, **dims: int) -> dict[str, Array]:
    random, feeds = np.random.default_rng(0), {}
    for tensor in engine.component.inputs:
        shape = shape_of(tensor, DIMS | {"batch": engine.spec.profiles[0]["batch"][1]} | dims, 8)
        whole = tensor.dtype != "float32"
        feeds[tensor.name] = (random.integers(0, 500, shape) if whole else random.standard_normal(shape)).astype(tensor.dtype)
    return {name: array.copy() for name, array in engine(feeds).items()}


def overwrite(path: Path) -> None:
    """Other weights in place, as `cp` writes them."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(np.random.default_rng(1).standard_normal(size // 4 + 1).astype("<f4").tobytes()[:size])


def cut_short(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_open_engine_computes_the_same_after_its_weights_were_overwritten(folder: Path, component: str) -> None:
    with opened(folder, component) as engine:
        before = outputs(engine)
        overwrite(weights(folder, component))
        after = outputs(engine)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(BundleError, match="changed since it was written"):
        opened(folder, component)


CALLS = """
import sys
sys.path[:0] = sys.argv[1].split(":")
from pathlib import Path
import test_changing_files as t
import numpy as np
folder, component = Path(sys.argv[2]), sys.argv[3]
with t.opened(folder, component) as engine:
    before = t.outputs(engine)
    t.cut_short(t.weights(folder, component))
    after = t.outputs(engine)
assert all(np.array_equal(before[name], after[name]) for name in before)
"""


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_that_are_cut_short_end_no_process(folder: Path, component: str) -> None:
    command = [sys.executable, "-c", CALLS, f"{TESTS}:{Path(__file__).parent}", str(folder), component]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_a_profile_that_is_compiled_later_is_of_the_weights_that_were_opened(folder: Path) -> None:
    """An OpenVINO engine reads its weights again for another profile."""
    bundle = Bundle.open(folder)
    if bundle.manifest.engines[0].backend != "openvino":
        pytest.skip("profiles are compiled one by one in OpenVINO alone")
    for _ in build_engines(folder, BuildRequest(backend="openvino", size="64x64,128x128", components=("vae_decoder",))):
        pass
    bundle = Bundle.open(folder)
    spec = next(each for each in bundle.manifest.engines if len(each.profiles) > 1)
    with backend("openvino").open_engine(bundle, spec, EngineOptions(threads=1), Shared()) as engine:
        small = outputs(engine)["sample"]
        overwrite(folder / spec.files[-1])
        with pytest.raises(BundleError, match="changed since it was written"):
            outputs(engine, height=16, width=16)
        assert np.array_equal(outputs(engine)["sample"], small)


@pytest.mark.parametrize("change", [overwrite, cut_short])
def test_weights_that_change_while_an_engine_is_opened_are_an_error(
    folder: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the library took them in, or before: no engine is returned."""
    place = weights(folder, "text_encoder")
    if Bundle.open(folder).manifest.engines[0].backend == "openvino":
        from sdruntime.backends.ov import engine as module

        real: Any = module.own_constants
        monkeypatch.setattr(module, "own_constants", lambda *given: (real(*given), change(place))[0])
        if change is cut_short:
            pytest.skip("OpenVINO reads them afterwards: a signal, which the promise excepts (docs/trust.md)")
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession
        monkeypatch.setattr(
            onnxruntime, "InferenceSession", lambda *given, **options: (session(*given, **options), change(place))[0]
        )
    with pytest.raises(BundleError, match="changed while it was read"):
        opened(folder, "text_encoder")


@pytest.mark.parametrize("number", [0, 1])
def test_no_engine_is_made_of_changed_files_and_no_graph_reaches_a_library(
    folder: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte of each of the two files, in 40 places. Weights may be taken in while they are hashed; what is made of them then
    is never returned."""
    bundle, reached = Bundle.open(folder), []
    spec = next(engine for engine in bundle.manifest.engines if engine.component == "text_encoder")
    if spec.backend == "openvino":
        from sdruntime.backends.ov import engine as module

        monkeypatch.setattr(module, "own_constants", lambda *_: reached.append(spec.files[1]))
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession
        monkeypatch.setattr(
            onnxruntime,
            "InferenceSession",
            lambda *given, **options: (reached.append(spec.files[1]), session(*given, **options))[1],
        )
    place = folder / spec.files[number]
    good = place.read_bytes()
    for at in np.linspace(0, len(good) - 1, 40).astype(int):
        place.write_bytes(good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :])
        with pytest.raises(BundleError, match="changed since it was written"):
            opened(folder, "text_encoder")
    assert (not reached) == (number == 0)


def test_nothing_refers_to_the_weights_of_an_open_session(folder: Path) -> None:
    bundle = Bundle.open(folder)
    if bundle.manifest.engines[0].backend != "onnxruntime":
        pytest.skip("OpenVINO's constants keep the map, and read nothing there")
    with opened(folder, "unet"):
        assert str(weights(folder, "unet")) not in Path("/proc/self/maps").read_text()
    spec = bundle.manifest.engines[0]
    options = EngineOptions(session={"session.use_external_initializer_file_buffers_directly": "1"})
    with pytest.raises(SettingError, match="must be 0"):
        backend("onnxruntime").open_engine(bundle, spec, options, Shared())


def test_a_tokenizers_files_are_those_that_the_manifest_lists(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "bundle"))
    bundle, unlisted = Bundle.open(folder), "tokenizer/special_tokens_map.json"
    files = {path: spec for path, spec in bundle.manifest.files.items() if path != unlisted}
    save_manifest(folder, dataclasses.replace(bundle.manifest, files=files))
    (folder / unlisted).write_text("not even JSON")
    bundle = Bundle.open(folder)
    assert Conditioner.open(bundle).tokenizers["text_encoder"].encode("a cat")
    merges = folder / "tokenizer/merges.txt"
    merges.write_bytes(merges.read_bytes()[::-1])
    with pytest.raises(BundleError, match=r"tokenizer/merges\.txt: changed since it was written"):
        Conditioner.open(bundle)


def test_a_linked_manifest_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "bundle"))
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest\.json: not a regular file"):
        Bundle.open(folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(BundleError, match=r"manifest\.json: not a regular file"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", BACKENDS)
def test_in_single_precision_too(sd1_bundle: Path, tmp_path: Path, name: str) -> None:
    """Weights that a library would not even have to convert."""
    pytest.importorskip(name)
    folder = Path(shutil.copytree(sd1_bundle, tmp_path / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend=name, size="64x64", components=COMPONENTS)):
        pass
    for component in COMPONENTS:
        with opened(folder, component) as engine:
            before = outputs(engine)
            overwrite(weights(folder, component))
            after = outputs(engine)
        assert all(np.array_equal(before[tensor], after[tensor]) for tensor in before), component
