"""The sampler step as a component (an ONNX model in the bundle), for sampling loops that stay on a GPU.

A step of any table (sdruntime.sampling.table), guidance, and the scaled input of the next UNet call are all weighted sums. Hence

    [next_state; sample] = weights · [state; uncond; cond; noise]

for each job. `state` has the last x and the last model outputs in SLOTS rows (unused rows have weight 0), and in the last row the
estimate of the finished image. `cells` is the number
of values in one image's latents. `sample` is output twice, for the two UNet rows that guidance needs.
"""

from __future__ import annotations

from sdruntime.bundle.manifest import TensorSpec

NAME = "step"
SLOTS = 12
CLEAN = SLOTS - 1  # the row of the state with the estimate of the finished image
SOURCES = SLOTS + 3  # plus uncond, cond, noise
UNCOND, COND, NOISE = SLOTS, SLOTS + 1, SLOTS + 2
TARGETS = SLOTS + 1  # plus sample
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
