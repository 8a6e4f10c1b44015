"""Single files in the original layout are the same checkpoints as their diffusers folders."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hostile import Planted
from once import once
from single_files import UNET, VAE, single_file_tensors, write_diffusers_file, write_single_file, write_standard

from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.original.diffusers import read_unet
from sdexport.checkpoint.original.layout import read_original
from sdexport.checkpoint.weights.names import match_weights
from sdexport.checkpoint.weights.safetensors import read_header
from sdexport.checkpoint.weights.torch_file.file import REFUSED_PICKLE
from sdexport.errors import CheckpointError
from sdexport.families.components import components
from sdexport.trace.cache import trace_key
from sdruntime.bundle.tasks import channels

KINDS = ("sd1", "sd2", "sd2_v", "sdxl", "refiner")
SIGN = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"  # of Stable Diffusion 1
V = {"modelspec.prediction_type": "v"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def folder_of(factory: pytest.TempPathFactory, kind: str) -> Path:
    return once(factory, f"checkpoints/standard-{kind}", lambda folder: write_standard(folder, kind))


def file_of(factory: pytest.TempPathFactory, kind: str) -> Path:
    folder = folder_of(factory, kind)
    metadata = V if kind == "sd2_v" else None
    return once(
        factory, f"checkpoints/standard-{kind}.safetensors", lambda file: write_single_file(folder, file, metadata=metadata)
    )


@pytest.fixture(scope="module", params=["original", "diffusers"])
def both(kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    folder = folder_of(tmp_path_factory, kind)
    paths = (
        folder,
        file_of(tmp_path_factory, kind) if request.param == "original" else tmp_path_factory.mktemp("one") / "a.safetensors",
    )
    if request.param == "diffusers":
        write_diffusers_file(folder, paths[1], metadata=V if kind == "sd2_v" else None)
    folder, file = (read_checkpoint(path, name="x") for path in paths)
    return folder, file


def test_networks_and_settings_are_those_of_the_folder(both: tuple[Checkpoint, Checkpoint]) -> None:
    """The keys of the traces cover every setting of a network, so the same graphs are exported."""
    folder, file = both
    assert [trace_key(each) for each in components(file)] == [trace_key(each) for each in components(folder)]
    spec, expected = ({name: getattr(each.model, name) for name in each.model.__dataclass_fields__} for each in (file, folder))
    assert spec.pop("license") == "unknown"
    assert expected.pop("license") == "cc0-1.0"
    assert spec == expected
    assert file.text_length == folder.text_length == 77
    assert {name: each.files for name, each in file.tokenizers.items()} == {
        name: each.files for name, each in folder.tokenizers.items()
    }


def test_weights_are_those_of_the_folder(both: tuple[Checkpoint, Checkpoint]) -> None:
    folder, file = both
    for part, stored in folder.parts.items():
        shapes = {name: tensor.shape for name, tensor in stored.weights.items()}
        matched = match_weights(shapes, file.parts[part].weights, where=part)
        assert len(file.parts[part].weights) == len(matched) > 10
        assert [name for name, tensor in matched.items() if not np.array_equal(tensor.read(), stored.weights[name].read())] == []


@pytest.mark.parametrize(("named", "zipped"), [("sd1", True), ("sd1", False), ("sd2", True), ("sdxl", True)])
def test_a_pickle_is_the_same_checkpoint(
    named: str, zipped: bool, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """As the training code wrote it: under `state_dict`, beside other objects, with matrices that are views."""
    import torch

    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    whole = {"state_dict": tensors_of(tmp_path_factory, named), "callbacks": {"x": Planted(canary)}, "global_step": 3}
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    assert faults(path) == (REFUSED_PICKLE,)
    pickled = read_checkpoint(path, name="x", allow_pickle=True)
    file = read_checkpoint(file_of(tmp_path_factory, named), name="x")
    assert [trace_key(each) for each in components(pickled)] == [trace_key(each) for each in components(file)]
    assert (pickled.model, pickled.changes, pickled.scheduler) == (file.model, file.changes, file.scheduler)
    for part, stored in file.parts.items():
        weights = pickled.parts[part].weights
        assert weights.keys() == stored.weights.keys()
        assert all(np.array_equal(weights[name].read(), tensor.read()) for name, tensor in stored.weights.items()), part
    assert not canary.exists()


def test_the_contents_decide_what_a_file_is_not_its_ending(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    import torch

    path = Path(shutil.copy(file_of(tmp_path_factory, "sd1"), tmp_path / "model.ckpt"))
    assert len(read_checkpoint(path, name="x").parts) == 3
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert faults(tmp_path / "model.safetensors") == (REFUSED_PICKLE,)
    with pytest.raises(CheckpointError, match="not a checkpoint of Stable Diffusion"):
        read_checkpoint(tmp_path / "model.safetensors", name="x", allow_pickle=True)
    (tmp_path / "other.ckpt").write_bytes(pickle.dumps({"x": [1.0]}))
    [fault] = faults(tmp_path / "other.ckpt")
    assert fault.startswith("neither a file of torch.save nor a safetensors file: not a whole safetensors file")


@pytest.mark.parametrize("sampler", ["scheduler"])
def test_the_scheduler_is_that_of_the_model_s_own_folder(both: tuple[Checkpoint, Checkpoint], sampler: str) -> None:
    folder, file = both
    for key in (
        "_class_name",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "num_train_timesteps",
        "steps_offset",
        "prediction_type",
    ):
        assert file.scheduler[key] == folder.scheduler[key], key


def test_what_was_inferred_is_listed_with_its_reason(tmp_path_factory: pytest.TempPathFactory) -> None:
    [model, prediction, size] = read_checkpoint(file_of(tmp_path_factory, "sd2_v"), name="x").changes
    assert model == "Stable Diffusion 2: the file has cond_stage_model.model.ln_final.weight"
    assert prediction == "prediction type v_prediction: modelspec.prediction_type of its metadata is v"
    assert size == "default size 768x768: as Stable Diffusion 2 has it for v_prediction"


@pytest.mark.parametrize(("spread", "expected"), [(0.02, "epsilon"), (0.3, "v_prediction")])
def test_without_metadata_a_weight_tells_what_stable_diffusion_2_predicts(
    spread: float, expected: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    tensors = tensors_of(tmp_path_factory, "sd2")
    name = f"{UNET}output_blocks.5.1.transformer_blocks.0.norm1.bias"
    tensors[name] = spread * (-1.0) ** np.arange(tensors[name].numel(), dtype=np.float32)
    checkpoint = read_checkpoint(saved(tensors, tmp_path), name="x")
    assert checkpoint.model.prediction_type == expected
    assert checkpoint.model.default_size == ((768, 768) if expected == "v_prediction" else (512, 512))
    assert f"has the standard deviation {spread:.3f}" in checkpoint.changes[1]


def tensors_of(factory: pytest.TempPathFactory, kind: str) -> dict[str, Any]:
    return single_file_tensors(folder_of(factory, kind))


def saved(tensors: dict[str, Any], folder: Path, **metadata: str) -> Path:
    import torch
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file({name: torch.as_tensor(tensor).contiguous().clone() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def faults(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, name="x")
    assert caught.value.exit_code == 2
    return caught.value.faults


def test_the_weight_tells_it_in_the_layout_of_diffusers_too(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_diffusers_file(folder_of(tmp_path_factory, "sd2"), tmp_path / "a.safetensors")
    tensors = load_file(path)
    last = "unet.up_blocks.1.attentions.2.transformer_blocks.0.norm1.bias"
    for spread, expected in ((0.02, "epsilon"), (0.3, "v_prediction")):
        tensors[last] = spread * (-1.0) ** torch_range(tensors[last])
        save_file(tensors, path)
        checkpoint = read_checkpoint(path, name="x")
        assert checkpoint.model.prediction_type == expected
        assert last in checkpoint.changes[1]


def torch_range(like: Any) -> Any:
    import torch

    return torch.arange(len(like), dtype=torch.float32)


@pytest.mark.parametrize("model", [*tiny.PRUNED, "lcm"])
def test_a_unet_of_any_shape_is_read_in_the_layout_of_diffusers(
    model: str, sdxl_checkpoint: Path, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    """The network that the inferred config makes has the weights that are there."""
    import torch
    from diffusers import UNet2DConditionModel

    if model == "lcm":
        folder = tiny.write_task_checkpoint(tmp_path / "x", "sd1", "lcm")
    else:
        folder = Path(shutil.copytree(sdxl_checkpoint, tmp_path / "x"))
        tiny.prune(folder, model)
    stored = read_header(folder / "unet" / "diffusion_pytorch_model.safetensors")
    config, _ = read_unet(stored, heads=2, pooled=None if model == "lcm" else 32, ids=6)
    with torch.device("meta"):
        made = UNet2DConditionModel.from_config({**config, "norm_num_groups": 8, "sample_size": 8}).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {name: each.shape for name, each in stored.items()}


def test_marks_of_the_schedule_are_followed(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    tensors = tensors_of(tmp_path_factory, "sdxl") | {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    checkpoint = read_checkpoint(saved(tensors, tmp_path), name="x")
    assert checkpoint.model.prediction_type == "v_prediction"
    assert checkpoint.scheduler["rescale_betas_zero_snr"] is True
    assert checkpoint.scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(("count", "task"), [(9, "inpainting"), (8, "instruct_pix2pix"), (5, "depth")])
def test_the_first_weight_says_which_task_a_unet_was_made_for(
    count: int, task: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    import torch

    tensors = tensors_of(tmp_path_factory, "sd1")
    name = f"{UNET}input_blocks.0.0.weight"
    tensors[name] = torch.zeros((tensors[name].shape[0], count, 3, 3))
    checkpoint = read_checkpoint(saved(tensors, tmp_path), name="x")
    assert checkpoint.task == task
    assert [tensor.name for tensor in components(checkpoint)[-1].inputs][3:] == [*channels(checkpoint.task, 4)]


def test_averaged_weights_and_strangers_beside_the_model_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    tensors = tensors_of(tmp_path_factory, "sd1")
    usual = read_checkpoint(file_of(tmp_path_factory, "sd1"), name="x")
    more = {"model_ema.diffusion_modelout2bias": np.ones(4, np.float32), "betas": np.ones(1000, np.float32)}
    checkpoint = read_checkpoint(saved(tensors | more, tmp_path), name="x")
    assert checkpoint.parts["unet"].config == usual.parts["unet"].config
    assert checkpoint.changes[1].startswith("the weights without averaging are used")


def test_old_files_name_the_text_encoder_without_text_model(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    tensors = {
        name.replace("transformer.text_model.", "transformer."): tensor
        for name, tensor in tensors_of(tmp_path_factory, "sd1").items()
    }
    checkpoint = read_checkpoint(saved(tensors, tmp_path), name="x")
    assert len(checkpoint.parts["text_encoder"].weights) == 36


def test_every_unknown_and_every_missing_network_is_named_at_once(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(tmp_path_factory, "sd1").items() if not name.startswith(VAE)}
    tensors |= {f"{UNET}input_blocks.1.0.lora_{k}.weight": np.zeros(1, np.float32) for k in range(25)}
    unet, vae = faults(saved(tensors, tmp_path))
    assert unet.startswith("unet: 25 unknown names: input_blocks.1.0.lora_0.weight, ")
    assert unet.endswith(" and 5 more")
    assert vae.startswith(f"vae: no tensor's name begins with {VAE}")


def test_everything_that_is_missing_unknown_or_of_another_shape_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """All networks at once, by the names and the shapes of the file, which the config of the others still follows."""
    tensors = tensors_of(tmp_path_factory, "sdxl")
    second, block = "conditioner.embedders.1.model.", "transformer.resblocks.1."
    for name in (
        f"{UNET}input_blocks.0.0.weight",
        f"{UNET}middle_block.1.transformer_blocks.2.attn2.to_k.weight",
        f"{UNET}output_blocks.2.2.conv.bias",
        f"{VAE}decoder.mid.attn_1.proj_out.bias",
        f"{second}{block}mlp.c_fc.weight",
        f"{second}text_projection",
    ):
        del tensors[name]
    tensors |= {f"{UNET}extra.{k}.weight": np.zeros(1, np.float32) for k in range(21)} | {f"{VAE}extra": np.zeros(1, np.float32)}
    tensors[f"{UNET}time_embed.2.bias"] = np.zeros(7, np.float32)
    tensors[f"{VAE}encoder.mid.attn_1.q.weight"] = np.zeros((32, 31, 1, 1), np.float32)
    tensors[f"{second}{block}attn.in_proj_weight"] = np.zeros((383, 128), np.float32)
    tensors[f"{second}{block}attn.in_proj_bias"] = np.zeros(390, np.float32)
    tensors["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"] = np.zeros((64, 1), np.float32)
    told = faults(saved(tensors, tmp_path))
    [extra] = [line for line in told if line.startswith("unet: 21 unknown names: ")]
    assert extra.count("extra.") == 20
    assert extra.endswith(" and 1 more")
    assert [line for line in told if line != extra] == [
        "text_encoder: 1 wrong shape: final_layer_norm.bias [64, 1], where [64] fits",
        f"text_encoder_2: 2 missing names: {block}mlp.c_fc.weight, text_projection",
        f"text_encoder_2: 2 wrong shapes: {block}attn.in_proj_weight [383, 128], where [384, 128] fits; "
        f"{block}attn.in_proj_bias [390], where [384] fits",
        "unet: 3 missing names: input_blocks.0.0.weight, middle_block.1.transformer_blocks.2.attn2.to_k.weight, "
        "output_blocks.2.2.conv.bias",
        "unet: 1 wrong shape: time_embed.2.bias [7], where [256] fits",
        "vae: 1 unknown name: extra",
        "vae: 1 missing name: decoder.mid.attn_1.proj_out.bias",
        "vae: 1 wrong shape: encoder.mid.attn_1.q.weight [32, 31, 1, 1], where [32, 32, 1, 1] fits",
    ]


@pytest.mark.parametrize(
    ("named", "layout"),
    [
        ("sdxl", "original"),
        ("sdxl", "diffusers"),
        *(
            pytest.param(named, layout, marks=pytest.mark.full)
            for named in ("sd1", "sd2_v", "refiner")
            for layout in ("original", "diffusers")
        ),
    ],
)
def test_each_tensor_that_is_missing_or_has_another_axis_is_named(
    named: str, layout: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """And nothing else is, since the other tensors of the network say how large it is."""
    folder = folder_of(tmp_path_factory, named)
    path = file_of(tmp_path_factory, named) if layout == "original" else write_diffusers_file(folder, tmp_path / "a.safetensors")
    tensors = read_header(path)
    idle = ("position_ids", "logit_scale", "resblocks.2.", "model.text_projection")[: 4 if named == "sd2_v" else 2]
    names = [name for name in tensors if not any(part in name for part in idle)]
    for name in names[:: 2 if named == "sd1" else 9]:
        tensor = tensors[name]
        for changed, kind in ((None, "1 missing name: "), (replace(tensor, shape=(*tensor.shape, 1)), "1 wrong shape: ")):
            others = {key: value for key, value in tensors.items() if key != name} | ({name: changed} if changed else {})
            with pytest.raises(ValueError, match=f"^[a-z_2]+: {kind}") as caught:
                read_original(others, V if named == "sd2_v" else {})
            [line] = str(caught.value).split("\n")
            assert name.endswith(line.partition(kind)[2].partition(" ")[0])


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("named", ["sd1", "sd2_v", "sdxl"])
def test_a_module_that_is_missing_as_a_whole_is_one_error(
    named: str, layout: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Whichever it is: a layer, a level, a network."""
    folder = folder_of(tmp_path_factory, named)
    path = file_of(tmp_path_factory, named) if layout == "original" else write_diffusers_file(folder, tmp_path / "a.safetensors")
    tensors = read_header(path)
    sizes = Counter(name[: end + 1] for name in tensors for end, letter in enumerate(name) if letter == ".")
    modules = [module for module, size in sorted(sizes.items()) if size > 6]
    refusals = []
    for module in modules:
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(module)}
        try:
            read_original(others, V if named == "sd2_v" else {})
        except ValueError as error:
            refusals.append(str(error))
    assert 0.8 * len(modules) < len(refusals)  # the others are networks with a layer less
    assert max(map(len, refusals)) < 20_000


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "not supported: Stable Diffusion 3 (model.diff"),
        (["double_blocks.0.img_attn.qkv.weight"], "not supported: Flux"),
        (["lora_unet_down_blocks_0.lora_down.weight"], "not supported: a LoRA, not a checkpoint"),
        (["control_model.input_hint_block.0.weight"], "not supported: a ControlNet, not a checkpoint"),
        ([SIGN, f"{UNET}label_emb.weight"], "not supported: an upscaling model in one file: use its diffusers folder ("),
        ([SIGN, "embedder.model.visual.proj"], "not supported: unCLIP"),
        ([SIGN, f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight"], "not supported: a video model"),
        ([SIGN, "control_model.zero_convs.0.0.weight"], "not supported: a model with a ControlNet"),
        ([SIGN, f"{UNET}position_net.linears.0.weight"], "not supported: GLIGEN"),
        ([f"{UNET}out.0.weight"], "a UNet without a text encoder: none of conditioner.embedders.1.model.ln_final.weight"),
        (["weight"], "not a checkpoint of Stable Diffusion: no tensor's name begins with model.diffusion_model."),
    ],
)
def test_other_files_are_refused_by_their_names(names: list[str], told: str, tmp_path: Path) -> None:
    [fault] = faults(saved({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path))
    assert fault.startswith(told)


def test_a_damaged_file_is_one_fault(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    path = Path(shutil.copy(file_of(tmp_path_factory, "sd1"), tmp_path / "cut.safetensors"))
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)
    [fault] = faults(path)
    assert "cut off, or damaged" in fault


def test_the_header_and_the_vocabulary_are_read_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a part of a second; SDXL has two tokenizers with one vocabulary."""
    from sdexport.checkpoint.original import tokenizer
    from sdruntime.adapters import safetensors

    path = file_of(tmp_path_factory, "sdxl")
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    monkeypatch.setattr(safetensors, "json_from_text", counted("header", safetensors.json_from_text))
    monkeypatch.setattr(tokenizer.gzip, "decompress", counted("vocabulary", tokenizer.gzip.decompress))
    tokenizer._vocabulary.cache_clear()
    assert len(read_checkpoint(path, name="x").tokenizers) == 2
    assert sorted(calls) == ["header", "vocabulary"]


def test_the_shipped_vocabulary_is_that_of_clip() -> None:
    """The ids of OpenAI's tokenizer for a text of its README, and the places of the first and last words."""
    from sdexport.checkpoint.original.tokenizer import clip_tokenizer
    from sdexport.checkpoint.tokenizer import read_tokenizer

    files = clip_tokenizer(pad="<|endoftext|>")
    vocabulary = json.loads(files["vocab.json"])
    assert len(vocabulary) == 49408
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"], vocabulary["!"]) == (49406, 49407, 0)
    tokenizer = read_tokenizer(files).tokenizer
    assert tokenizer.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
