"""Record real activations: the inputs of each component while sdruntime's pipeline generates a few images with the float32 ONNX.

The engines of that pipeline run the bundle's ONNX files row by row and measure their values. The UNet's inputs are recorded at
each step, with and without the prompt. The VAE decodes the UNet's latents and 4-sigma latents, and encodes a decoded image and a
random one. Everything follows from seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sdexport.checkpoint.weights.safetensors import Array
from sdexport.errors import EnvironmentFault
from sdexport.precision.activations import MISSING, Activations, Feed, MeasuredGraph
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.interface import control_types
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.bundle.roles import IMAGE_ENCODER, PREVIEW, of_kind, short_name
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.image_prompt import ImagePrompt
from sdruntime.pipeline.vae import latents as latent
from sdruntime.verification.inputs import patches, task_settings
from sdruntime.verification.verify import onnx_spec

PROMPTS = (
    "a photograph of an old fisherman mending a net, evening light, detailed face",
    "a small red circle on the left on a blue background",
    "(masterpiece:1.4), city street at night in the rain, neon signs, reflections, 4k, highly detailed, wide angle",
)
STEPS = 4  # per prompt, over the whole schedule
PARTS = len(PROMPTS) * (STEPS + 1) + 3
_SIGMAS = 4.0
_SEED = 20
_LIST = "activations.json"
_OUTPUT = "output."  # prefix of an output's number in the file of a feed


def check_environment() -> None:
    """Raise EnvironmentFault before the long work if activations cannot be measured on this machine."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        raise EnvironmentFault(MISSING.format("it is not installed"))


def probe(folder: Path) -> Iterator[int]:
    """Generate images with the float32 bundle in `folder`, and write the activations of its components beside their ONNX.

    Yield how many of PARTS are done: each denoising step, each decoding and each encoding is one.

    Raises ExportError if a number is not finite, with the component, the node and the prompt.
    """
    bundle = Bundle.open(folder)
    probed = _Probe(bundle)
    done = itertools.count(1)
    with Pipeline.over(bundle, probed.engine) as pipe:
        latents, images = [], []
        for number, prompt in enumerate(PROMPTS):
            prompted = f"prompt {prompt[:30]!r}…"
            probed.at = prompted
            settings = task_settings(pipe.task, pipe.model.default_size[::-1], _SEED + number, factor=pipe.model.vae_factor)
            # DDIM calls the UNet once per step
            stream = pipe.stream(prompt, seed=_SEED + number, steps=STEPS, sampler="ddim", **settings)
            probed.at = f"{prompted}, step 1 of {STEPS}"
            for state in stream:
                probed.at = f"{prompted}, step {state.step + 1} of {STEPS}"
                if PREVIEW in bundle.manifest.components:
                    pipe.preview(state.jobs, "tiny")
                yield next(done)
            latents.append(stream.jobs[0].run.x)
            if number == 0:
                _control(pipe, probed, prompt, settings)
                _image_prompt(pipe, probed, prompt, settings)
            probed.at = prompted
            images += pipe.decode(latents[-1:])
            yield next(done)
        random = np.random.default_rng(_SEED)
        probed.at = f"latents of {_SIGMAS:g} sigma"
        pipe.decode([(_SIGMAS * random.standard_normal(latents[0].shape)).astype(np.float32)])
        yield next(done)
        probed.at = "an image that the VAE decoded"
        _encode(pipe, np.clip(images[0], -1, 1))
        yield next(done)
        probed.at = "a random image"
        _encode(pipe, random.uniform(-1, 1, images[0].shape).astype(np.float32))
        yield next(done)
    for component, engine in probed.engines.items():
        save_activations(folder / component, engine.measuring.activations)


def load_activations(folder: Path) -> Activations:
    """Return the activations stored beside a component's ONNX."""
    document = json.loads((folder / _LIST).read_text(encoding="utf-8"))
    feeds = []
    for index, label in enumerate(document["labels"]):
        with np.load(folder / f"{index}.npz") as packed:
            arrays = {name: array for name, array in packed.items() if not name.startswith(_OUTPUT)}
            outputs = tuple(packed[f"{_OUTPUT}{number}"] for number in range(len(packed.files) - len(arrays)))
        feeds.append(Feed(label=label, arrays=arrays, outputs=outputs))
    return Activations(feeds=tuple(feeds), sizes=document["sizes"])


def save_activations(folder: Path, activations: Activations) -> None:
    """Write the activations beside a component's ONNX: one file per feed, and a list with the values' sizes."""
    for index, feed in enumerate(activations.feeds):
        outputs = {f"{_OUTPUT}{number}": array for number, array in enumerate(feed.outputs)}
        arrays: dict[str, Any] = {**feed.arrays, **outputs}
        np.savez(folder / f"{index}.npz", **arrays)
    document = {"labels": [feed.label for feed in activations.feeds], "sizes": activations.sizes}
    (folder / _LIST).write_text(json.dumps(document), encoding="utf-8")


def _control(pipe: Pipeline, probed: _Probe, prompt: str, settings: dict[str, Any]) -> None:
    """Generate an image with each ControlNet and each T2I-Adapter of the bundle."""
    for number, name in enumerate(of_kind(pipe.bundle.manifest.components, "ControlNet", "T2I-Adapter")):
        image = patches(pipe.model.default_size[::-1], _SEED + number)
        kind: dict[str, Any] = {} if control_types(pipe.bundle.manifest.components[name]) is None else {"type": 0}
        probed.at = f"prompt {prompt[:30]!r}… with {name}"
        control = Control(image=image, net=short_name(name), **kind)
        for _ in pipe.stream(prompt, seed=_SEED, steps=STEPS, sampler="ddim", control=control, **settings):
            pass


def _image_prompt(pipe: Pipeline, probed: _Probe, prompt: str, settings: dict[str, Any]) -> None:
    """Generate an image with the IP-Adapter of the bundle, if it has one, and one in half of which the image counts."""
    if IMAGE_ENCODER not in pipe.bundle.manifest.components:
        return
    for how, mask in (("an image prompt", None), ("a masked image prompt", np.array([[0, 255]], np.uint8))):
        image = ImagePrompt(image=patches((224, 224), _SEED), mask=mask)
        probed.at = f"prompt {prompt[:30]!r}… with {how}"
        for _ in pipe.stream(prompt, seed=_SEED, steps=STEPS, sampler="ddim", image_prompt=image, **settings):
            pass


def _encode(pipe: Pipeline, image: Array) -> None:
    noise = np.zeros((1, pipe.model.latent_channels, *(side // pipe.model.vae_factor for side in image.shape[1:])), np.float32)
    latent.encode(image[None], noise, pipe.engine("vae_encoder"), pipe.model)


class _Probe:
    """The measured engines of a bundle, and the current prompt and step, for messages."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.at = bundle, ""
        self.engines: dict[str, _MeasuredEngine] = {}

    def engine(self, component: str) -> _MeasuredEngine:
        if component not in self.engines:
            self.engines[component] = _MeasuredEngine(self, component)
        return self.engines[component]


class _MeasuredEngine:
    """A component of the bundle as a `sdruntime.backends.base.engine.Engine` of one row per call."""

    def __init__(self, probe: _Probe, name: str) -> None:
        self._probe, self.component = probe, probe.bundle.manifest.components[name]
        spec = onnx_spec(probe.bundle.manifest, name, "0")
        self.spec: EngineSpec = dataclasses.replace(
            spec, profiles=tuple({**profile, "batch": (1, 1, 1)} for profile in spec.profiles)
        )
        self.measuring = MeasuredGraph(probe.bundle.folder / self.component.onnx, where=name)

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self.measuring.run({name: array.copy() for name, array in feeds.items()}, label=self._probe.at)
        return {spec.name: output for spec, output in zip(self.component.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Keep the measurements: `probe` saves them after the pipeline has closed."""

    def __enter__(self) -> _MeasuredEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
