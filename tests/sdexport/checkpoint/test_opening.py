"""What diffusers' pipelines change of a checkpoint's settings when they open it is changed here too, and told."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.checkpoint.opening import _IDLE, _KNOWN, SCHEDULERS, opened_scheduler, opened_unet
from sdexport.errors import CheckpointError
from sdruntime.sampling.samplers import SAMPLERS, resolve, settled

PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    *("StableDiffusionInpaintPipeline", "StableDiffusionInstructPix2PixPipeline"),
)
CLASSES = [name for name in SCHEDULERS if name != "DPMSolverSDEScheduler"]  # which needs torchsde
MISSING = object()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def folder(sd1_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (document | changes).items() if value is not ...}))


def opened(pipeline: str, named: str, written: dict[str, Any]) -> Any:
    """diffusers' own pipeline with nothing but its scheduler."""
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    kind = getattr(diffusers, pipeline)
    parts = dict.fromkeys(key for key in inspect.signature(kind.__init__).parameters if key != "self")
    switches = {"requires_safety_checker": False, "force_zeros_for_empty_prompt": True, "add_watermarker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, named).from_config(written)
        return kind(**{key: switches.get(key) for key in parts} | {"scheduler": scheduler})


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("named", CLASSES)
def test_the_scheduler_is_the_open_pipelines(pipeline: str, named: str) -> None:
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    for offset in (MISSING, 0, 1, 2):
        for clip, prk in ((MISSING, MISSING), (True, False), (False, False), (False, True)):
            values = {"steps_offset": offset, "clip_sample": clip, "skip_prk_steps": prk}
            written = BETAS | {"_class_name": "PNDMScheduler"} | {k: v for k, v in values.items() if v is not MISSING}
            theirs, found = opened(pipeline, named, written).scheduler, []
            settings, changes = opened_scheduler(pipeline, named, written, found)
            clips = getattr(theirs.config, "clip_sample", False)
            if "clip_sample" in resolve(named)[0].reads:
                assert bool(found) == clips, (values, found)
            if found:
                continue
            sampler, ours = settled(settings)
            assert sampler.diffusers == named
            assert any("PNDMScheduler" in line for line in changes) == (named != "PNDMScheduler")
            for key in ("steps_offset", "clip_sample", "skip_prk_steps"):
                if key in ours:
                    assert ours[key] == getattr(theirs.config, key), (key, values)
            for other in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
                if other != named and sampler.space != "edm":  # whose models take no other sampler
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        switched = getattr(diffusers, other).from_config(theirs.config)
                    assert settled(settings, sampler=other)[1]["steps_offset"] == switched.config.steps_offset, (other, values)


@pytest.mark.parametrize("named", CLASSES)
def test_every_key_of_diffusers_schedulers_is_read_or_known_to_be_idle(named: str) -> None:
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    keys = {key for key in inspect.signature(getattr(diffusers, named).__init__).parameters if key not in ("self", "kwargs")}
    assert keys <= _KNOWN
    rows = [row for row in SAMPLERS.values() if row.diffusers == named]
    unread = keys - {key for row in rows for key in row.reads} - _IDLE
    # the two distilled ones walk their own subset of the timesteps, whatever these say
    assert unread <= (
        {"steps_offset", "timestep_spacing", "timestep_scaling"} if named in ("LCMScheduler", "TCDScheduler") else set()
    )


def test_a_version_without_end_is_none() -> None:
    written = {"sample_size": 32, "_diffusers_version": "0." + "8" * 5000}
    assert opened_unet(PIPELINES[0], written) == (written, ())


@pytest.mark.parametrize("version", ["0.6.0", "0.8.1.dev0", "0.9.0.dev0", "0.21.0", MISSING])
@pytest.mark.parametrize("size", [32, 64, 96, [32, 32]])
def test_the_size_of_an_old_unet_is_the_open_pipelines(version: Any, size: Any) -> None:
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    written = {"sample_size": size} | ({} if version is MISSING else {"_diffusers_version": version})
    small = {
        "block_out_channels": [32],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "layers_per_block": 1,
    }
    for pipeline in PIPELINES:
        if pipeline == "StableDiffusionInpaintPipeline" and isinstance(size, list):
            continue  # it compares the list with a number, and fails
        unet = diffusers.UNet2DConditionModel.from_config(small | written)
        kind = getattr(diffusers, pipeline)
        parts = dict.fromkeys(key for key in inspect.signature(kind.__init__).parameters if key != "self")
        switches = {"requires_safety_checker": False, "force_zeros_for_empty_prompt": True, "add_watermarker": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind(**{key: switches.get(key) for key in parts} | {"unet": unet})
        settings, changes = opened_unet(pipeline, written)
        assert settings["sample_size"] == unet.config.sample_size
        assert bool(changes) == (settings != written)


def test_changes_are_told(folder: Path) -> None:
    assert read_checkpoint(folder, name="tiny").changes == ()
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", steps_offset=..., clip_sample=True)
    edit(folder / "unet" / "config.json", _diffusers_version="0.8.0")
    checkpoint = read_checkpoint(folder, name="tiny")
    assert checkpoint.changes == (
        "unet: sample_size 8 becomes 64, as StableDiffusionPipeline has it for a network that diffusers 0.8.0 wrote",
        "scheduler: PNDMScheduler, as model_index.json names it, with the settings of 'DDIMScheduler'",
        "scheduler: steps_offset (missing) becomes 1, as StableDiffusionPipeline has it",
        "scheduler: clip_sample True becomes false, as StableDiffusionPipeline has it",
    )
    assert checkpoint.model.default_size == (512, 512)
    assert checkpoint.scheduler["_class_name"] == "PNDMScheduler"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variance_type": "learned_range"}, "variance_type"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"thresholding": True}, "thresholding True"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "scheduler_config.json"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ({"a_setting_of_tomorrow": 0.3}, "a_setting_of_tomorrow 0.3 is not a setting that sdexport knows of a scheduler"),
    ],
)
def test_a_scheduler_without_a_table_is_refused_when_the_checkpoint_is_read(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder, name="tiny")
    assert all(fault.startswith("scheduler/scheduler_config.json: ") for fault in caught.value.faults)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": None}),
        ("DPMSolverMultistepScheduler", {"lower_order_final": None, "solver_order": 3}),
        ("UniPCMultistepScheduler", {"predict_x0": None, "final_sigmas_type": "sigma_min"}),
        ("DDIMScheduler", {"prediction_type": "v_prediction", "_use_default_values": ["prediction_type", "beta_end"]}),
    ],
)
def test_null_and_listed_defaults_are_read_as_diffusers_reads_them(named: str, changes: dict[str, Any]) -> None:
    """Of one class and its own file: the table of diffusers' settings is another one, were they not."""
    written, found = BETAS | {"_class_name": named, "clip_sample": False} | changes, list[str]()
    theirs = dict(opened(PIPELINES[1], named, written).scheduler.config)
    settings, _ = opened_scheduler(PIPELINES[1], named, written, found)
    assert found == []
    for key, value in settled(settings)[1].items():
        if key in theirs and key not in ("lambda_min_clipped", "variance_type", "disable_corrector"):
            assert bool(theirs[key]) == value if isinstance(value, bool) else theirs[key] == value, key


@pytest.mark.parametrize("key", ["timestep_spacing", "beta_end", "num_train_timesteps", "prediction_type"])
def test_null_that_diffusers_cannot_read_is_refused(key: str) -> None:
    found: list[str] = []
    opened_scheduler(PIPELINES[1], "DDIMScheduler", BETAS | {"clip_sample": False, key: None}, found)
    assert found
    assert all(f"{key} is null" in fault for fault in found)


def test_a_network_config_passes_over_the_defaults_that_it_lists(folder: Path) -> None:
    edit(folder / "vae" / "config.json", scaling_factor=0.5, _use_default_values=["scaling_factor"])
    assert read_checkpoint(folder, name="tiny").model.scaling_factor == 0.18215
    edit(folder / "vae" / "config.json", _use_default_values="scaling_factor")
    with pytest.raises(CheckpointError, match=r"vae/config.json: _use_default_values: expected a list of keys"):
        read_checkpoint(folder, name="tiny")


def test_a_distilled_scheduler_that_takes_few_steps_has_a_table(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", original_inference_steps=4)
    assert read_checkpoint(folder, name="tiny").scheduler["original_inference_steps"] == 4


@pytest.mark.parametrize("named", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_flow_scheduler_that_diffusers_pipeline_cannot_run_is_refused(folder: Path, named: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    assert not hasattr(getattr(diffusers, named), "scale_model_input")
    edit(folder / "model_index.json", scheduler=["diffusers", named])
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=named, prediction_type=...)
    with pytest.raises(CheckpointError, match=rf"{named}, which StableDiffusionPipeline cannot run.*UniPCMultistepScheduler"):
        read_checkpoint(folder, name="tiny")


def test_the_way_out_for_a_flow_model_works(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert read_checkpoint(folder, name="tiny").model.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"requires_aesthetics_score": True}, "only pipelines of Stable Diffusion XL take a score"),
        ({"requires_aesthetics_score": "yes"}, "must be one of True, False, None"),
        ({"upscale_by": 2}, "is not known to sdexport"),
    ],
)
def test_a_setting_of_the_index_that_cannot_be_followed_is_refused(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit(folder / "model_index.json", **changes)
    with pytest.raises(CheckpointError, match=named):
        read_checkpoint(folder, name="tiny")
