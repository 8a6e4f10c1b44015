"""What only an NVIDIA GPU can show: the CUDA execution provider draws the CPU's picture, on the device that was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from integration.reference import psnr

from sdruntime.build import Asked, build_engines
from sdruntime.cuda import devices
from sdruntime.engine import EngineOptions
from sdruntime.errors import SdruntimeError
from sdruntime.pipeline import Pipeline

pytestmark = pytest.mark.gpu
PROMPT = "a small red circle on the left on a blue background"


@pytest.fixture(scope="module")
def on_cuda(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(shapes_bundle, tmp_path_factory.mktemp("cuda") / "bundle"))
    for _ in build_engines(folder, Asked(backend="onnxruntime", target="cuda")):
        pass
    return folder


def test_cuda_is_chosen_and_draws_the_cpus_picture(shapes_bundle: Path, on_cuda: Path) -> None:
    pictures = []
    for bundle, target in ((shapes_bundle, "cpu"), (on_cuda, "cuda")):
        with Pipeline.open(bundle) as pipe:
            assert pipe.engine("unet").spec.target == target
            pictures.append(pipe(PROMPT, seed=7, steps=20, guidance=2.0).images[0])
    assert pictures[0].std() >= 10
    assert psnr(*pictures) >= 40


def test_a_device_that_is_not_there_is_refused(on_cuda: Path) -> None:
    with pytest.raises(SdruntimeError), Pipeline.open(on_cuda, options=EngineOptions(device=len(devices()))):
        pass
