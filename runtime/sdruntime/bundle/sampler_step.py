"""The sampler's step as a component of its own, for loops that stay on a GPU: what comes of it is in the bundle as ONNX.

A step of any table is a weighted sum (sdruntime.sampling.table), guidance is one too, and so is the next call's scaled
input. Hence

    [next_state; sample] = weights · [state; uncond; cond; noise]

for each job, with `state` the last x and the last model outputs in SLOTS rows (unused ones with weight 0). `cells` are the
numbers of one image's latents; `sample` is given twice, for the two rows that guidance takes.
"""

from __future__ import annotations

from sdruntime.bundle.manifest import TensorSpec

NAME = "step"
SLOTS = 12
SOURCES = SLOTS + 3  # and uncond, cond, noise
UNCOND, COND, NOISE = SLOTS, SLOTS + 1, SLOTS + 2
TARGETS = SLOTS + 1  # and sample
SAMPLE = SLOTS


def _spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


INPUTS = (
    _spec("state", "jobs", SLOTS, "cells"),
    _spec("uncond", "jobs", "cells"),
    _spec("cond", "jobs", "cells"),
    _spec("noise", "jobs", "cells"),
    _spec("weights", "jobs", TARGETS, SOURCES),
)
OUTPUTS = (
    _spec("next_state", "jobs", SLOTS, "cells"),
    _spec("sample", "jobs", "cells"),
    _spec("sample_again", "jobs", "cells"),
)
