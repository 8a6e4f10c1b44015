"""Apply the changes that a diffusers pipeline makes to settings when it opens a checkpoint, and check the scheduler's settings.

Source: diffusers' DiffusionPipeline.from_pretrained, ConfigMixin.from_config and the __init__ of StableDiffusionPipeline and
StableDiffusionImg2ImgPipeline (those of XL change nothing). tests/sdexport/checkpoint/test_opening.py compares it with diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdexport.checkpoint.pipelines import MOST_NOISE, SCORE
from sdruntime.bundle.limits import NOISE_LEVELS
from sdruntime.errors import SdruntimeError
from sdruntime.pipeline.requests.ranges import NUMBERS
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.samplers import SAMPLERS
from sdruntime.sampling.samplers.sampler import CHOICES, DEFAULTED

PATH = "scheduler/scheduler_config.json"
# all that the runtime supports, except flow matching: its schedulers lack methods that the Stable Diffusion pipelines call
SCHEDULERS = tuple(sorted({row.diffusers for row in SAMPLERS.values() if row.diffusers and row.space != "flow"}))
FLOW_SCHEDULERS = tuple(sorted({row.diffusers for row in SAMPLERS.values() if row.diffusers and row.space == "flow"}))
_AMENDING = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
_INPAINTING = "StableDiffusionInpaintPipeline"
_WITHOUT_OFFSET = ("DPMSolverSinglestepScheduler",)
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # their default of clip_sample is true

# keys of scheduler classes that affect no image, and why
_IDLE = frozenset(
    (
        # of thresholding, clip_sample and dynamic shifting, which are refused if enabled
        *("dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range"),
        *("time_shift_type", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
        "tau_func",  # of SASolver: a function, which no file can hold
        "noise_sampler_seed",  # of DPMSolverSDE: diffusers' noise comes from torchsde's generator, ours from the request's seed
        # of versions before 0.10; current versions do not read them
        *("tensor_format", "predict_epsilon"),
        "set_alpha_to_one",  # of LCM and TCD, which end at a trained timestep
    )
)
_KNOWN = _IDLE | {key for row in SAMPLERS.values() for key in row.reads}
_STEPS: int = NUMBERS["steps"]
GOLDEN_STEPS = (6, 4, 2, 1)  # steps of reference images: the first number that the scheduler has a table for


# keys of model_index.json other than its parts, with the values that have no effect; "_…" and unknown parts are ignored
_INDEX: Mapping[str, tuple[Any, ...]] = {
    "requires_safety_checker": (True, False, None),  # no safety checker is exported
    "force_zeros_for_empty_prompt": (True, False),  # ModelSpec.zero_empty_negative
    SCORE: (True, False, None),  # misfits: the UNet's config must agree
    "add_watermarker": (True, False, None),  # no watermark is put into images
}


def check_index(index: Mapping[str, Any], faults: list[str]) -> None:
    """Add a fault for each setting of model_index.json that is unknown or not supported."""
    for key, value in index.items():
        if key.startswith("_") or isinstance(value, list) or value is None or value in _INDEX.get(key, (False,)):
            continue
        if key == MOST_NOISE:
            if type(value) is not int or not 0 <= value < NOISE_LEVELS:
                faults.append(f"model_index.json: {key} {value!r:.60} is not a whole number from 0 to {NOISE_LEVELS - 1}")
            continue
        known = f"must be one of {', '.join(map(str, _INDEX[key]))}" if key in _INDEX else "is not known to sdexport"
        faults.append(f"model_index.json: {key:.60} {value!r:.60} {known}: the image may depend on it")


def opened_unet(pipeline: str, written: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the UNet's config in the open pipeline, and a line for each change."""
    size, version = written.get("sample_size"), written.get("_diffusers_version")
    old = re.match(r"(\d{1,9})\.(\d{1,9})(?!\d)", version, re.ASCII) if isinstance(version, str) else None
    if pipeline not in (*_AMENDING, "StableDiffusionDepth2ImgPipeline") or not isinstance(size, int) or size >= 64 or not old:
        return written, ()
    if (int(old[1]), int(old[2])) >= (0, 9):
        return written, ()
    change = f"unet: sample_size {size} becomes 64, as {pipeline} has it for a network that diffusers {version} wrote"
    return {**written, "sample_size": 64}, (change,)


def opened_scheduler(
    pipeline: str, named: str, written: Mapping[str, Any], faults: list[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the scheduler's settings in the open pipeline, and a line for each change.

    `named` is the class in model_index.json. Unknown keys, and settings that no table of coefficients can express, are faults.
    """
    written = without_defaults(written, PATH, faults)
    settings, changes = dict(written), []
    if written.get("_class_name") != named:
        settings["_class_name"] = named
        changes.append(f"scheduler: {named}, as model_index.json names it, with the settings of {written.get('_class_name')!r}")
    if pipeline in _AMENDING:
        offset = written.get("steps_offset", 1 if named in _WITHOUT_OFFSET else 0)
        if offset != 1:
            changes.append(f"scheduler: steps_offset {_shown(written, 'steps_offset')} becomes 1, as {pipeline} has it")
            _set(settings, written, "steps_offset", 1)
        if pipeline == _INPAINTING and written.get("skip_prk_steps", named != "PNDMScheduler") is False:
            changes.append(f"scheduler: skip_prk_steps {_shown(written, 'skip_prk_steps')} becomes true, as {pipeline} has it")
            _set(settings, written, "skip_prk_steps", True)
        if pipeline != _INPAINTING and written.get("clip_sample", named in _CLIPPING) is True:
            changes.append(f"scheduler: clip_sample {_shown(written, 'clip_sample')} becomes false, as {pipeline} has it")
            _set(settings, written, "clip_sample", False)
    if (pipeline == _INPAINTING or pipeline not in _AMENDING) and "clip_sample" not in written and named in _CLIPPING:
        faults.append(
            f"{PATH}: clip_sample is missing, and {named}'s default is true, which {pipeline} keeps; clipping is not supported: "
            'add "clip_sample": false if the model was not trained with it'
        )
    for key, value in written.items():
        if key not in _KNOWN and not key.startswith("_") and value not in (None, False, "", [], {}):
            faults.append(
                f"{PATH}: {key:.60} {value!r:.60} is not a setting that sdexport knows of a scheduler: the image may depend on it"
            )
    reads = {key: default for row in SAMPLERS.values() if row.diffusers == named for key, default in row.reads.items()}
    for key, default in reads.items():  # diffusers treats null as false for a flag, and fails for other settings
        if key in written and written[key] is None and not isinstance(default, bool) and None not in CHOICES.get(key, (default,)):
            faults.append(f"{PATH}: {key} is null, which {named} cannot read: remove it for the default, {default!r}")
    if not faults:
        try:
            fitting_steps(settings, (_STEPS, *GOLDEN_STEPS))
        except SdruntimeError as error:
            faults.append(f"{PATH}: {error}")
    return settings, tuple(changes)


def without_defaults(written: Mapping[str, Any], where: str, faults: list[str]) -> Mapping[str, Any]:
    """Return a config without the keys that it lists as defaults of another version, which from_config ignores."""
    if DEFAULTED not in written:
        return written
    unwritten = written[DEFAULTED]
    if not isinstance(unwritten, list) or not all(isinstance(key, str) for key in unwritten):
        faults.append(f"{where}: {DEFAULTED}: expected a list of keys, got {unwritten!r:.60}")
        return written
    return {key: value for key, value in written.items() if key != DEFAULTED and key not in unwritten}


def fitting_steps(settings: Mapping[str, Any], tried: Iterable[int], *, sampler: str | None = None) -> int:
    """Return the first number of steps for which the scheduler, or `sampler`, has a table: distilled models allow only a few.

    Raises the first error if there is no table for any of them.
    """
    first: SdruntimeError | None = None
    trained = settings.get("num_train_timesteps")
    if isinstance(trained, int):
        tried = sorted({max(1, min(steps, trained)) for steps in tried}, reverse=True)
    for steps in tried:
        try:
            compile_table(settings, steps=steps, sampler=sampler)
        except SdruntimeError as error:
            first = first or error
        else:
            return steps
    assert first is not None
    raise first


def _set(settings: dict[str, Any], written: Mapping[str, Any], key: str, value: Any) -> None:
    """Change a setting. A key that the file lacks stays marked as a default, which from_config does not pass to another class."""
    settings[key] = value
    if key not in written:
        settings[DEFAULTED] = [*settings.get(DEFAULTED, ()), key]


def _shown(written: Mapping[str, Any], key: str) -> str:
    return repr(written[key]) if key in written else "(missing)"
