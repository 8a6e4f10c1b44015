"""A build that proves its numbers, and a bundle beside its checkpoint in PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from generators import job_here, whole
from sdexport_cli import run

import sdexport.build.export
import sdexport.checkpoint.checkpoint
import sdexport.trace.component
import sdexport.verification.bisect
from sdexport.build.events import ExportOptions, ExportProgress, ExportResult
from sdexport.build.export import build
from sdexport.trace.component import ComponentJob
from sdexport.verification.golden import GoldenJob, make_golden
from sdexport.verification.verify import Proof
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import save_manifest
from sdruntime.bundle.model import ModelSpec
from sdruntime.errors import NotFinite, VerificationFailed
from sdruntime.verification.golden import DOCUMENT, NUMBERS, read_golden
from sdruntime.verification.verify import report_of, verify

CONV = "mid_block.resnets.0.conv1.weight"


@pytest.fixture(autouse=True)
def here(sd1_proved_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of this file without processes of their own, which take seconds to load torch; the fixture's had them."""

    def verified(folder: Path, *, what: str) -> Generator[Stage, None, Proof]:
        bundle = Bundle.open(folder)
        report = report_of(bundle, verify(bundle))
        if not report.passed:
            raise VerificationFailed(what, report.faults())
        yield Stage(name="verify", done=1, total=1)
        return Proof(checks=report.ran, peak=0)

    def golden_here(job: GoldenJob) -> Generator[str, None, int]:
        called: list[str] = []
        make_golden(job, called.append)
        yield from called
        return 0

    monkeypatch.setattr(sdexport.build.export, "run_job", job_here)
    monkeypatch.setattr(sdexport.build.export, "run_golden", golden_here)
    monkeypatch.setattr(sdexport.build.export, "verified_apart", verified)
    monkeypatch.setattr(sdexport.verification.bisect, "run_job", job_here)


@pytest.fixture
def copy(sd1_proved_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_proved_bundle, tmp_path / "place" / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def scale(folder: Path, weight: str, by: float) -> None:
    """Multiply a weight of an exported component."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    place = ExternalDataInfo(next(each for each in model.graph.initializer if each.name == weight))
    data = bytearray((folder / "model.onnx.data").read_bytes())
    numbers = np.frombuffer(data, np.float32, count=place.length // 4, offset=place.offset) * np.float32(by)
    data[place.offset : place.offset + place.length] = numbers.tobytes()
    (folder / "model.onnx.data").write_bytes(data)


def scaled_whole(bundle: Path, component: str, weight: str, by: float) -> None:
    scale(bundle / component, weight, by)
    path, manifest = f"{component}/model.onnx.data", Bundle.open(bundle).manifest
    files = dict(manifest.files) | {path: file_spec(bundle / path)}
    save_manifest(bundle, dataclasses.replace(manifest, files=files))


def test_a_build_adds_golden_numbers_and_nothing_else(sd1_bundle: Path, sd1_proved_bundle: Path) -> None:
    plain, proved = Bundle.open(sd1_bundle), Bundle.open(sd1_proved_bundle)
    assert set(proved.manifest.files) - set(plain.manifest.files) == {DOCUMENT, NUMBERS}
    assert proved.changed_files() == []
    preview = proved.manifest.model.preview
    assert preview is not None
    assert dataclasses.replace(proved.manifest.model, preview=None) == plain.manifest.model
    assert 5 < preview.psnr < 99
    assert sum(proved.manifest.files[path].size for path in (DOCUMENT, NUMBERS)) < 200_000
    golden, numbers = read_golden(proved)
    assert set(golden.reference) == {"torch", "diffusers", "transformers"}
    assert {case.component for case in golden.cases} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(numbers[f"picture.{index}"].std() >= 10 for index in range(2)), "a picture that is not flat"


def test_a_bundle_without_golden_numbers_is_made_again_and_one_with_them_stays(
    sd1_checkpoint: Path, sd1_bundle: Path, sd1_proved_bundle: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = whole(build(str(sd1_checkpoint), copy, ExportOptions()))
    assert isinstance(last, ExportResult)
    assert last.up_to_date
    *_, last = whole(build(str(sd1_checkpoint), copy, ExportOptions(verify=False)))
    assert isinstance(last, ExportResult)
    assert last.up_to_date, "golden numbers too many are no reason to build"
    without = Path(shutil.copytree(sd1_bundle, copy.with_name("without")))
    events = whole(build(str(sd1_checkpoint), without, ExportOptions()))
    stages = [event.stage.name for event in events if isinstance(event, ExportProgress) and event.component == "golden"]
    parts = [f"reference of {part}" for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder")]
    assert list(dict.fromkeys(stages)) == ["reference", *parts, "verify"]
    assert stages.count("reference of unet") > 6, "each of its calls is an event"
    assert isinstance(events[-1], ExportResult)
    assert events[-1].checks == 12
    with np.load(without / NUMBERS) as one, np.load(sd1_proved_bundle / NUMBERS) as other:
        assert one.files == other.files
        for name in one.files:  # PyTorch's own sums differ in their last digits from run to run
            room = 1 if one[name].dtype == np.uint8 else 1e-5 * np.abs(other[name]).max()
            np.testing.assert_allclose(one[name].astype(float), other[name].astype(float), rtol=0, atol=room)


def test_numbers_that_do_not_hold_fail_the_build_and_keep_the_former_bundle(
    sd1_checkpoint: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(job: ComponentJob) -> Generator[Stage, None, int]:
        yield from job_here(job)
        if job.component == "unet":
            scale(Path(job.out), CONV, 1.01)
        return 0

    monkeypatch.setattr(sdexport.build.export, "run_job", faulty)
    monkeypatch.setattr(sdexport.build.export, "is_current", lambda *_, **__: False)
    before = contents(copy)
    with pytest.raises(VerificationFailed, match=r"unet its ONNX, ONNX Runtime small out_sample: largest error") as told:
        whole(build(str(sd1_checkpoint), copy, ExportOptions()))
    assert told.value.exit_code == 4
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_a_fault_of_what_is_between_the_networks_fails_the_build(
    sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # every network is right, the latents are not: diffusers has no shift
    monkeypatch.setattr(sdexport.checkpoint.checkpoint, "ModelSpec", functools.partial(ModelSpec, shift_factor=0.5))
    with pytest.raises(VerificationFailed) as told:
        whole(build(str(sd1_checkpoint), tmp_path / "bundle", ExportOptions()))
    assert len(told.value.faults) == 2, "the two images, and no network"


def test_numbers_that_are_not_finite_in_float32_already_are_told(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    large = Path(shutil.copytree(sd1_checkpoint, tmp_path / "large"))
    path = large / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["text_model.final_layer_norm.weight"][3] = 3e38
    save_file(weights, path)
    with pytest.raises(NotFinite, match=r"text_encoder, reference case small, row \d, in PyTorch: .* of last_hidden_state"):
        whole(build(str(large), tmp_path / "bundle", ExportOptions()))


def test_beside_its_checkpoint_a_bundle_passes(copy: Path, sd1_checkpoint: Path, tmp_path: Path) -> None:
    result = run("verify", copy, "--against", sd1_checkpoint, "--json", "--html", tmp_path / "report.html")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["passed"]) == (0, True)
    assert document["reference"].endswith("in PyTorch")
    assert min(check["difference"]["psnr"] for check in document["checks"]) >= 100
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_first_node_that_leaves_the_tolerance_is_named(copy: Path, sd1_checkpoint: Path) -> None:
    import onnx

    scaled_whole(copy, "unet", CONV, 1.01)
    graph = onnx.load(str(copy / "unet" / "model.onnx"), load_external_data=False).graph
    expected = next(node for node in graph.node if CONV in node.input)
    result = run("verify", copy, "--against", sd1_checkpoint, "--bisect")
    assert result.exit_code == 4
    told = " ".join(result.stdout.split())  # whatever the width of the terminal
    assert f"is the first to leave the tolerance: Conv {expected.name} -> {expected.output[0]}: largest error" in told


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{copy}", "--bisect"], 2, "add --against"),
        (["{copy}", "--against", "{other}"], 2, "not the checkpoint of this bundle: its weights are "),
        (["{copy}", "--against", "nowhere"], 2, "no such folder, and not a hub id"),
        (["{plain}"], 5, "no reference outputs: it was built with --no-verify"),
        (["{plain}", "--against", "{checkpoint}"], 5, "no reference outputs"),
    ],
)
def test_bad_input_gets_one_message_and_its_code(
    copy: Path, sd1_bundle: Path, sd1_checkpoint: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    from safetensors.numpy import load_file, save_file

    other = Path(shutil.copytree(sd1_checkpoint, tmp_path / "other"))
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path)
    places = {"copy": copy, "other": other, "plain": sd1_bundle, "checkpoint": sd1_checkpoint}
    result = run("verify", *(argument.format(**places) for argument in arguments))
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    if "{other}" in arguments:
        golden, _ = read_golden(Bundle.open(copy))
        assert golden.checkpoint[:16] in result.stderr


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:the text encoder takes 77 tokens")  # a prompt of the audit
def test_half_precision_passes_its_own_limits(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    *_, last = whole(build(str(sd1_checkpoint), tmp_path / "bundle", ExportOptions(precision="fp16")))
    assert isinstance(last, ExportResult)
    assert last.checks == 12
