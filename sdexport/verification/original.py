"""Generate the reference images with diffusers' own pipeline, with networks that the caller lends one at a time.

The pipeline opens the tokenizers and the scheduler itself. Its networks are modules without weights whose calls are forwarded to
the lent ones. So an image needs the memory of its largest network only, and everything between the networks (tokens, guidance,
scheduler, the VAE's scaling) is diffusers' code, not ours.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdexport.checkpoint.checkpoint import Checkpoint
from sdexport.checkpoint.opening import PATH as SCHEDULER
from sdexport.checkpoint.pipelines import LOW_RES, MOST_NOISE, SCORE
from sdexport.checkpoint.tokenizer import NAMES as TOKENIZER_FILES
from sdexport.errors import ExportError
from sdexport.families.components import components
from sdexport.trace.versions import versions
from sdruntime.arrays import Array
from sdruntime.bundle.roles import role
from sdruntime.bundle.tasks import Task
from sdruntime.errors import NotFinite
from sdruntime.pipeline.tasks.upscaling import SCHEDULER as LOW_RES_SCHEDULER
from sdruntime.verification.golden import ReferenceImage
from sdruntime.verification.inputs import task_settings

if TYPE_CHECKING:
    from torch import nn

Lend = Callable[[str], "nn.Module"]  # a component's name -> its wrapper of sdexport.families.modules, with its weights

# schedulers whose noise does not come from the generator alone: the sampler and the scheduler of their reference images
STAND_INS = {"DPMSolverSDEScheduler": ("euler", "EulerDiscreteScheduler")}


def stand_in(checkpoint: Checkpoint) -> str | None:
    """Return the sampler of the reference images; None for the checkpoint's own."""
    return STAND_INS.get(checkpoint.scheduler["_class_name"], (None, ""))[0]


def original_images(checkpoint: Checkpoint, requests: Sequence[ReferenceImage], lend: Lend) -> list[Array]:
    """Generate the reference images, uint8 [H, W, 3], with diffusers' pipeline in float32 on the CPU.

    Images of one size and number of steps share a call. Raises NotFinite, and ExportError if diffusers rejects the checkpoint.
    """
    images: list[Array] = []

    def key(request: ReferenceImage) -> tuple[int, float, tuple[int, int]]:
        return request.steps, request.guidance, request.size

    with _quiet():
        pipe = _pipeline(checkpoint, lend)
        for (steps, guidance, (width, height)), group in groupby(requests, key):
            inputs = _inputs(checkpoint.task, members := list(group), checkpoint.model.vae_factor)
            images += _images(pipe, members, inputs, steps=steps, guidance=guidance, width=width, height=height)
    return images


def _inputs(task: Task | None, requests: list[ReferenceImage], factor: int) -> dict[str, Any]:
    """Return the arguments for the images and masks that a task needs."""
    import torch
    from PIL import Image

    settings = [task_settings(task, request.size, request.seed, factor=factor) for request in requests]
    names = {"image": "image", "mask": "mask_image"}
    arguments: dict[str, Any] = {
        theirs: [Image.fromarray(setting[ours]) for setting in settings] for ours, theirs in names.items() if ours in settings[0]
    }
    if "depth" in settings[0]:
        arguments["depth_map"] = torch.from_numpy(np.stack([setting["depth"] for setting in settings]))
    return arguments | ({"strength": settings[0]["strength"]} if "strength" in settings[0] else {})


def _images(
    pipe: Any,
    requests: list[ReferenceImage],
    inputs: Mapping[str, Any],
    *,
    steps: int,
    guidance: float,
    width: int,
    height: int,
) -> list[Array]:
    import torch

    name = type(pipe).__name__
    # not of every pipeline: the size may be that of the image, and a distilled model takes no negative prompt
    optional = {"width": width, "height": height, "negative_prompt": [request.negative for request in requests]}
    known = inspect.signature(pipe.__call__).parameters
    try:
        images = pipe(
            [request.prompt for request in requests],
            num_inference_steps=steps,
            guidance_scale=guidance,
            **{argument: value for argument, value in optional.items() if argument in known},
            **inputs,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="np",
        ).images
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        raise ExportError(
            f"diffusers' {name} cannot generate an image from this checkpoint ({type(error).__name__}: {error}), so there is "
            "no reference image; --no-verify builds the bundle without reference images"
        ) from error
    if not np.isfinite(images).all():
        raise NotFinite(f"the image of diffusers' {name} is not finite: the checkpoint is damaged, or its scheduler does not fit")
    return list((images * 255).round().astype(np.uint8))


def _pipeline(checkpoint: Checkpoint, lend: Lend) -> Any:
    import diffusers
    import torch

    kind = getattr(diffusers, checkpoint.pipeline)
    arguments: dict[str, Any] = _hollow_networks(checkpoint, lend)
    absent = {"safety_checker", "feature_extractor", "image_encoder", "text_encoder", "tokenizer"} - {
        *checkpoint.parts,
        *checkpoint.tokenizers,
    }
    arguments |= dict.fromkeys(absent & set(kind._optional_components))
    if "text_encoder_2" in checkpoint.parts:
        arguments["add_watermarker"] = False
    elif checkpoint.task != "upscaling":
        arguments["requires_safety_checker"] = False
    if checkpoint.task == "depth":
        arguments |= {"depth_estimator": None, "feature_extractor": None}
    _, other = STAND_INS.get(checkpoint.scheduler["_class_name"], (None, ""))
    if other:
        arguments["scheduler"] = getattr(diffusers, other).from_config(dict(checkpoint.scheduler))
    with tempfile.TemporaryDirectory() as place:
        _write_checked(checkpoint, Path(place))
        pipe = kind.from_pretrained(place, torch_dtype=torch.float32, local_files_only=True, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _write_checked(checkpoint: Checkpoint, place: Path) -> None:
    """Write what diffusers opens itself, and only what was checked: it imports the classes that a model_index.json names."""
    own = [*checkpoint.parts, *checkpoint.tokenizers, "scheduler", *([LOW_RES] if checkpoint.low_res_scheduler else [])]
    kept = ("force_zeros_for_empty_prompt", SCORE, MOST_NOISE, *own)
    index = {key: value for key, value in checkpoint.index.items() if key in kept}
    index |= {"_class_name": checkpoint.pipeline, "_diffusers_version": versions()["diffusers"]}
    (place / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    files = [f"{name}/{file}" for name in checkpoint.tokenizers for file in TOKENIZER_FILES]
    for path in (*files, SCHEDULER, LOW_RES_SCHEDULER):
        data = checkpoint.source.file(path)
        if data is not None:
            (place / path).parent.mkdir(exist_ok=True)
            (place / path).write_bytes(data)


def _hollow_networks(checkpoint: Checkpoint, lend: Lend) -> dict[str, nn.Module]:
    """Return the checkpoint's modules without weights; their calls are forwarded to the lent wrappers."""
    import diffusers

    from sdexport.families.modules import WRAPPERS

    hollow: dict[str, nn.Module] = {}
    for component in components(checkpoint):
        if role(component.name).stage != "vae" and role(component.name).kind not in ("ControlNet", "T2I-Adapter"):
            module = _hollow(functools.partial(_inner, WRAPPERS[component.wrapper], component.config))
            module.forward = _lent(lend, component.name, "weights")
            hollow[component.name] = module
    vae = _hollow(lambda: getattr(diffusers, checkpoint.vae).from_config(dict(checkpoint.parts["vae"].config)))
    for name, parts in {"vae_decoder": ("post_quant_conv", "decoder"), "vae_encoder": ("encoder", "quant_conv")}.items():
        for part in parts:
            if getattr(vae, part, None) is not None:
                getattr(vae, part).forward = _lent(lend, name, part)
    return hollow | {"vae": vae}


def _inner(wrapper: Callable[[Mapping[str, Any]], Any], config: Mapping[str, Any]) -> Any:
    return wrapper(config).weights


def _lent(lend: Lend, name: str, part: str) -> Callable[..., Any]:
    return lambda *args, **named: getattr(lend(name), part)(*args, **named)


def _hollow(make: Callable[[], Any]) -> Any:
    """Return a module that takes no memory: each weight is one float32 zero, expanded to its shape."""
    import torch

    with torch.device("meta"):
        module = make().eval()
    zero = torch.zeros(())
    module.load_state_dict({name: zero.expand(tensor.shape) for name, tensor in module.state_dict().items()}, assign=True)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and advice of diffusers. `Checkpoint.changes` lists what it changes on opening."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
