"""A pipeline over engines that compute a little, row by row, and that a test can look into, hold up and spoil."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bundles import TENSORS, make_bundle

from sdruntime.arrays import Array
from sdruntime.backends.base.feeds import fill_optional_inputs
from sdruntime.backends.fake.engine import FakeEngine
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

Feeds = Mapping[str, Array]
SIZE = (64, 64)


class Computing(FakeEngine):
    """Calls `before(feeds)`, works, and lets `after(outputs)` change what came out."""

    def __init__(self, component: str, work: Callable[[Feeds], dict[str, Array]], *, most: int) -> None:
        inputs, outputs = TENSORS[component]
        self._work = work
        self.before: Callable[[Feeds], object] = lambda feeds: None
        self.after: Callable[[dict[str, Array]], object] = lambda outputs: None
        spec = ComponentSpec(
            files=(f"{component}/model.onnx",), config=f"{component}/config.json", inputs=inputs, outputs=outputs
        )
        ranges = {"batch": (1, 1, most), "sequence": (77, 77, 77)}
        engine = EngineSpec(
            component=component,
            backend="fake",
            version="1",
            target="cpu",
            precision="fp32",
            files=(f"engines/{component}.json",),
            profiles=({name: ranges.get(name, (1, 8, 512)) for name in spec.dimensions},),
        )
        super().__init__(engine, spec, fill=0.0, factor=8)

    def __call__(self, feeds: Feeds) -> Mapping[str, Array]:
        super().__call__(feeds)
        self.before(feeds)
        outputs = self._work(fill_optional_inputs(self.component, self.calls[-1], feeds))
        self.after(outputs)
        return outputs

    @property
    def rows(self) -> list[int]:
        """Of each call so far."""
        return [call["batch"] for call in self.calls]


def encode(feeds: Feeds) -> dict[str, Array]:
    tokens = feeds["input_ids"].astype(np.float32)[..., None] / 600
    return {"last_hidden_state": np.ascontiguousarray(tokens * np.linspace(-1, 1, 8, dtype=np.float32))}


def predict(feeds: Feeds) -> dict[str, Array]:
    text = (feeds["encoder_hidden_states"] ** 2).mean(axis=(1, 2), dtype=np.float64)
    shift = np.sin(feeds["timestep"] / 500) + text
    return {"out_sample": np.tanh(feeds["sample"] * 0.5 + shift[:, None, None, None]).astype(np.float32)}


def decode(feeds: Feeds) -> dict[str, Array]:
    return {"sample": np.tanh(feeds["latent_sample"][:, :3] * 0.1).repeat(8, axis=2).repeat(8, axis=3)}


def begin(feeds: Feeds) -> dict[str, Array]:
    mean = feeds["sample"][:, [0, 1, 2, 0], ::8, ::8]
    return {"latent_mean": np.ascontiguousarray(mean), "latent_logvar": np.full_like(mean, -2)}


@dataclass
class Parts:
    """The engines of one pipeline; `most`: rows of the largest UNet call."""

    folder: Path
    most: int = 16
    engines: dict[str, Computing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        works = {"text_encoder": encode, "unet": predict, "vae_decoder": decode, "vae_encoder": begin}
        self.engines = {name: Computing(name, work, most=self.most) for name, work in works.items()}

    @property
    def unet(self) -> Computing:
        return self.engines["unet"]

    def at_call(self, number: int, act: Callable[[], object]) -> None:
        """Do something in the middle of the UNet's call `number`, counted from 1."""

        def before(feeds: Feeds) -> None:
            if len(self.unet.calls) == number:
                act()

        self.unet.before = before

    def pipeline(self) -> Pipeline:
        return Pipeline.over(make_bundle(self.folder), self.engines.__getitem__)


def request_for(seed: int = 1, *, steps: int = 4, sampler: str = "ddim", **settings: Any) -> Request:
    return Request(prompt=f"a cat {seed}", seed=seed, steps=steps, sampler=sampler, **({"size": SIZE} | settings))
