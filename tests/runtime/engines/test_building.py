from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from bundles import MODEL
from places import FIXTURE

from sdruntime.backends.base.building import Library
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.engines.choose import Machine, choose_engine, misfit, warn_if_slow
from sdruntime.engines.shapes import Shapes
from sdruntime.errors import DeviceMissing, EngineError, OutOfSpace, SdruntimeError, SettingError, UnknownName
from sdruntime.system.cuda import Device

FAKE = {"fake": Library(version="1", targets=("cpu",))}
ORT_CPU = Library(version="1.32.0", targets=("cpu",))
ORT_CUDA = Library(version="1.32.0", targets=("cuda", "cpu"))
GPU = Device(name="a GPU", capability=(9, 0), memory=1 << 36)


def built(bundle: Bundle, **settings: str) -> Bundle:
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", **settings)):  # type: ignore[arg-type]
        pass
    return Bundle.open(bundle.folder)


def test_onnxruntime_refuses_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(FIXTURE, tmp_path / os.fsdecode(b"b\xffndle")))
    with pytest.raises(SettingError, match=r"ONNX Runtime writes only to paths in UTF-8: rename the folder$"):
        list(build_engines(folder, BuildRequest(backend="onnxruntime")))
    assert not (folder / "engines").exists()


def ort(target: str, version: str = "1.32.0") -> EngineSpec:
    profile = {"batch": (1, 2, 16), "height": (8, 64, 256), "width": (8, 64, 256), "sequence": (77, 77, 77)}
    return EngineSpec(
        component="unet",
        backend="onnxruntime",
        version=version,
        target=target,
        precision="fp32",
        files=(f"engines/unet-{version}-{target}.onnx",),
        profiles=(profile,),
    )


def with_engines(bundle: Bundle, *engines: EngineSpec) -> Bundle:
    files = dict(bundle.manifest.files) | {
        path: bundle.manifest.files["unet/model.onnx"] for each in engines for path in each.files
    }
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, engines=engines, files=files))


def test_a_build_adds_engines_once_and_changes_nothing_else(bundle: Bundle) -> None:
    once = built(bundle)
    assert [engine.component for engine in once.manifest.engines] == list(bundle.manifest.components)
    assert set(once.manifest.files) - set(bundle.manifest.files) == {engine.files[0] for engine in once.manifest.engines}
    states = [event.state for event in build_engines(bundle.folder, BuildRequest(backend="fake"))]
    assert states == ["present"] * 4
    assert Bundle.open(bundle.folder).manifest == once.manifest


def test_ranges_are_in_the_units_of_each_component(bundle: Bundle) -> None:
    engines = {
        engine.component: dict(engine.profiles[0])
        for engine in built(bundle, size="256x128:512x512:768x1024", batch="1:2:4").manifest.engines
    }
    assert engines["text_encoder"] == {"batch": (1, 2, 8)}
    assert engines["unet"] == {"batch": (1, 4, 8), "height": (16, 64, 128), "width": (32, 64, 96), "sequence": (77, 77, 2464)}
    assert engines["vae_decoder"] == {"batch": (1, 2, 4), "height": (16, 64, 128), "width": (32, 64, 96)}
    assert engines["vae_encoder"] == {"batch": (1, 2, 4), "height": (128, 512, 1024), "width": (256, 512, 768)}


def test_chunks_of_a_prompt_are_a_range_of_tokens(bundle: Bundle) -> None:
    (engine,) = [each for each in built(bundle, size="64x64", chunks="1:2:3").manifest.engines if each.component == "unet"]
    assert engine.profiles[0]["sequence"] == (77, 154, 231)
    assert "64x64-b1-8-c1-3" in engine.name
    assert Shapes.parse(MODEL, static=True).chunks == (1, 1, 1)
    assert Shapes.parse(MODEL, static=True, chunks="2").label == "512x512-b1-c2"


def test_engines_that_differ_in_their_optimum_only_stand_beside_each_other(bundle: Bundle) -> None:
    built(bundle, size="64x64:512x512")
    both = built(bundle, size="64x64:256x256:512x512")
    names = [engine.name for engine in both.manifest.engines if engine.component == "unet"]
    assert len(set(names)) == 2
    assert both.changed_files() == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"size": "500x512"}, "500 is not a multiple of 64"),
        ({"size": "512"}, "WIDTHxHEIGHT"),
        ({"size": "0x0"}, "must rise from 1"),
        ({"size": "512x512:256x256"}, "must rise"),
        ({"size": "64x64:64x64:64x64:64x64"}, "MIN:OPT:MAX"),
        ({"batch": "0"}, "must rise from 1"),
        ({"batch": "4:1"}, "must rise"),
        ({"batch": "many"}, "expected 4, 1:4"),
        ({"chunks": "many"}, "chunks 'many': expected 1, 1:3 or 1:1:3"),
        ({"chunks": "0"}, "chunks 0:0:0: MIN, OPT and MAX must rise from 1"),
        ({"chunks": "3:1"}, "must rise"),
        ({"chunks": "1:33"}, "chunks 1:33: at most 32"),
    ],
)
def test_shapes_out_of_order_are_refused(sizes: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Shapes.parse(MODEL, **sizes)


def test_an_unknown_backend_component_or_target_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UnknownName, match="did you mean onnxruntime"):
        list(build_engines(bundle.folder, BuildRequest(backend="onnxrt")))
    with pytest.raises(UnknownName, match="did you mean unet"):
        list(build_engines(bundle.folder, BuildRequest(backend="fake", components=("uent",))))
    with pytest.raises(DeviceMissing, match="target 'cuda': fake 1 has cpu"):
        list(build_engines(bundle.folder, BuildRequest(backend="fake", target="cuda")))


def test_all_components_but_those_left_out(bundle: Bundle) -> None:
    request = BuildRequest(backend="fake", without=("vae_encoder", "text_encoder"))
    assert [event.component for event in build_engines(bundle.folder, request) if event.state == "done"] == [
        "unet",
        "vae_decoder",
    ]
    with pytest.raises(UnknownName, match="did you mean vae_encoder"):
        list(build_engines(bundle.folder, BuildRequest(backend="fake", without=("vae_encodr",))))


def test_cuda_comes_before_the_cpu_and_the_fake_only_by_name(bundle: Bundle) -> None:
    both = with_engines(built(bundle), ort("cpu"), ort("cuda"))
    on_gpu = Machine(libraries={"onnxruntime": ORT_CUDA, **FAKE}, devices=(GPU,))
    assert choose_engine(both, "unet", on_gpu).target == "cuda"
    assert choose_engine(both, "unet", Machine(libraries={"onnxruntime": ORT_CUDA, **FAKE})).target == "cpu"
    with pytest.raises(EngineError, match="the bundle has no engine of it"):
        choose_engine(built(bundle), "unet", on_gpu)
    assert choose_engine(built(bundle), "unet", on_gpu, name="fake").backend == "fake"


@pytest.mark.parametrize(("rows", "chosen"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 16), (16, 16), (40, 16)])
def test_among_engines_that_are_alike_the_rows_decide(bundle: Bundle, rows: int, chosen: int) -> None:
    profile = dict(ort("cpu").profiles[0])
    several = [
        dataclasses.replace(ort("cpu"), files=(f"engines/{size}.onnx",), profiles=({**profile, "batch": (size, size, size)},))
        for size in (16, 2, 4)
    ]
    here = Machine(libraries={"onnxruntime": ORT_CPU})
    engine = choose_engine(with_engines(bundle, *several), "unet", here, rows=rows, height=64, width=64)
    assert engine.profiles[0]["batch"][0] == chosen


def test_the_error_says_why_each_engine_does_not_fit_and_what_to_do(bundle: Bundle) -> None:
    crowd = with_engines(bundle, ort("cpu", "1.20.1"), ort("cuda"), ort("cpu"))
    with pytest.raises(EngineError) as caught:
        choose_engine(crowd, "unet", Machine(libraries={"onnxruntime": ORT_CPU}), height=4, width=64)
    assert caught.value.exit_code == 5
    lines = str(caught.value).splitlines()
    assert lines[1].endswith("built with onnxruntime 1.20.1, installed is 1.32.0")
    assert lines[2].endswith("built for cuda, this machine has cpu")
    assert lines[3].endswith("built for 64x64 to 2048x2048, batch 1 to 16, sequence 77; requested is 512x32")
    assert lines[4] == f"build one: sdruntime build {bundle.folder} --backend onnxruntime --size 512x32"


def test_a_patch_release_of_the_library_fits_and_a_missing_library_says_how_to_install_it() -> None:
    assert misfit(ort("cpu", "1.32.5"), Machine(libraries={"onnxruntime": ORT_CPU})) is None
    missing = Machine(libraries={"onnxruntime": Library(missing="pip install it")})
    assert misfit(ort("cpu"), missing) == "pip install it"


def test_the_cpu_beside_a_gpu_is_warned_of() -> None:
    with pytest.warns(
        RuntimeWarning,
        match=r"unet will run on the CPU although this machine has a GPU.*build 'a bundle' --backend onnxruntime --target cuda",
    ):
        warn_if_slow([ort("cpu")], Machine(libraries={"onnxruntime": ORT_CPU}, devices=(GPU,)), Path("a bundle"))
    warn_if_slow([ort("cpu")], Machine(libraries={"onnxruntime": ORT_CPU}), Path("a bundle"))
    warn_if_slow([ort("cuda")], Machine(libraries={"onnxruntime": ORT_CUDA}, devices=(GPU,)), Path("a bundle"))


def test_a_library_that_fails_on_a_full_disk_is_told_as_a_full_disk(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    def failing(*_: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL")

    monkeypatch.setattr("sdruntime.backends.ort.build.split_upsampling", bytes)
    monkeypatch.setattr("sdruntime.backends.ort.build.open_session", failing)
    request = BuildRequest(backend="onnxruntime", size="64x64")
    with pytest.raises(SdruntimeError, match=r"ONNX Runtime .* cannot build it"):
        list(build_engines(bundle.folder, request))
    monkeypatch.setattr("sdruntime.backends.ort.build._ROOM", 1 << 80)
    with pytest.raises(OutOfSpace, match=r"the disk is full \([0-9,]+ bytes are free\)"):
        list(build_engines(bundle.folder, request))


def test_every_backend_says_what_this_machine_has_of_it() -> None:
    for name, backend in BACKENDS.items():
        library = backend.here()
        assert backend.name == name
        assert (library.version is None) == bool(library.missing)


def test_a_backend_that_cannot_run_here_is_named_with_what_fits(bundle: Bundle) -> None:
    here = Machine(libraries={"onnxruntime": ORT_CPU})
    with pytest.raises(EngineError) as caught:
        choose_engine(with_engines(bundle, ort("cpu")), "unet", here, name="tensorrt")
    assert str(caught.value).splitlines() == [
        "no tensorrt engine of unet fits this machine: (the bundle has no tensorrt engine of it)",
        "tensorrt cannot be used: it needs an NVIDIA GPU, and this machine has no NVIDIA GPU",
        "omit --backend: the bundle's onnxruntime engine fits",
    ]
    with pytest.raises(EngineError) as caught:
        choose_engine(bundle, "unet", here, name="tensorrt")
    assert str(caught.value).splitlines()[-1] == f"build one: sdruntime build {bundle.folder} --backend onnxruntime"


def test_the_command_that_a_hint_names_mends_it(bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also with a path that a shell would split."""
    import shlex
    import shutil

    from sdruntime.__main__ import main

    folder = shutil.copytree(built(bundle, size="64x64").folder, tmp_path / "it's a bundle")
    generate = [
        "generate",
        str(folder),
        "x",
        "--backend",
        "fake",
        "--steps",
        "1",
        "--size",
        "128x64",
        "-o",
        str(tmp_path / "x.png"),
    ]
    assert main(generate) == 5
    hint = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("build one: "))
    program, *arguments = shlex.split(hint.removeprefix("build one: "))
    assert program == "sdruntime"
    assert main(arguments) == 0
    assert main(generate) == 0
