"""What a pipeline refuses before it draws: engines for something else, damaged plans, shapes, machines that lack something."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt import fake_engine
from trt.machine import Machine
from trt.surface import Surface

from sdruntime.__main__ import main
from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.trt.engine import open_engine
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import load_manifest, save_manifest
from sdruntime.errors import BundleError, DeviceMissing, EngineError, LibraryMissing, OutOfSpace
from sdruntime.pipeline.pipeline import Pipeline

Make = Callable[..., Machine]
DESERIALISED = ("Runtime", "deserialize_cuda_engine")
NEWEST = "tensorrt 11.4.0.106"


@pytest.fixture
def copy(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(small_folder, tmp_path / "copy"))


def plan_of(folder: Path, component: str) -> Path:
    found = next(engine for engine in Bundle.open(folder).manifest.engines if engine.component == component)
    return folder / found.files[0]


def listed(folder: Path, component: str, data: bytes | None = None, **changes: str) -> None:
    """The manifest says of a component's engine what is not so: its bytes are `data`, its version or target another."""
    path = plan_of(folder, component)
    if data is not None:
        path.write_bytes(data)
    manifest = load_manifest(folder)
    engines = [
        dataclasses.replace(engine, **changes) if engine.component == component else engine  # type: ignore[arg-type]
        for engine in manifest.engines
    ]
    files = {**manifest.files, path.relative_to(folder).as_posix(): file_spec(path)}
    save_manifest(folder, dataclasses.replace(manifest, engines=tuple(engines), files=files))


def drawn(folder: Path, backend: str = "auto", **options: int) -> None:
    with Pipeline.open(folder, backend=backend, options=EngineOptions(**options)) as pipe:  # type: ignore[arg-type]
        pipe("a cat", steps=1, size=(64, 64))


def refused(folder: Path, kind: type[Exception], code: int, *texts: str, **options: int) -> None:
    """Check that generating raises `kind` with this exit code and a message with these texts."""
    with pytest.raises(kind) as caught:
        drawn(folder, **options)
    assert type(caught.value) is kind
    assert caught.value.exit_code == code  # type: ignore[attr-defined]
    assert [text for text in texts if text not in str(caught.value)] == []


def test_an_engine_of_another_version(machine: Make, surfaces: dict[str, Surface], small_folder: Path) -> None:
    here = machine(surfaces["tensorrt 10.16.1.11"])
    refused(
        small_folder,
        EngineError,
        5,
        "built with tensorrt 11.4.0.106, installed is 10.16.1.11",
        f"sdruntime build {small_folder} --backend",
    )
    assert DESERIALISED not in here.trt.used


def test_an_engine_for_another_gpu(machine: Make, surfaces: dict[str, Surface], small_folder: Path) -> None:
    here = machine(surfaces[NEWEST], capability=(8, 9), name="Fake RTX 4090")
    refused(small_folder, EngineError, 5, "built for sm86, Fake RTX 4090 is sm89", f"build one: sdruntime build {small_folder}")
    assert DESERIALISED not in here.trt.used


def test_what_the_manifest_does_not_know_the_library_tells(machine: Make, surfaces: dict[str, Surface], copy: Path) -> None:
    machine(surfaces[NEWEST], capability=(8, 9))
    for component in ("text_encoder", "unet", "vae_decoder"):
        listed(copy, component, target="sm89")
    again = f"build it again: sdruntime build {copy} --backend tensorrt --component unet"  # the largest is opened first
    refused(copy, EngineError, 5, "generated on an incompatible device", "cannot open it on", again)
    machine(surfaces["tensorrt 10.16.1.11"])
    for component in ("text_encoder", "unet", "vae_decoder"):
        listed(copy, component, target="sm86", version="10.16.1.11")
    refused(copy, EngineError, 5, "Version tag does not match: current version 10.16.1.11", again)


def test_a_truncated_plan(here: Machine, copy: Path) -> None:
    path = plan_of(copy, "unet")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    refused(copy, BundleError, 5, f"{size - 1:,} bytes, but the manifest says {size:,}")
    assert DESERIALISED not in here.trt.used


@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_plan_with_one_changed_byte_never_reaches_the_library(here: Machine, copy: Path, where: float) -> None:
    """A plan is code. The largest is opened first."""
    path = plan_of(copy, "unet")
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    refused(copy, BundleError, 5, "1 fault", "changed since it was written (sha256 ", "restore it or export again")
    assert DESERIALISED not in here.trt.used


def test_a_plan_that_changes_while_it_is_deserialised(here: Machine, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library may have seen other bytes than were hashed: no engine is made of them."""
    bundle, real = Bundle.open(copy), fake_engine.Runtime.deserialize_cuda_engine
    spec, path = bundle.manifest.engines[0], copy / bundle.manifest.engines[0].files[0]

    def deserialize(self: Any, serialized_engine: Any) -> Any:
        made = real(self, serialized_engine)
        with path.open("r+b") as file:
            file.write(b"ELF")
        return made

    monkeypatch.setattr(fake_engine.Runtime, "deserialize_cuda_engine", deserialize)
    shared = Shared()
    with pytest.raises(BundleError, match="changed while it was read") as caught:
        open_engine(bundle, spec, EngineOptions(), shared)
    shared.close()
    assert here.gpus.leaks() == []
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_plan_that_is_listed_so_and_that_the_library_refuses(here: Machine, copy: Path, damage: str) -> None:
    data = plan_of(copy, "vae_decoder").read_bytes()
    listed(copy, "vae_decoder", {"cut": data[:-10], "foreign": b"ELF" + data[3:], "empty": b""}[damage])
    command = f"build it again: sdruntime build {copy} --backend tensorrt --component vae_decoder"
    refused(copy, EngineError, 5, "vae_decoder", "Serialization assertion failed", command)
    assert DESERIALISED in here.trt.used


def test_a_plan_of_another_component(here: Machine, copy: Path) -> None:
    listed(copy, "vae_decoder", plan_of(copy, "unet").read_bytes())
    with pytest.raises(BundleError, match="tensor 'timestep' does not exist in vae_decoder") as caught:
        drawn(copy)
    assert len(caught.value.faults) == 5
    assert here.gpus.leaks() == []  # though the error's traceback is still here


def test_a_plan_that_has_no_room(here: Machine, small_folder: Path) -> None:
    """It is the library that allocates, and tells it in its own words."""
    bundle = Bundle.open(small_folder)
    spec = bundle.manifest.engines[0]
    here.gpus.memory.taken[0] = here.gpus.memory.total - 10
    with pytest.raises(OutOfSpace, match=r"bytes and its working memory do not fit .*, where 10 are free .*low-memory"):
        open_engine(bundle, spec, EngineOptions(), shared := Shared())
    shared.close()


def test_a_shape_outside_every_profile(here: Machine, small_folder: Path) -> None:
    with Pipeline.open(small_folder) as pipe:
        with pytest.raises(EngineError) as caught:
            pipe("a cat", steps=1, size=(256, 64))
        assert caught.value.exit_code == 5
        assert "requested is 256x64" in str(caught.value)
        assert "64x64 to 192x" in str(caught.value)  # what there is
        assert f"sdruntime build {small_folder} --backend tensorrt --size 256x64" in str(caught.value)
        decoder = pipe.engine("vae_decoder")
        with pytest.raises(EngineError, match=r"batch 1, height 8, width 25, but it was built for .*width 8 to 24"):
            decoder({"latent_sample": np.zeros((1, 4, 8, 25), np.float32)})
        pipe("a cat", steps=1, size=(64, 64))


def test_no_driver(machine: Make, surfaces: dict[str, Surface], small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine(surfaces[NEWEST])
    monkeypatch.setattr(here.driver, "soname", "gone")
    refused(small_folder, EngineError, 5, "built for sm86, but there is no CUDA device", "--backend onnxruntime")
    refused(small_folder, DeviceMissing, 3, "no NVIDIA driver: libcuda.so.1", "nvidia-smi", device=1)
    bundle = Bundle.open(small_folder)
    with pytest.raises(DeviceMissing, match="no NVIDIA driver"):
        open_engine(bundle, bundle.manifest.engines[0], EngineOptions(), Shared())


def test_a_driver_without_devices(machine: Make, surfaces: dict[str, Surface], small_folder: Path) -> None:
    machine(surfaces[NEWEST], devices=0)
    refused(small_folder, EngineError, 5, "built for sm86, but there is no CUDA device", "--backend onnxruntime")


def test_a_device_that_is_not_there(here: Machine, small_folder: Path) -> None:
    for device in (1, 7):
        told = f"device {device}: the driver shows 1 (Fake RTX 3060), counted from 0"
        refused(small_folder, DeviceMissing, 3, told, "CUDA_VISIBLE_DEVICES", device=device)


def test_a_library_that_is_not_installed(machine: Make, small_folder: Path) -> None:
    machine(None)
    refused(small_folder, EngineError, 5, "tensorrt cannot be imported (import of tensorrt halted", 'pip install "sdruntime[')
    bundle = Bundle.open(small_folder)
    with pytest.raises(LibraryMissing, match="cannot be imported"):
        open_engine(bundle, bundle.manifest.engines[0], EngineOptions(), Shared())


def test_a_library_whose_own_libraries_are_missing(
    machine: Make, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's words are in the message."""
    machine(None)
    text = "libnvinfer.so.11: cannot open shared object file: No such file or directory"
    (tmp_path / "tensorrt.py").write_text(f"raise ImportError({text!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt")
    refused(small_folder, EngineError, 5, f"tensorrt cannot be imported ({text})", "pip install")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--device", "4"], 3, "device 4: the driver shows 1"),
        (["--size", "256x256"], 5, "no engine of unet fits this machine"),
        (["--steps", "0"], 2, "steps"),
    ],
)
def test_a_command_says_it_in_one_message(
    here: Machine,
    small_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    assert main(["generate", str(small_folder), "a cat", "-o", str(tmp_path / "cat.png"), *arguments]) == code
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert text in told
    assert "Traceback" not in told
    assert not (tmp_path / "cat.png").exists()
