"""A thousand images on one pipeline: what it holds after them is what it held after a hundred."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from pathlib import Path

from trt.machine import Machine

from sdruntime.backends.trt.engine import KEPT_BINDINGS
from sdruntime.backends.trt.frame import KEPT_FRAMES
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

SIZES = ((64, 64), (128, 64), (64, 128), (128, 128), (192, 64))
SAMPLERS = ("ddim", "euler_a", "dpmpp_2m", "unipc")
# (size, sampler, prompts at a time, rescale): a rescaled guidance takes the loop of NumPy. 60 of them come again and again.
ASKED = [
    (size, sampler, count, 0.7 if count == 3 else 0.0)
    for count, (size, sampler) in itertools.product((1, 2, 3), zip(SIZES * 4, sorted(SAMPLERS * 5), strict=True))
]


def held(here: Machine, pipe: Pipeline) -> Counter[str]:
    """Bytes and things on the device, page-locked bytes, and execution contexts."""
    gc.collect()
    found: Counter[str] = Counter()
    for allocation in here.gpus.memory.live():
        found[f"{allocation.label} {'pinned' if allocation.device is None else 'device'} bytes"] += allocation.size
        found["allocations"] += 1
    for thing in here.gpus.handles.values():
        found[type(thing).__name__] += 1
    for engine in (pipe.engines.opened or {}).values():
        found["contexts"] += len(engine._plan.engine._behaviour.contexts)  # type: ignore[attr-defined]
        found["bindings"] += len(engine._bindings) + len(engine._apart)  # type: ignore[attr-defined]
    return found


def test_a_thousand_pictures_take_what_a_hundred_take(here: Machine, small_folder: Path) -> None:
    assert len(SIZES) > max(KEPT_BINDINGS, KEPT_FRAMES)  # so that both are given up and made again
    assert len(ASKED) == 60
    marks = {}
    with Pipeline.open(small_folder) as pipe:
        for number, (size, sampler, count, rescale) in zip(range(1, 1001), itertools.cycle(ASKED), strict=False):
            common = {"seed": number, "steps": 1 + number % 2, "size": size, "sampler": sampler, "rescale": rescale}
            requests = [Request(prompt=prompt, **common) for prompt in (f"cat {number % 7}", "a dog", "red")[:count]]
            images = pipe(requests).pixels
            assert [image.shape for image in images] == [(size[1], size[0], 3)] * count
            if number in (100, 1000):
                marks[number] = held(here, pipe)
    assert marks[1000] == marks[100]
    assert marks[100]["_Executable"] >= 1
