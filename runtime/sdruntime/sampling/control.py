"""A ControlNet's part in a job: its image, and how much it counts in each model call."""

from __future__ import annotations

from dataclasses import dataclass

from sdruntime.arrays import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ControlInput:
    """What a ControlNet gets beside the UNet's inputs.

    `component`: the ControlNet. `image` float32 [3, H, W] in [0, 1]. `factors` float32 [calls, residuals]: how much each of its
    residuals counts in each model call; zeros where it does not act. `conditional_only`: it acts on the conditional row alone.
    `type` float32 [types]: of the image, for a ControlNet-Union: 1 for its type, 0 for the others.
    """

    component: str
    image: Array
    factors: Array
    conditional_only: bool = False
    type: Array | None = None
