"""Another VAE, other documents and another prediction type in place of a checkpoint's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from generators import whole
from once import once
from sdexport_cli import run
from single_files import VAE, single_file_tensors, write_single_file, write_standard

from sdexport.build.events import ExportOptions, ExportResult
from sdexport.build.export import build
from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.hub import needed_files
from sdexport.checkpoint.opening import PATH as SCHEDULER
from sdexport.checkpoint.overrides import Overrides
from sdexport.errors import CheckpointError
from sdexport.families.components import components
from sdexport.trace.cache import trace_key
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest
from sdruntime.errors import BundleError
from sdruntime.pipeline.images.pixels import to_uint8
from sdruntime.pipeline.pipeline import Pipeline


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "checkpoints/standard-sd1", lambda folder: write_standard(folder, "sd1"))


@pytest.fixture
def without_vae(folder: Path, tmp_path: Path) -> Path:
    return write_single_file(folder, tmp_path / "model.safetensors", drop=VAE)


@pytest.fixture
def other(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    """A VAE alone in its folder, with a scaling factor and weights of its own."""
    from safetensors.torch import load_file, save_file

    vae = Path(shutil.copytree(sd1_checkpoint / "vae", tmp_path / "other-vae"))
    [weights] = vae.glob("*.safetensors")
    save_file({name: 1.25 * tensor for name, tensor in load_file(weights).items()}, weights)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    return vae


def read(path: Path, **overrides: Any) -> Checkpoint:
    return read_checkpoint(path, name="x", overrides=Overrides(**{key: str(value) for key, value in overrides.items()}))


def test_the_class_of_another_vae_is_the_one_that_its_config_names(sd1_checkpoint: Path, tmp_path: Path) -> None:
    tiny.write_tiny_vae(tmp_path / "taesd")
    usual, checkpoint = read(sd1_checkpoint), read(sd1_checkpoint, vae=tmp_path / "taesd")
    assert (usual.vae, checkpoint.vae) == ("AutoencoderKL", "AutoencoderTiny")
    assert (checkpoint.model.scaling_factor, checkpoint.model.vae_factor) == (1.0, 8)
    encoder, decoder = (component for component in components(checkpoint) if component.part == "vae")
    assert [tensor.name for tensor in encoder.outputs] == ["latent_mean"]
    assert (encoder.wrapper, decoder.wrapper) == ("TinyVaeEncoder", "TinyVaeDecoder")
    config = tmp_path / "taesd" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_decoder_blocks": [1, 1]}))
    with pytest.raises(
        CheckpointError, match=r"num_encoder_blocks has 4, num_decoder_blocks has 2 entries: they must be equally"
    ):
        read(sd1_checkpoint, vae=tmp_path / "taesd")


def test_a_file_of_a_vae_may_have_the_names_of_diffusers(folder: Path) -> None:
    [file] = (folder / "vae").glob("*.safetensors")
    found, expected = read(folder, vae=file), read(folder)
    assert found.changes[-1] == f"VAE: of {file.name} (--vae)"
    assert found.parts["vae"].config == expected.parts["vae"].config
    assert vae_weights(found).keys() == vae_weights(expected).keys()


def test_a_vae_for_previews_is_a_tiny_one_of_the_same_latents(sd1_checkpoint: Path, tmp_path: Path) -> None:
    tiny.write_tiny_vae(tmp_path / "taesd")
    checkpoint = read(sd1_checkpoint, preview_vae=tmp_path / "taesd")
    assert (checkpoint.vae, checkpoint.model) == ("AutoencoderKL", read(sd1_checkpoint).model)
    [decoder] = (component for component in components(checkpoint) if component.part == "preview_vae")
    assert (decoder.name, decoder.wrapper) == ("preview_decoder", "TinyVaeDecoder")
    assert set(checkpoint.source.inputs(checkpoint.parts)) > {"preview_vae/config.json"}
    config = tmp_path / "taesd" / "config.json"
    whole_config = json.loads(config.read_text())
    for change, message in (
        ({"latent_channels": 16}, "latent_channels 16, but the VAE has 4: use the tiny VAE of this model's family"),
        ({"scaling_factor": 0.5}, "scaling_factor 0.5, but a decoder of previews takes the UNet's latents, so 1"),
        ({"_class_name": "AutoencoderKL"}, r"_class_name 'AutoencoderKL' is not AutoencoderTiny \(--preview-vae\)"),
    ):
        config.write_text(json.dumps(whole_config | change))
        with pytest.raises(CheckpointError, match=message):
            read(sd1_checkpoint, preview_vae=tmp_path / "taesd")
    with pytest.raises(CheckpointError, match="no such folder: give one of an AutoencoderTiny"):
        read(sd1_checkpoint, preview_vae=tmp_path / "nothing")


def test_an_asymmetric_vae_is_refused_for_inpainting(sd1_checkpoint: Path, tmp_path: Path) -> None:
    tiny.write_asymmetric_vae(tmp_path / "vae")
    checkpoint = read(sd1_checkpoint, vae=tmp_path / "vae")
    assert (checkpoint.vae, checkpoint.model.masked_decoder) == ("AsymmetricAutoencoderKL", True)
    assert not read(sd1_checkpoint).model.masked_decoder
    tiny.write_task_checkpoint(tmp_path / "inpainting", "sd1", "inpainting")
    with pytest.raises(
        CheckpointError, match=r"whose decoder takes the image and the mask when inpainting, which is not supported"
    ):
        read(tmp_path / "inpainting", vae=tmp_path / "vae")


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_preview_is_what_diffusers_decodes(sd1_checkpoint: Path, tmp_path: Path, trace_cache: Path, precision: Any) -> None:
    import torch
    from diffusers import AutoencoderTiny

    tiny.write_tiny_vae(tmp_path / "taesd")
    options = ExportOptions(
        preview_vae=str(tmp_path / "taesd"), precision=precision, engines=(BuildRequest(backend="onnxruntime"),)
    )
    assert whole(build(str(sd1_checkpoint), tmp_path / "bundle", options))
    reference = AutoencoderTiny.from_pretrained(tmp_path / "taesd")
    with Pipeline.open(tmp_path / "bundle") as pipe:
        stream = pipe.stream("a cat", seed=1, steps=3, size=(64, 64))
        next(iter(stream))
        [pixels] = pipe.preview(stream.jobs, "tiny")
        with torch.no_grad():
            decoded = reference.decode(torch.from_numpy(stream.jobs[0].run.clean)[None]).sample[0].numpy()
    expected = to_uint8(decoded)
    assert expected.std() > 10
    assert np.abs(pixels.astype(int) - expected).max() <= (1 if precision == "fp32" else 3)


@pytest.mark.full
def test_a_build_with_a_tiny_vae_compares_with_diffusers(sd1_checkpoint: Path, tmp_path: Path, trace_cache: Path) -> None:
    tiny.write_tiny_vae(tmp_path / "taesd")
    assert whole(build(str(sd1_checkpoint), tmp_path / "bundle", ExportOptions(vae=str(tmp_path / "taesd"))))
    assert (tmp_path / "bundle" / "golden" / "numbers.npz").exists()


def vae_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in checkpoint.parts["vae"].weights.items()}


def test_a_file_without_a_vae_asks_for_one(without_vae: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(without_vae, name="x")
    assert caught.value.faults == (f"vae: no tensor's name begins with {VAE}: add --vae with the VAE to use",)


def test_a_vae_comes_from_a_folder_a_checkpoint_or_a_file(without_vae: Path, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole_model = read_checkpoint(folder, name="x")
    alone = {
        name.removeprefix(VAE): tensor.contiguous().clone()
        for name, tensor in single_file_tensors(folder).items()
        if name.startswith(VAE)
    }
    save_file(alone | {"loss.logvar": next(iter(alone.values())).clone()}, tmp_path / "vae.safetensors")
    bare = Path(shutil.copytree(folder / "vae", tmp_path / "bare"))
    for vae in (folder, bare, tmp_path / "vae.safetensors", write_single_file(folder, tmp_path / "whole.safetensors")):
        checkpoint = read(without_vae, vae=vae)
        expected, weights = vae_weights(whole_model), vae_weights(checkpoint)
        assert weights.keys() == expected.keys()
        assert all(np.array_equal(weights[name], expected[name]) for name in weights)
        assert [trace_key(each) for each in components(checkpoint)] == [trace_key(each) for each in components(whole_model)]
        assert checkpoint.model.scaling_factor == whole_model.model.scaling_factor
        assert checkpoint.changes[-1] == f"VAE: of {vae.name} (--vae)"


def test_a_vae_in_a_pickle_needs_the_flag(without_vae: Path, folder: Path, tmp_path: Path) -> None:
    import torch

    tensors = single_file_tensors(folder)
    weights = {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "vae.pt")
    overrides = Overrides(vae=str(tmp_path / "vae.pt"))
    with pytest.raises(CheckpointError, match=r"vae\.pt: 1 fault\n  - a pickle, .* --allow-pickle"):
        read_checkpoint(without_vae, name="x", overrides=overrides)
    expected = vae_weights(read_checkpoint(folder, name="x"))
    found = vae_weights(read_checkpoint(without_vae, name="x", overrides=overrides, allow_pickle=True))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_a_vae_s_own_scaling_factor_counts_and_a_file_of_a_vae_has_none(
    sd1_checkpoint: Path, folder: Path, other: Path, tmp_path: Path
) -> None:
    assert read(sd1_checkpoint, vae=other).model.scaling_factor == 0.5
    file = write_single_file(folder, tmp_path / "whole.safetensors")
    base = read(other_model := Path(shutil.copytree(folder, tmp_path / "base")), vae=other)
    assert base.model.scaling_factor == 0.5
    config = json.loads((other_model / "vae" / "config.json").read_text())
    (other_model / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.25}))
    assert read(other_model, vae=file).model.scaling_factor == 0.25
    shutil.rmtree(other_model / "vae")
    with pytest.raises(CheckpointError, match=r"no scaling_factor is known: .* and the file whole\.safetensors"):
        read(other_model, vae=file)


def test_a_prediction_type_replaces_the_stored_one_also_for_the_reference(sd1_checkpoint: Path) -> None:
    checkpoint = read(sd1_checkpoint, prediction_type="v_prediction")
    assert checkpoint.model.prediction_type == checkpoint.scheduler["prediction_type"] == "v_prediction"
    assert json.loads(checkpoint.source.file(SCHEDULER) or b"")["prediction_type"] == "v_prediction"
    assert checkpoint.changes[0] == "prediction type v_prediction (--prediction-type)"


def test_documents_of_another_folder_replace_those_that_it_has(folder: Path, tmp_path: Path) -> None:
    file = write_single_file(folder, tmp_path / "model.safetensors")
    documents = tmp_path / "documents"
    (documents / "scheduler").mkdir(parents=True)
    scheduler = json.loads((folder / SCHEDULER).read_text()) | {"beta_end": 0.02}
    (documents / SCHEDULER).write_text(json.dumps(scheduler))
    shutil.copytree(folder / "tokenizer", documents / "tokenizer")
    text = json.loads((documents / "tokenizer" / "tokenizer_config.json").read_text())
    (documents / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(text | {"model_max_length": 40}))
    checkpoint = read(file, config=documents)
    assert checkpoint.scheduler["beta_end"] == 0.02
    assert checkpoint.text_length == 40
    assert checkpoint.parts["unet"].config == read_checkpoint(file, name="x").parts["unet"].config
    assert set(checkpoint.source.inputs(checkpoint.parts)) == {SCHEDULER}
    assert checkpoint.changes[-1] == "configs, tokenizers and scheduler: of documents, where it has them (--config)"


def test_faults_name_the_option(sd1_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--vae: no such folder or file"):
        read(sd1_checkpoint, vae=tmp_path / "missing")
    with pytest.raises(CheckpointError, match="--config: no such folder"):
        read(sd1_checkpoint, config=tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no VAE: neither first_stage_model\.encoder\.conv_in\.weight nor"):
        read(sd1_checkpoint, vae=sd1_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_hub_repository_of_a_vae_is_downloaded_without_its_other_files() -> None:
    names = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "sdxl.vae.safetensors"]
    assert needed_files(names, "fp16", allow_pickle=False) == names[:2]


def test_a_build_with_another_vae_is_that_of_the_folder_with_that_vae(sd1_checkpoint: Path, other: Path, tmp_path: Path) -> None:
    def built(model: Path, out: Path, **options: Any) -> ExportResult:
        *_, last = whole(build(str(model), out, ExportOptions(**options)))
        assert isinstance(last, ExportResult)
        return last

    merged = Path(shutil.copytree(sd1_checkpoint, tmp_path / "merged"))
    shutil.rmtree(merged / "vae")
    shutil.copytree(other, merged / "vae")
    built(merged, tmp_path / "expected", verify=False)
    assert not built(sd1_checkpoint, tmp_path / "bundle", vae=str(other)).up_to_date
    bundle, expected = (Bundle.open(tmp_path / name).manifest for name in ("bundle", "expected"))
    assert {name: file.sha256 for name, file in expected.files.items()}.items() <= {
        name: file.sha256 for name, file in bundle.files.items()
    }.items()
    assert bundle.provenance["options"]["vae"] == "other-vae"
    assert str(tmp_path) not in (tmp_path / "bundle" / "manifest.json").read_text()
    assert built(sd1_checkpoint, tmp_path / "bundle", vae=str(other)).up_to_date

    against = run("verify", tmp_path / "bundle", "--against", sd1_checkpoint)
    assert against.exit_code == 2
    assert "not the checkpoint of this bundle" in against.stderr
    assert run("verify", tmp_path / "bundle", "--against", sd1_checkpoint, "--vae", other).exit_code == 0
    assert "--vae is for the checkpoint: add --against" in run("verify", tmp_path / "bundle", "--vae", other).stderr
    with pytest.raises(BundleError, match="overlap"):
        built(sd1_checkpoint, other / "bundle", vae=str(other))
