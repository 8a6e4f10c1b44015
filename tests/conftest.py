"""Checkpoints, bundles and builds that many tests share, each made once a session (and only if a test asks for it).

An export takes half a minute. Traces are kept for the session, so that checkpoints of one architecture are traced once; to keep
them from one session to the next, set SDEXPORT_CACHE to a folder. Tests read these folders and never write to them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import cplusplus
import pytest
import tiny
import tiny_image_prompt
from once import once, shared

import sdruntime.backends.ort  # noqa: F401  the tests load ONNX Runtime themselves, too

Export = Callable[..., Path]

# `make test ARGS=…` hands its variables to every make below it; those that tests start are their own.
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS"):
    os.environ.pop(_name, None)

# A shell starts its background jobs with Ctrl-C ignored, and their children inherit that; tests of Ctrl-C want the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trace_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that traces are kept in."""
    with pytest.MonkeyPatch.context() as patch:
        if "SDEXPORT_CACHE" not in os.environ:
            patch.setenv("SDEXPORT_CACHE", str(shared(tmp_path_factory) / "traces"))
        yield Path(os.environ["SDEXPORT_CACHE"])


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory, trace_cache: Path) -> Export:
    """export(checkpoint, **options) -> a new bundle: what `sdexport build --no-verify` does, without a process of its own."""

    def exported(checkpoint: Path, **options: object) -> Path:
        return _export(checkpoint, tmp_path_factory.mktemp("bundles") / checkpoint.name, **options)

    return exported


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory, trace_cache: Path) -> Export:
    """exported_once(checkpoint, **options) -> the bundle that all tests of the session share; nobody writes to it."""

    def exported(checkpoint: Path, **options: object) -> Path:
        kind = "-".join(str(value) for pair in sorted(options.items()) for value in pair)
        return once(tmp_path_factory, f"bundles-{kind}/{checkpoint.name}", lambda folder: _export(checkpoint, folder, **options))

    return exported


def _export(checkpoint: Path, folder: Path, **options: object) -> Path:
    from sdexport.build.events import ExportOptions
    from sdexport.build.export import build

    for _ in build(str(checkpoint), folder, ExportOptions(**({"verify": False} | options))):  # type: ignore[arg-type]
        pass
    return folder


def _checkpoint(factory: pytest.TempPathFactory, kind: tiny.Kind) -> Path:
    pytest.importorskip("diffusers", reason="checkpoints are written by diffusers")
    return once(factory, f"checkpoints/tiny-{kind}", lambda folder: tiny.write_checkpoint(folder, kind))


@pytest.fixture(scope="session")
def sd1_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1: epsilon, end-token padding, VAE factor 8."""
    return _checkpoint(tmp_path_factory, "sd1")


@pytest.fixture(scope="session")
def sd2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD2 base: epsilon, "!" padding, 23 text layers, VAE factor 4."""
    return _checkpoint(tmp_path_factory, "sd2")


@pytest.fixture(scope="session")
def sd2_v_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD2: as the base, but v-prediction."""
    return _checkpoint(tmp_path_factory, "sd2_v")


@pytest.fixture(scope="session")
def sdxl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL: two text encoders, pooled text, time ids, VAE factor 2."""
    return _checkpoint(tmp_path_factory, "sdxl")


@pytest.fixture(scope="session")
def sd1_bundle(sd1_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sd1_checkpoint)


@pytest.fixture(scope="session")
def sd1_proved_bundle(sd1_checkpoint: Path, exported_once: Export) -> Path:
    """The same with reference outputs, as a build makes it where nothing else is said."""
    return exported_once(sd1_checkpoint, verify=True)


@pytest.fixture(scope="session")
def sd1_controlnets(tmp_path_factory: pytest.TempPathFactory, sd1_checkpoint: Path) -> Path:
    """A folder with two ControlNets for SD1, `canny` and `pose`."""

    def write(folder: Path) -> None:
        for seed, net in enumerate(("canny", "pose"), start=11):
            tiny.write_controlnet(folder / net, sd1_checkpoint, seed=seed)

    return once(tmp_path_factory, "checkpoints/tiny-sd1-controlnets", write)


@pytest.fixture(scope="session")
def sd1_control_bundle(
    tmp_path_factory: pytest.TempPathFactory, trace_cache: Path, sd1_checkpoint: Path, sd1_controlnets: Path
) -> Path:
    """SD1 with the ControlNets `canny` and `pose`."""
    nets = {f"controlnet_{net}": str(sd1_controlnets / net) for net in ("canny", "pose")}
    return once(tmp_path_factory, "bundles-control/tiny-sd1", lambda folder: _export(sd1_checkpoint, folder, controlnets=nets))


@pytest.fixture(scope="session")
def sd1_ip_adapters(tmp_path_factory: pytest.TempPathFactory, sd1_checkpoint: Path) -> Path:
    """A folder with IP-Adapters for SD1, `plain`, `plus` and `full`, each with its image encoder."""

    def write(folder: Path) -> None:
        for kind in ("plain", "plus", "full"):
            tiny_image_prompt.write_ip_adapter(folder / kind, sd1_checkpoint, kind)  # type: ignore[arg-type]

    return once(tmp_path_factory, "checkpoints/tiny-sd1-ip-adapters", write)


@pytest.fixture(scope="session")
def sd1_image_prompt_bundle(
    sd1_checkpoint: Path, sd1_ip_adapters: Path, tmp_path_factory: pytest.TempPathFactory, trace_cache: Path
) -> Path:
    """SD1 with the IP-Adapter `plain`."""
    adapter = str(sd1_ip_adapters / "plain" / "adapter.safetensors")
    return once(tmp_path_factory, "bundles-ip/tiny-sd1", lambda folder: _export(sd1_checkpoint, folder, ip_adapter=adapter))


@pytest.fixture(scope="session")
def sd2_bundle(sd2_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sd2_checkpoint)


@pytest.fixture(scope="session")
def sd2_v_bundle(sd2_v_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sd2_v_checkpoint)


@pytest.fixture(scope="session")
def sdxl_bundle(sdxl_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sdxl_checkpoint)


@pytest.fixture(scope="session")
def sd1_fp16_bundle(sd1_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sd1_checkpoint, precision="fp16")


@pytest.fixture(scope="session")
def sd1_bf16_bundle(sd1_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sd1_checkpoint, precision="bf16")


@pytest.fixture(scope="session")
def sd2_fp16_bundle(sd2_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sd2_checkpoint, precision="fp16")


@pytest.fixture(scope="session")
def sdxl_fp16_bundle(sdxl_checkpoint: Path, exported_once: Export) -> Path:
    return exported_once(sdxl_checkpoint, precision="fp16")


@pytest.fixture(scope="session")
def capi_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C library, installed with its headers: what a program outside the tree is built against."""
    return once(tmp_path_factory, "capi-prefix", cplusplus.install)
