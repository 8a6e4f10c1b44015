"""Verification without torch: a bundle that was moved passes, one layer changed by 1 % fails, and what cannot run is reported."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from places import FIXTURE

from sdruntime.__main__ import main
from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.onnx_file.external import external_tensors
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.bundle.manifest import save_manifest
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.engines.choose import Machine
from sdruntime.errors import LibraryMissing
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.verification.golden import Golden, cases_of, digest_of, image_key, reference_images, sample_of, write_golden
from sdruntime.verification.html import page
from sdruntime.verification.metrics import EQUAL, Difference, image_psnr, ssim
from sdruntime.verification.tolerance import TOLERANCES
from sdruntime.verification.verify import onnx_spec, report_of, verify

ort = pytest.importorskip("onnxruntime")
from sdruntime.backends.ort.engine import open_engine  # noqa: E402


@pytest.fixture(scope="module")
def proved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the first revision with reference outputs that its own ONNX gave, held to as tightly as float32."""
    folder = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("proved") / "bundle"))
    bundle = Bundle.open(folder)
    specs = {name: onnx_spec(bundle.manifest, name, ort.__version__) for name in bundle.manifest.components}
    numbers, cases = {}, []
    with Pipeline.over(bundle, lambda name: open_engine(bundle, specs[name], EngineOptions(), Shared())) as pipe:
        drawings = reference_images(bundle.manifest)
        images = pipe([drawing.request(bundle.manifest) for drawing in drawings]).pixels
        for case in cases_of(bundle.manifest, {"text_encoder": 500}):
            outputs = pipe.engine(case.component)(case.feeds(bundle.manifest.components[case.component]))
            numbers |= {case.key(name): sample_of(array, case.seed) for name, array in outputs.items()}
            digests = {name: digest_of(array) for name, array in outputs.items()}
            cases.append(dataclasses.replace(case, outputs=digests))
    numbers |= {image_key(index): image for index, image in enumerate(images)}
    tolerances = dict(TOLERANCES) | {"fp16": dataclasses.replace(TOLERANCES["fp32"], relative=1e-3, psnr=70.0, digest=1e-3)}
    golden = Golden(
        checkpoint="0" * 64,
        reference={"onnxruntime": ort.__version__},
        cases=tuple(cases),
        drawings=drawings,
        tolerances=tolerances,
    )
    write_golden(bundle, golden, numbers)
    return folder


@pytest.fixture
def copy(proved: Path, tmp_path: Path) -> Path:
    """One that may be changed, moved elsewhere."""
    return Path(shutil.copytree(proved, tmp_path / "moved"))


def scaled(folder: Path, component: str, weight: str, by: float) -> None:
    """Multiply a weight of a component's ONNX, and write the hashes again."""
    bundle = Bundle.open(folder)
    tensors = external_tensors(memoryview((folder / component / "model.onnx").read_bytes()), ["model.onnx.data"])
    tensor = next(each for each in tensors if each.name == weight)
    path = f"{component}/model.onnx.data"
    data = bytearray((folder / path).read_bytes())
    numbers = np.frombuffer(data, tensor.dtype, count=tensor.length // tensor.dtype.itemsize, offset=tensor.offset)
    data[tensor.offset : tensor.offset + tensor.length] = (numbers * by).astype(tensor.dtype).tobytes()
    (folder / path).write_bytes(data)
    files = dict(bundle.manifest.files) | {path: file_spec(folder / path)}
    save_manifest(folder, dataclasses.replace(bundle.manifest, files=files))


def test_a_moved_bundle_passes_and_says_its_numbers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert {check["component"] for check in document["checks"]} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert {check["status"] for check in document["checks"]} == {"pass"}
    assert all(check["difference"]["cosine"] > 0.999999 for check in document["checks"])
    assert [picture["status"] for picture in document["pictures"]] == ["pass", "pass"]
    assert all(picture["ssim"] > 0.999 for picture in document["pictures"])


def test_a_layer_changed_by_one_percent_fails_with_code_4(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled(copy, "unet", "mid_block.resnets.0.conv1.weight", 1.01)
    assert Bundle.open(copy).changed_files() == [], "the hashes tell nothing"
    assert main(["verify", str(copy)]) == 4
    printed = capsys.readouterr()
    assert re.search(r"out_sample .* FAIL\n    \S.*(of the largest|dB, under)", printed.out), "the reason stands under its row"
    assert max(map(len, printed.out.splitlines())) <= 80
    failed = [line for line in printed.err.splitlines() if line.startswith("  - ")]
    assert failed
    assert all(line.startswith("  - unet its ONNX, ONNX Runtime") for line in failed)
    assert "of the largest value, over" in printed.err or "dB, under" in printed.err


def test_engines_are_run_and_those_that_cannot_be_are_told(copy: Path) -> None:
    for size in ("64x64", "96x96"):
        for _ in build_engines(copy, BuildRequest(backend="onnxruntime", size=size, batch="1", guidance="on")):
            pass
    for _ in build_engines(copy, BuildRequest(backend="fake")):
        pass
    bundle = Bundle.open(copy)
    stale = dataclasses.replace(bundle.manifest.engines[0], version="0.1")
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, engines=(*bundle.manifest.engines, stale)))
    report = report_of(bundle, verify(bundle))
    assert report.passed, report.faults()
    reasons = {(each.component, each.status): each.reason for each in report.checks if each.reason}
    assert "built with onnxruntime 0.1, installed is" in reasons["text_encoder", "skip"]
    assert "built for 96x96, batch 2, sequence 77 to 2464; the reference outputs are for 48x32" in reasons["unet", "skip"]
    assert not any("fake" in each.engine for each in report.checks)
    ran = {each.engine for each in report.checks if each.status == "pass"}
    assert {"text_encoder", "unet", "vae_decoder", "vae_encoder"} <= {name.split("-")[0] for name in ran}
    assert [(each.engines, each.status) for each in report.pictures[2:]] == [("onnxruntime", "pass")] * 2


def test_an_engine_that_fails_is_not_added(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ONNX is not that of the reference outputs any more; what was built of it before stays."""
    asked = ["build", str(copy), "--backend", "onnxruntime", "--component"]
    assert main([*asked, "text_encoder"]) == 0
    former = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    scaled(copy, "unet", "conv_in.weight", 1.05)
    changed = {"unet/model.onnx.data", "manifest.json"}
    now = (copy / "manifest.json").read_bytes()
    capsys.readouterr()
    assert main([*asked, "unet"]) == 4
    assert "engine unet-onnxruntime" in (said := capsys.readouterr().err)
    assert "is not added: " in said
    assert "of the largest value, over" in said
    left = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert left.keys() == former.keys()
    assert {path.relative_to(copy).as_posix() for path in left if left[path] != former[path]} == changed
    assert (copy / "manifest.json").read_bytes() == now
    assert main([*asked, "unet", "--no-verify"]) == 0
    assert {engine.component for engine in Bundle.open(copy).manifest.engines} == {"text_encoder", "unet"}


def test_an_engine_that_cannot_be_run_here_is_added_and_says_so(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdruntime.verification.verify.misfit", lambda engine, machine: "of another machine")
    assert main(["build", str(copy), "--backend", "onnxruntime", "--component", "unet"]) == 0
    assert "was not verified: of another machine" in capsys.readouterr().err
    assert len(Bundle.open(copy).manifest.engines) == 1


def test_an_engine_without_golden_numbers_to_be_held_to_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "bundle"))
    assert main(["build", str(folder), "--backend", "onnxruntime", "--component", "unet"]) == 0
    assert "verified" not in capsys.readouterr().err


def test_nan_in_an_engine_is_a_failed_check(copy: Path) -> None:
    scaled(copy, "vae_decoder", "decoder.conv_out.weight", float("nan"))
    report = report_of(Bundle.open(copy), verify(copy))
    assert {each.component for each in report.checks if each.status == "fail"} == {"vae_decoder"}
    assert "NaN or infinite" in report.faults()[0]
    assert "fp16 overflowed" in report.faults()[-1]


def test_without_a_library_that_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = Machine(libraries={"onnxruntime": Library(missing='pip install "sdruntime[onnxruntime]"')})
    monkeypatch.setattr(Machine, "here", lambda *_, **__: nothing)
    with pytest.raises(LibraryMissing, match="nothing on this machine can run this bundle: pip install"):
        list(verify(copy))
    assert main(["verify", str(copy)]) == 3


def test_a_bundle_without_golden_numbers_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(FIXTURE)]) == 5
    assert "no reference outputs" in capsys.readouterr().err


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.rows = 0
        self.outside: list[str] = []
        self.words: list[str] = []

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.rows += tag == "tr"
        if tag == "img":
            self.images.append(str(named["src"]))
        self.outside += [str(value) for name, value in attrs if name in ("href", "src") and not str(value).startswith("data:")]


def test_the_page_holds_everything_itself(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--html", str(tmp_path / "report.html")]) == 0
    seen = Seen()
    seen.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert seen.outside == []
    assert len(seen.images) == 6, "reference, drawn and difference of two pictures"
    assert all(each.startswith("data:image/png;base64,iVBORw0KGgo") for each in seen.images)
    assert seen.rows == (1 + 1) + (1 + 4 + 9) + (1 + 1 + 2), "limits, outputs by engine, images"
    words = " ".join(seen.words)
    assert "70 0.999999 0.001 55 0.99" in words, "the limits of fp16 in this bundle"
    assert re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ on \S.*onnxruntime \d", words), "when and on what it was measured"
    capsys.readouterr()
    assert main(["verify", str(copy), "--html", str(tmp_path / "nowhere" / "report.html")]) == 2


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(copy: Path, width: int) -> None:
    """A reason and a prompt of any length are wrapped or shortened; so is a row's engine."""
    report = report_of(Bundle.open(copy), verify(copy))
    long = dataclasses.replace(report.checks[0], status="fail", reason="largest error " * 20, engine="unet-" + "x" * 40)
    image = dataclasses.replace(report.pictures[0], prompt="a very long prompt " * 20)
    lines = list(dataclasses.replace(report, checks=(long, *report.checks), pictures=(image,)).lines(width))
    assert max(map(len, lines)) <= width
    assert any("FAIL" in line for line in lines)


def test_names_in_the_page_are_escaped(copy: Path) -> None:
    report = report_of(Bundle.open(copy), [])
    assert "<script>" not in page(dataclasses.replace(report, model="<script>alert(1)</script>"))


# -- the numbers themselves


def windows(picture: np.ndarray) -> Iterator[np.ndarray]:
    for top in range(picture.shape[0] - 7):
        for left in range(picture.shape[1] - 7):
            yield picture[top : top + 8, left : left + 8].astype(float)


def test_ssim_is_the_papers_written_out() -> None:
    random = np.random.default_rng(3)
    x = random.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    y = np.clip(x + random.integers(-40, 40, x.shape), 0, 255).astype(np.uint8)
    found = []
    for channel in range(3):
        for a, b in zip(windows(x[..., channel]), windows(y[..., channel]), strict=True):
            covariance = ((a - a.mean()) * (b - b.mean())).mean()
            upper = (2 * a.mean() * b.mean() + 2.55**2) * (2 * covariance + 7.65**2)
            found.append(upper / ((a.mean() ** 2 + b.mean() ** 2 + 2.55**2) * (a.var() + b.var() + 7.65**2)))
    assert ssim(x, y) == pytest.approx(np.mean(found), abs=1e-9)
    assert ssim(x, x) == pytest.approx(1.0, abs=1e-12)
    assert ssim(x, 255 - x) < 0


def test_psnr_and_difference_by_their_definitions() -> None:
    black, one = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)
    assert image_psnr(one, black) == pytest.approx(20 * np.log10(255))
    assert image_psnr(black, black) == EQUAL
    reference = np.array([3.0, -4.0], np.float32)
    found = Difference.of(np.array([3.0, -3.0], np.float32), reference, 4.0)
    assert (found.max_abs, found.relative) == (1.0, 0.25)
    assert found.cosine == pytest.approx((9 + 12) / (5 * 18**0.5))
    assert found.psnr == pytest.approx(10 * np.log10(16 / 0.5))
    assert Difference.of(np.zeros(3), np.zeros(3), 0.0) == Difference(max_abs=0, relative=0, cosine=1.0, psnr=EQUAL)
