"""Real activations: what a few prompts, drawn by sdruntime's own pipeline over the float32 ONNX, put into each component.

The engines of that pipeline are the bundle's ONNX files themselves. What the UNet is fed is kept at each step, what the VAE
decodes is what the UNet made, and there are 4-sigma latents and a random picture as well. All of it follows from seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdexport.errors import EnvironmentFault
from sdexport.measure import MISSING, Feed, magnitudes
from sdexport.weights import Array
from sdruntime import latent
from sdruntime.bundle import Bundle
from sdruntime.engine import AroundEngine, Engine, EngineOptions, Shared
from sdruntime.manifest import EngineSpec
from sdruntime.pipeline import Pipeline

PROMPTS = (
    "a photograph of an old fisherman mending a net, evening light, detailed face",
    "a small red circle on the left on a blue background",
    "(masterpiece:1.4), city street at night in the rain, neon signs, reflections, 4k, highly detailed, wide angle",
)
STEPS = 4  # of each prompt, over the whole schedule
_SIGMAS = 4.0
_SEED = 20
_WIDEST = 1 << 16
_LIST = "feeds.json"


def check_environment() -> None:
    """Raises EnvironmentFault where activations cannot be measured here; before the long work."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        raise EnvironmentFault(MISSING.format("it is not installed"))


def probe(folder: Path) -> None:
    """Draw with the float32 bundle in `folder`, and write what its components were fed beside their ONNX.

    Raises ExportError for numbers that are not finite, with the component, the node and the prompt.
    """
    bundle = Bundle.open(folder)
    with _Probe(_with_engines(bundle)) as pipe:
        latents, pictures = [], []
        for number, prompt in enumerate(PROMPTS):
            pipe.prompt = f"prompt {prompt[:30]!r}…"
            stream = pipe.stream(prompt, seed=_SEED + number, steps=STEPS)
            pipe.steps = stream.jobs[0].run.steps
            for state in stream:
                pipe.step = state.step
            latents.append(stream.jobs[0].run.x)
            pictures += pipe.decode(latents[-1:])
            pipe.step = 0
        random = np.random.default_rng(_SEED)
        pipe.prompt = f"latents of {_SIGMAS:g} sigma"
        pipe.decode([(_SIGMAS * random.standard_normal(latents[0].shape)).astype(np.float32)])
        pipe.prompt = "a picture that the VAE decoded"
        _encode(pipe, np.clip(pictures[0], -1, 1))
        pipe.prompt = "a random picture"
        _encode(pipe, random.uniform(-1, 1, pictures[0].shape).astype(np.float32))
        for component, feeds in pipe.feeds.items():
            _save(folder / component, feeds)


def load_feeds(folder: Path) -> list[Feed]:
    """The feeds that lie beside a component's ONNX."""
    labels = json.loads((folder / _LIST).read_text(encoding="utf-8"))
    feeds = []
    for index, label in enumerate(labels):
        with np.load(folder / f"{index}.npz") as arrays:
            feeds.append(Feed(label=label, arrays=dict(arrays)))
    return feeds


def _save(folder: Path, feeds: Sequence[Feed]) -> None:
    for index, feed in enumerate(feeds):
        arrays: dict[str, Any] = dict(feed.arrays)
        np.savez(folder / f"{index}.npz", **arrays)
    (folder / _LIST).write_text(json.dumps([feed.label for feed in feeds]), encoding="utf-8")


def _encode(pipe: _Probe, picture: Array) -> None:
    noise = np.zeros((1, pipe.model.latent_channels, *(side // pipe.model.vae_factor for side in picture.shape[1:])), np.float32)
    latent.encode(picture[None], noise, pipe.engine("vae_encoder"), pipe.model)


def _with_engines(bundle: Bundle) -> Bundle:
    """The bundle, its ONNX files called engines that take any shape."""
    from sdruntime.backends.ort.build import library

    version = library().__version__
    engines = [
        EngineSpec(
            component=name,
            backend="onnxruntime",
            version=version,
            target="cpu",
            precision="fp32",
            files=spec.files,
            profiles=(dict.fromkeys(spec.dimensions, (1, 1, _WIDEST)),),
        )
        for name, spec in bundle.manifest.components.items()
    ]
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, engines=tuple(engines)))


class _Probe(Pipeline):
    """A pipeline that remembers what its engines were fed, and under which prompt and step."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, backend="onnxruntime", options=EngineOptions())
        self._watched: dict[str, _Watched] = {}
        self.feeds: dict[str, list[Feed]] = {}
        self.prompt, self.step, self.steps = "", 0, STEPS

    def __enter__(self) -> _Probe:
        super().__enter__()
        return self

    def engine(self, component: str, *, rows: int = 1, **dims: int) -> Engine:
        """The files of all are called model.onnx, so they are told apart by their component."""
        from sdruntime.backends.ort.engine import open_engine

        if component not in self._watched:
            spec = next(each for each in self.bundle.manifest.engines if each.component == component)
            self._watched[component] = _Watched(self, open_engine(self.bundle, spec, EngineOptions(), Shared()))
        return self._watched[component]

    def close(self) -> None:
        for engine in self._watched.values():
            engine.close()
        self._watched.clear()
        super().close()


class _Watched(AroundEngine):
    """An engine whose calls are remembered; one that gives what is not finite ends the probe."""

    def __init__(self, probe: _Probe, engine: Engine) -> None:
        super().__init__(engine)
        self._probe = probe

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        probe, name = self._probe, self._engine.spec.component
        label = f"{probe.prompt}, step {probe.step + 1} of {probe.steps}" if name == "unet" else probe.prompt
        feed = Feed(label=label, arrays={key: array.copy() for key, array in feeds.items()})
        probe.feeds.setdefault(name, []).append(feed)
        found = self._engine(feeds)
        if not all(np.isfinite(array).all() for array in found.values()):
            magnitudes(probe.bundle.folder / self._engine.component.onnx, [feed], where=name)  # which names the node
        return found
