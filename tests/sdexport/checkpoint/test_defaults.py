"""The settings that a checkpoint is made for, as its configs and its card say, and what is chosen instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdexport.checkpoint.card import Card
from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.checkpoint.defaults import defaults_of, merged, parsed
from sdruntime.bundle.model import Defaults
from sdruntime.errors import SettingError

PLAIN: dict[str, Any] = {"time_cond_proj_dim": None}
# the scheduler configs of published checkpoints, as far as they matter
SD15 = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
SDXL = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "prediction_type": "epsilon"}
SD_TURBO = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}
SDXL_TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "epsilon"}
ZERO_SNR = SD_TURBO | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
FEW = Defaults(steps=4, guidance=1.0)


@pytest.mark.parametrize(
    ("unet", "scheduler", "card", "defaults"),
    [
        (PLAIN, SD15, Card(), Defaults()),
        (PLAIN, SDXL, Card(), Defaults()),
        (PLAIN, ZERO_SNR, Card(), Defaults()),
        (PLAIN, SD_TURBO, Card(), FEW),
        (PLAIN, SDXL_TURBO, Card(), FEW),
        (PLAIN, LCM, Card(), FEW),
        (PLAIN, {"_class_name": "TCDScheduler"}, Card(), FEW),
        ({"time_cond_proj_dim": 256}, LCM, Card(), Defaults(steps=4, guidance=8.5)),
        (PLAIN, SDXL_TURBO, Card(steps=1, guidance=0.0), Defaults(steps=1, guidance=0.0)),
        (PLAIN, SD15, Card(guidance=5.0), Defaults(guidance=5.0)),
        (PLAIN, SD15, Card(size=(768, 512)), Defaults(size=(768, 512))),
    ],
)
def test_defaults_follow_from_the_configs_and_the_card(unet: Any, scheduler: Any, card: Card, defaults: Defaults) -> None:
    found, reason = defaults_of(unet, scheduler, card)
    assert found == defaults
    assert bool(reason) == (defaults != Defaults())


def test_lcm_models_have_the_defaults_of_diffusers() -> None:
    import inspect

    diffusers = pytest.importorskip("diffusers")
    parameters = inspect.signature(diffusers.LatentConsistencyModelPipeline.__call__).parameters
    found, _ = defaults_of({"time_cond_proj_dim": 256}, LCM, Card())
    assert (found.steps, found.guidance) == tuple(parameters[name].default for name in ("num_inference_steps", "guidance_scale"))


def test_chosen_defaults_replace_those_of_the_checkpoint() -> None:
    assert parsed("steps=8,sampler=Euler a") == Defaults(steps=8, sampler="Euler a")
    assert parsed("") == Defaults()
    assert merged(FEW, parsed("steps=8")) == Defaults(steps=8, guidance=1.0)
    assert merged(FEW, parsed("guidance=0")) == Defaults(steps=4, guidance=0.0)
    assert str(merged(FEW, parsed("sampler=lcm"))) == "steps 4, guidance 1, sampler lcm"
    assert str(merged(FEW, parsed("size=768x512"))) == "steps 4, guidance 1, size 768x512"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "expected steps=…, guidance=…, sampler=…, size=…; got 'steps'"),
        ("size=512", "size '512': expected WIDTHxHEIGHT"),
        ("size=0x512", "size 0x512 is outside 1 to 16,384 pixels"),
        ("speed=3", "got 'speed=3'"),
        ("steps=four", "steps 'four' is not a number"),
        ("steps=0", "steps 0 is outside 1 to 1,000"),
        ("guidance=200", "guidance 200 is outside 0 to 100"),
        ("guidance=nan", "guidance nan is outside"),
        ("sampler=quux", "unknown sampler 'quux'"),
    ],
)
def test_wrong_defaults_are_refused(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parsed(text)


def test_a_checkpoint_has_its_defaults_and_says_why(sd1_checkpoint: Path, tmp_path: Path) -> None:
    assert read_checkpoint(sd1_checkpoint, name="tiny").model.defaults == Defaults()
    folder = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    index, scheduler = folder / "model_index.json", folder / "scheduler/scheduler_config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]}))
    written = json.loads(scheduler.read_text()) | SDXL_TURBO | {"steps_offset": 1}
    scheduler.write_text(json.dumps(written))
    checkpoint = read_checkpoint(folder, name="tiny")
    assert checkpoint.model.defaults == FEW
    [line] = [line for line in checkpoint.changes if line.startswith("defaults")]
    assert line.startswith("defaults: steps 4, guidance 1: EulerAncestralDiscreteScheduler with trailing timesteps")
    (folder / "README.md").write_text(
        "---\ninference:\n  parameters: {num_inference_steps: 1, guidance_scale: 0, width: 96, height: 64}\n---\n# x\n"
    )
    model = read_checkpoint(folder, name="tiny").model
    assert model.defaults == Defaults(steps=1, guidance=0.0, size=(96, 64))
    assert model.usual_size == (64, 96)
    (folder / "README.md").write_text(
        "---\ninference:\n  parameters:\n    num_inference_steps: many\n    guidance_scale: -3\n---\n"
    )
    assert read_checkpoint(folder, name="tiny").model.defaults == FEW
