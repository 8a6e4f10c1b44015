"""Bundles in half precision: audited, reported, equal from build to build, and refused where float32 itself is not finite."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from generators import whole
from places import SHAPES
from sdexport_cli import run

from sdexport.build.events import ExportOptions, ExportProgress, ExportResult
from sdexport.build.export import build
from sdexport.errors import AuditError, EnvironmentFault, ExportError
from sdexport.precision.activations import Likeness
from sdexport.precision.audit import limit
from sdexport.precision.probe import PARTS, PROMPTS, STEPS, probe
from sdexport.trace.component import ComponentJob
from sdexport.trace.component import run as run_job
from sdruntime.bundle.audit import Audit
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import load_manifest, save_manifest


def audits(folder: Path) -> dict[str, Audit]:
    components = load_manifest(folder).components
    assert components["step"].audit is None
    return {name: spec.audit for name, spec in components.items() if spec.audit is not None}


def changed(checkpoint: Path, folder: Path, part: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint with other weights in one of its parts."""
    from safetensors.numpy import load_file, save_file

    copy = Path(shutil.copytree(checkpoint, folder))
    path = next((copy / part).glob("*.safetensors"))
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return copy


@pytest.mark.parametrize("name", ["sd1_fp16", "sd1_bf16", "sd2_fp16", "sdxl_fp16"])
def test_every_component_is_within_the_limits(request: pytest.FixtureRequest, name: str) -> None:
    found = audits(request.getfixturevalue(f"{name}_bundle"))
    precision = name.partition("_")[2]
    encoders = {"text_encoder", "text_encoder_2"} if name.startswith("sdxl") else {"text_encoder"}
    assert set(found) == {"unet", "vae_decoder", "vae_encoder"} | encoders
    for audit in found.values():
        assert Likeness(cosine=audit.cosine, psnr=audit.psnr).within(limit(precision))  # type: ignore[index]
        assert audit.kept == (), "these tiny networks lose nothing that matters"
        assert not audit.whole
        assert audit.nodes > 30
        assert 1 < audit.largest < 65504 / 2
    assert found["unet"].feeds >= len(PROMPTS) * STEPS
    assert found["vae_decoder"].feeds == len(PROMPTS) + 1


def test_the_shapes_checkpoint_in_fp16(tmp_path: Path, trace_cache: Path) -> None:
    for _ in build(str(SHAPES / "checkpoint"), tmp_path / "shapes", ExportOptions(precision="fp16")):
        pass
    for audit in audits(tmp_path / "shapes").values():
        assert Likeness(cosine=audit.cosine, psnr=audit.psnr).within(limit("fp16"))
        assert not audit.whole


@pytest.mark.full
def test_two_builds_give_equal_bytes(sd1_checkpoint: Path, sd1_fp16_bundle: Path, tmp_path: Path) -> None:
    events = whole(build(str(sd1_checkpoint), tmp_path / "again", ExportOptions(precision="fp16", verify=False)))
    stages = [event.stage.name for event in events if isinstance(event, ExportProgress)]
    assert "probe" in stages
    assert stages.count("audit") == 4
    one, other = (load_manifest(folder) for folder in (sd1_fp16_bundle, tmp_path / "again"))
    assert dataclasses.replace(one, provenance={}) == dataclasses.replace(other, provenance={})
    assert not list((tmp_path / "again").rglob("*.npz")), "nothing of the audit's work is left"
    again = whole(build(str(sd1_checkpoint), tmp_path / "again", ExportOptions(precision="fp16", verify=False)))
    assert isinstance(again[-1], ExportResult)
    assert again[-1].up_to_date


@pytest.mark.full
def test_a_checkpoint_of_fp16_weights_alone_is_audited_by_these(sd1_checkpoint: Path, trace_cache: Path, tmp_path: Path) -> None:
    variant = Path(shutil.copytree(sd1_checkpoint, tmp_path / "variant"))
    for path in list(variant.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert run("build", variant, "-o", tmp_path / "out", "--precision", "fp16").exit_code == 0
    assert len(audits(tmp_path / "out")) == 4


def test_without_an_audit(sd1_checkpoint: Path, trace_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("build", sd1_checkpoint, "-o", out, "--precision", "fp16", "--no-audit").exit_code == 0
    assert audits(out) == {}
    assert "not audited: rebuild it without --no-audit" in run("inspect", out, "--precision").stdout


def test_inspect_tells_the_nodes_the_reasons_and_the_numbers(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    """Weights beyond fp16, in a block of the VAE whose stream overflows as SDXL's does: four nodes stay in float32."""

    def change(weights: dict[str, Any]) -> None:
        weights["decoder.up_blocks.3.resnets.1.conv2.weight"] *= 1e7

    large = changed(sd1_checkpoint, tmp_path / "large", "vae", change)
    result = run("build", large, "-o", tmp_path / "out", "--precision", "fp16")
    assert result.exit_code == 0, result.stderr
    found = audits(tmp_path / "out")
    kept = found["vae_decoder"].kept
    ops = ["Conv", "Add", "Reshape", "InstanceNormalization"]
    assert [(each.op, each.reason) for each in kept] == [*((op, "overflow") for op in ops[:3]), (ops[3], "takes")]
    assert [name for name, audit in found.items() if audit.kept] == ["vae_decoder"]
    model = ir.load(tmp_path / "out" / "vae_decoder" / "model.onnx")
    types = {node.name: node.outputs[0].dtype for node in model.graph}
    assert {types[each.node] for each in kept} == {ir.DataType.FLOAT}
    weights = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert weights["decoder.up_blocks.3.resnets.1.conv2.weight"] == ir.DataType.FLOAT
    assert weights["decoder.up_blocks.3.resnets.1.conv1.weight"] == ir.DataType.FLOAT16

    printed = run("inspect", tmp_path / "out", "--precision").stdout
    assert f"{kept[0].node} (Conv): its output overflows; largest {kept[0].largest}, rounded alone not finite" in printed
    assert "vae_decoder: fp16, of 268 nodes 4 in float32, over 4 sets of activations" in printed
    assert "(InstanceNormalization): takes what overflows" in printed
    document = json.loads(run("inspect", tmp_path / "out", "--precision", "--json").stdout)
    assert document["precision"] == "fp16"
    assert document["audits"]["vae_decoder"]["kept"][0]["reason"] == "overflow"
    assert document["audits"]["unet"]["kept"] == []


@pytest.fixture
def audited_job(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> ComponentJob:
    """The making of a VAE's encoder in fp16, beside its float32 twin that was probed."""
    reference = Path(shutil.copytree(sd1_bundle, tmp_path / "reference"))
    assert [*probe(reference)] == [*range(1, PARTS + 1)]
    (tmp_path / "out").mkdir()
    return ComponentJob(
        checkpoint=str(sd1_checkpoint),
        component="vae_encoder",
        precision="fp16",
        allow_pickle=False,
        out=str(tmp_path / "out"),
        reference=str(reference),
    )


@pytest.mark.filterwarnings("ignore:the text encoder takes")
@pytest.mark.parametrize("times", [0, 2, 100])
def test_a_choice_whose_graph_does_not_hold_is_followed_by_wider_ones(
    audited_job: ComponentJob, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where not even the whole component in float32 holds, that is reported."""
    kept: list[int] = []

    def confirm(path: Path, *_: Any, **__: Any) -> None:
        model = ir.load(path)
        halves = [node for node in model.graph if node.op_type == "Conv" and node.outputs[0].dtype == ir.DataType.FLOAT16]
        kept.append(-len(halves))
        if len(kept) <= times:
            raise AuditError("vae_encoder: too far away")

    monkeypatch.setattr("sdexport.precision.audit.confirm", confirm)
    if times < 100:
        *_, last = run_job(audited_job)
        assert last.name == "done"
        nodes = json.loads((Path(audited_job.out) / "audit.json").read_text())["kept"]
        assert len(nodes) == {0: 0, 2: 2}[times]
        assert {node["reason"] for node in nodes} <= {"loss"}
        assert len(kept) == times + 1
    else:
        with pytest.raises(AuditError, match="too far away"):
            list(run_job(audited_job))
        assert len(kept) == 8, "the fewest, six that are wider, and the whole component"
        assert kept[-1] == 0
    assert kept == sorted(kept)


def test_what_is_not_finite_in_float32_already_is_told(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, Any]) -> None:
        weights["text_model.final_layer_norm.weight"][:] = np.float32(3e38)

    broken = changed(sd1_checkpoint, tmp_path / "broken", "text_encoder", change)
    with pytest.raises(
        ExportError, match=r"^text_encoder: node \S+ \(LayerNormalization\) gives infinity in float32 already, at prompt"
    ):
        whole(build(str(broken), tmp_path / "out", ExportOptions(precision="fp16")))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_machine_without_onnx_runtime_is_told_before_the_work(
    sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"pip install onnxruntime, or build with --no-audit"):
        whole(build(str(sd1_checkpoint), tmp_path / "out", ExportOptions(precision="fp16")))
    assert list(tmp_path.iterdir()) == []


def test_an_audit_is_read_as_it_was_written(sd1_fp16_bundle: Path, sd1_bundle: Path, tmp_path: Path) -> None:
    manifest = load_manifest(sd1_fp16_bundle)
    save_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest
    assert all(spec.audit is None for spec in Bundle.open(sd1_bundle).manifest.components.values())
