"""diffusers' own pipeline of a checkpoint, over networks that the caller lends it one at a time.

What it opens by itself are the tokenizers and the scheduler. Its networks have the modules of diffusers and transformers and no
numbers: when one is called, the call goes to the lent one. So an image costs no more memory than its largest network, and what is
between the networks (tokens, guidance, scheduler, the VAE's scaling) is diffusers' code, not ours.
"""

from __future__ import annotations

import contextlib
import functools
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
from sdexport.checkpoint.tokenizer import NAMES as TOKENIZER_FILES
from sdexport.errors import ExportError
from sdruntime.arrays import Array
from sdruntime.errors import NotFinite
from sdruntime.verification.golden import ReferenceImage

if TYPE_CHECKING:
    from torch import nn

Lend = Callable[[str], "nn.Module"]  # a component's name -> its wrapper of sdexport.families.modules, with its weights

# schedulers that do not take their noise straight from a generator, and the one whose image is used for them
STAND_INS = {"DPMSolverSDEScheduler": ("euler", "EulerDiscreteScheduler")}


def stand_in(checkpoint: Checkpoint) -> str | None:
    """The sampler of the reference images, where it is not the checkpoint's own."""
    return STAND_INS.get(checkpoint.scheduler["_class_name"], (None, ""))[0]


def original_images(checkpoint: Checkpoint, drawings: Sequence[ReferenceImage], lend: Lend) -> list[Array]:
    """Generate the reference images, uint8 [H, W, 3], with diffusers' pipeline in float32 on the CPU.

    Those of one size and number of steps go together. Raises NotFinite, and ExportError where diffusers refuses the checkpoint.
    """
    found: list[Array] = []
    with _quiet():
        pipe = _pipeline(checkpoint, lend)
        for (steps, guidance, (width, height)), group in groupby(drawings, lambda each: (each.steps, each.guidance, each.size)):
            found += _images(pipe, list(group), steps=steps, guidance=guidance, width=width, height=height)
    return found


def _images(pipe: Any, drawings: list[ReferenceImage], *, steps: int, guidance: float, width: int, height: int) -> list[Array]:
    import torch

    name = type(pipe).__name__
    try:
        images = pipe(
            [drawing.prompt for drawing in drawings],
            negative_prompt=[drawing.negative for drawing in drawings],
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(drawing.seed) for drawing in drawings],
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

    kind = getattr(diffusers, checkpoint.index["_class_name"])
    given: dict[str, Any] = _hollow_networks(checkpoint, lend)
    given |= dict.fromkeys({"safety_checker", "feature_extractor", "image_encoder"} & set(kind._optional_components))
    given |= {"add_watermarker": False} if "text_encoder_2" in checkpoint.parts else {"requires_safety_checker": False}
    _, other = STAND_INS.get(checkpoint.scheduler["_class_name"], (None, ""))
    if other:
        given["scheduler"] = getattr(diffusers, other).from_config(dict(checkpoint.scheduler))
    with tempfile.TemporaryDirectory() as place:
        _write_checked(checkpoint, Path(place))
        pipe = kind.from_pretrained(place, torch_dtype=torch.float32, local_files_only=True, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _write_checked(checkpoint: Checkpoint, place: Path) -> None:
    """What diffusers opens by itself, and no more than was checked: it imports the classes that a model_index.json names."""
    own = [*checkpoint.parts, *checkpoint.tokenizers, "scheduler"]
    index = {
        key: value for key, value in checkpoint.index.items() if key in ("_class_name", "force_zeros_for_empty_prompt", *own)
    }
    (place / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    files = [f"{name}/{file}" for name in checkpoint.tokenizers for file in TOKENIZER_FILES]
    for path in (*files, SCHEDULER):
        data = checkpoint.source.file(path)
        if data is not None:
            (place / path).parent.mkdir(exist_ok=True)
            (place / path).write_bytes(data)


def _hollow_networks(checkpoint: Checkpoint, lend: Lend) -> dict[str, nn.Module]:
    """The checkpoint's modules without numbers; their calls go to the lent wrappers."""
    from diffusers import AutoencoderKL

    from sdexport.families.modules import WRAPPERS

    wrappers = {"unet": "Unet", "text_encoder": "TextEncoder"}
    if "text_encoder_2" in checkpoint.parts:
        wrappers |= {"text_encoder": "PenultimateTextEncoder", "text_encoder_2": "PooledTextEncoder"}
    hollow: dict[str, nn.Module] = {}
    for name, wrapper in wrappers.items():
        module = _hollow(functools.partial(_inner, WRAPPERS[wrapper], checkpoint.parts[name].config))
        module.forward = _lent(lend, name, "weights")
        hollow[name] = module
    vae = _hollow(lambda: AutoencoderKL.from_config(dict(checkpoint.parts["vae"].config)))
    for part in ("post_quant_conv", "decoder"):
        if getattr(vae, part) is not None:
            getattr(vae, part).forward = _lent(lend, "vae_decoder", part)
    return hollow | {"vae": vae}


def _inner(wrapper: Callable[[Mapping[str, Any]], Any], config: Mapping[str, Any]) -> Any:
    return wrapper(config).weights


def _lent(lend: Lend, name: str, part: str) -> Callable[..., Any]:
    return lambda *args, **named: getattr(lend(name), part)(*args, **named)


def _hollow(make: Callable[[], Any]) -> Any:
    """A module that takes no memory: each weight is one zero, seen in its shape, float32 on the CPU."""
    import torch

    with torch.device("meta"):
        module = make().eval()
    zero = torch.zeros(())
    module.load_state_dict({name: zero.expand(each.shape) for name, each in module.state_dict().items()}, assign=True)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and the advice of diffusers; what it changes on opening, `Checkpoint.changes` says."""
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
