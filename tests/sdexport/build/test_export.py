"""The conductor: what a bundle holds, when a build does nothing, and that a build that fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from generators import whole
from once import once
from places import SHAPES
from single_files import single_file_tensors, write_single_file, write_standard

import sdexport.build.export
from sdexport.build.events import EngineProgress, ExportOptions, ExportProgress, ExportResult
from sdexport.build.export import _lies_in, build
from sdexport.errors import CheckpointError, ExportError, PrecisionError
from sdexport.trace.component import ComponentJob
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest
from sdruntime.errors import BundleError, OutOfSpace, SdruntimeError, SettingError, UnknownName

KINDS = ("sd1", "sd2_v", "sdxl")


ASKED = BuildRequest(backend="onnxruntime", size="64x64", batch="2")


def built(checkpoint: Path, out: Path, **options: Any) -> ExportResult:
    *_, last = whole(build(str(checkpoint), out, ExportOptions(**({"verify": False} | options))))
    assert isinstance(last, ExportResult)
    return last


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def copy(sd1_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be changed, alone in its folder."""
    return Path(shutil.copytree(sd1_bundle, tmp_path / "place" / "bundle"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_is_whole_and_says_what_it_is(kind: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(f"{kind}_bundle"))
    assert bundle.changed_files() == []
    manifest = bundle.manifest
    encoders = {"text_encoder", "text_encoder_2"} if kind == "sdxl" else {"text_encoder"}
    assert set(manifest.components) == {"unet", "vae_decoder", "vae_encoder", "step"} | encoders
    tokenizers = ["tokenizer", "tokenizer_2"] if kind == "sdxl" else ["tokenizer"]
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    expected = {f"{tokenizer}/{name}" for tokenizer in tokenizers for name in names}
    expected |= {"model_index.json", "scheduler/scheduler_config.json"}
    expected |= {f"{name}/{file}" for name in manifest.components for file in ("model.onnx", "model.onnx.data", "config.json")}
    expected.remove("step/model.onnx.data")  # it has no weights
    assert set(manifest.files) == expected
    assert manifest.provenance["source"] == f"tiny-{kind}", "a folder's name, not its path"
    assert manifest.provenance["versions"]["torch"]


def test_nothing_of_this_machine_is_in_a_bundle(sd1_bundle: Path, sd1_checkpoint: Path) -> None:
    for name, data in contents(sd1_bundle).items():
        assert str(sd1_checkpoint.parent).encode() not in data, name
        assert b"site-packages" not in data, name


def test_the_index_is_of_the_class_that_diffusers_opens(sd1_bundle: Path) -> None:
    index = json.loads((sd1_bundle / "model_index.json").read_text())
    assert index["_class_name"] == "OnnxStableDiffusionPipeline"
    assert index["vae_encoder"] == index["unet"] == ["diffusers", "OnnxRuntimeModel"]
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]


def test_a_second_build_does_nothing(sd1_checkpoint: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    events = whole(build(str(sd1_checkpoint), copy, ExportOptions(verify=False)))
    assert events == [ExportResult(folder=copy, up_to_date=True, written=0, peak=events[-1].peak)]
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_builds_of_the_same_inputs_are_equal(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    """The traces are kept; all but the manifest's date follows from the inputs."""
    events = whole(build(str(sd1_checkpoint), tmp_path / "bundle", ExportOptions(verify=False)))
    assert {event.stage.name for event in events if isinstance(event, ExportProgress)} == {
        "check",
        "kept trace",
        "precision",
        "weights",
        "done",
    }
    one, other = contents(sd1_bundle), contents(tmp_path / "bundle")
    one.pop("manifest.json"), other.pop("manifest.json")
    assert one == other


def test_a_changed_byte_makes_the_build_run_again(sd1_checkpoint: Path, sd1_bundle: Path, copy: Path) -> None:
    data = copy / "vae_decoder" / "model.onnx.data"
    damaged = bytearray(data.read_bytes())
    damaged[100] ^= 1
    data.write_bytes(damaged)
    assert not built(sd1_checkpoint, copy).up_to_date
    assert Bundle.open(copy).changed_files() == []


def test_changed_weights_make_a_new_bundle_from_the_kept_traces(sd1_checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    finetuned = Path(shutil.copytree(sd1_checkpoint, tmp_path / "finetuned"))
    path = finetuned / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: 2 * weight for name, weight in weights.items()}, path)
    before = contents(copy)
    events = whole(build(str(finetuned), copy, ExportOptions(verify=False)))
    assert not any(isinstance(event, ExportProgress) and event.stage.name == "trace" for event in events)
    after = contents(copy)
    assert {name for name in before if before[name] != after[name]} >= {"unet/model.onnx.data", "manifest.json"}
    assert before["vae_decoder/model.onnx.data"] == after["vae_decoder/model.onnx.data"]


def test_the_date_is_the_one_that_is_set(sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    monkeypatch.setattr(sdexport.build.export, "run_job", fake_run)
    built(sd1_checkpoint, tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.provenance["created"] == "1970-01-01T00:00:00Z"


def fake_run(job: ComponentJob) -> Generator[Stage, None, int]:
    """A component in no time."""
    for name in ("model.onnx", "model.onnx.data"):
        (Path(job.out) / name).write_bytes(b"x")
    yield Stage(name="done")
    return 1


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ExportError("unet: no"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_build_that_fails_leaves_the_former_bundle(
    sd1_checkpoint: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def failing(job: ComponentJob) -> Generator[Stage, None, int]:
        peak = yield from fake_run(job)
        if job.component == "vae_decoder":
            raise error
        return peak

    monkeypatch.setattr(sdexport.build.export, "run_job", failing)
    before = contents(copy)
    with pytest.raises(OutOfSpace if isinstance(error, OSError) else type(error)):
        built(sd1_checkpoint, copy, precision="fp16")
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"], "no half bundle"


def test_a_folder_that_is_no_bundle_is_not_replaced(sd1_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle: choose another place"):
        built(sd1_checkpoint, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_second_name_of_the_checkpoint_is_known(tmp_path: Path) -> None:
    """A bind mount gives a folder one that does not resolve to the first; here a link, which is not resolved."""
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "unet").mkdir(parents=True)
    (tmp_path / "mounted").symlink_to(checkpoint)
    assert _lies_in(tmp_path / "mounted" / "bundle", checkpoint)
    assert _lies_in(checkpoint / "unet", tmp_path / "mounted")
    assert not _lies_in(tmp_path / "bundle", checkpoint)


def test_an_export_never_replaces_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(SHAPES / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "way").symlink_to(checkpoint)
    before = contents(tmp_path)
    for out in (checkpoint / "bundle", checkpoint / "unet" / "deep" / "bundle", tmp_path / "way" / "bundle"):
        with pytest.raises(BundleError, match=r"this place and the checkpoint .* overlap: choose another place"):
            built(checkpoint, out)
    (checkpoint / "manifest.json").write_text('{"name": "some web app"}')
    for out in (checkpoint, tmp_path):
        with pytest.raises(BundleError, match="not a bundle: choose another place"):
            built(checkpoint, out)
    with pytest.raises(BundleError, match="a symbolic link is never replaced"):
        built(checkpoint, tmp_path / "way")
    (checkpoint / "manifest.json").unlink()
    assert contents(tmp_path) == before


def test_weights_that_fp16_cannot_hold_stop_a_build_without_an_audit(
    sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    large = Path(shutil.copytree(sd1_checkpoint, tmp_path / "large"))
    path = large / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["text_model.final_layer_norm.weight"][3] = 1e6
    save_file(weights, path)
    with pytest.raises(PrecisionError, match=r"final_layer_norm\.weight: 1 of 32 numbers are beyond 65504"):
        built(large, tmp_path / "bundle", precision="fp16", audit=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


def test_weights_that_are_missing_are_named(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    half = Path(shutil.copytree(sd1_checkpoint, tmp_path / "half"))
    path = half / "text_encoder" / "model.safetensors"
    save_file({name: weight for name, weight in load_file(path).items() if "layers.1.self_attn.q" not in name}, path)
    with pytest.raises(ExportError, match=r"encoder\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        built(half, tmp_path / "bundle")


def test_pickled_weights_with_the_flag_give_the_same_bundle(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    pickled = Path(shutil.copytree(sd1_checkpoint, tmp_path / "pickled"))
    path = pickled / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), pickled / "text_encoder" / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        built(pickled, tmp_path / "bundle")
    built(pickled, tmp_path / "bundle", allow_pickle=True)
    data = "text_encoder/model.onnx.data"
    assert contents(tmp_path / "bundle")[data] == contents(sd1_bundle)[data]
    assert set(contents(tmp_path / "bundle")) == set(contents(sd1_bundle))


@pytest.mark.full
def test_a_folder_a_single_file_and_a_pickle_give_the_same_components(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, trace_cache: Path
) -> None:
    import torch

    folder = once(tmp_path_factory, "checkpoints/standard-sd1", lambda folder: write_standard(folder, "sd1"))
    file = write_single_file(folder, tmp_path / "model.safetensors")
    torch.save({"state_dict": single_file_tensors(folder), "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        built(tmp_path / "model.ckpt", tmp_path / "pickled")
    assert not (tmp_path / "pickled").exists()
    hashes = []
    for name, path in {"folder": folder, "file": file, "pickled": tmp_path / "model.ckpt"}.items():
        built(path, tmp_path / name, allow_pickle=True)
        files = Bundle.open(tmp_path / name).manifest.files
        hashes.append({file: digest for file, digest in files.items() if file.endswith((".onnx", ".data"))})
    assert len(hashes[0]) == 9
    assert hashes[0] == hashes[1] == hashes[2]


def test_engines_are_built_into_the_bundle_and_added_to_one_that_is_there(sd1_checkpoint: Path, copy: Path) -> None:
    events = whole(build(str(sd1_checkpoint), copy, ExportOptions(engines=(ASKED,), verify=False)))
    assert any(isinstance(event, EngineProgress) for event in events)
    assert not any(isinstance(event, ExportProgress) for event in events), "the ONNX is up to date"
    engines = Bundle.open(copy).manifest.engines
    assert {engine.component for engine in engines} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert built(sd1_checkpoint, copy, engines=(ASKED,)).up_to_date


def test_an_interrupted_build_keeps_the_engines_that_were_done(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    events = build(str(sd1_checkpoint), tmp_path / "bundle", ExportOptions(engines=(ASKED,), verify=False))
    for event in events:
        if isinstance(event, EngineProgress) and (event.event.state, event.event.component) == ("begin", "vae_encoder"):
            break
    events.close()  # type: ignore[attr-defined]
    assert [engine.component for engine in Bundle.open(tmp_path / "bundle").manifest.engines] == ["text_encoder"]
    assert not list((tmp_path / "bundle").glob(".*"))
    again = whole(build(str(sd1_checkpoint), tmp_path / "bundle", ExportOptions(engines=(ASKED,), verify=False)))
    states = [(each.event.component, each.event.state) for each in again if isinstance(each, EngineProgress)]
    assert states[0] == ("text_encoder", "present")
    assert [component for component, state in states if state == "done"] == ["vae_encoder", "vae_decoder", "unet"]
    assert not any(isinstance(event, ExportProgress) for event in again), "nothing is exported again"


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (BuildRequest(backend="onnxruntim"), UnknownName),
        (BuildRequest(backend="onnxruntime", size="63x64"), SettingError),
        (BuildRequest(backend="onnxruntime", batch="4:1"), SettingError),
        (BuildRequest(backend="onnxruntime", components=("uent",)), UnknownName),
    ],
)
def test_wrong_engine_options_are_told_before_the_long_work(
    sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: BuildRequest, kind: type[SdruntimeError]
) -> None:
    monkeypatch.setattr(sdexport.build.export, "run_job", None)
    with pytest.raises(kind):
        built(sd1_checkpoint, tmp_path / "bundle", engines=(asked,))
    assert list(tmp_path.iterdir()) == []
