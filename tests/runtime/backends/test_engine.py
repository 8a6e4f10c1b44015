from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from bundles import TENSORS, make_bundle, with_fake_engines

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions, Shared
from sdruntime.backends.base.feeds import call_rows, split_rows
from sdruntime.backends.fake.engine import FakeEngine, open_engine
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.errors import BundleError, EngineError

COMPONENT = ComponentSpec(
    files=("unet/model.onnx",), config="unet/config.json", inputs=TENSORS["unet"][0], outputs=TENSORS["unet"][1]
)


class Doubling(FakeEngine):
    """A fake that computes: twice its sample."""

    def __call__(self, feeds: dict[str, Array]) -> dict[str, Array]:  # type: ignore[override]
        super().__call__(feeds)
        return {"out_sample": 2 * feeds["sample"]}


def engine(low: int, high: int) -> Doubling:
    spec = EngineSpec(
        component="unet",
        backend="fake",
        version="1",
        target="cpu",
        precision="fp32",
        files=("engines/unet.json",),
        profiles=({"batch": (low, low, high), "height": (1, 1, 16), "width": (1, 1, 16), "sequence": (77, 77, 77)},),
    )
    return Doubling(spec, COMPONENT, fill=0.0, factor=8)


def feeds(rows: int) -> dict[str, Array]:
    return {
        "sample": np.arange(rows * 4 * 2 * 3, dtype=np.float32).reshape(rows, 4, 2, 3),
        "timestep": np.zeros(rows, np.float32),
        "encoder_hidden_states": np.zeros((rows, 77, 8), np.float32),
    }


@pytest.mark.parametrize(
    ("rows", "low", "high", "batches"),
    [
        (3, 1, 8, [3]),
        (8, 1, 8, [8]),
        (9, 1, 8, [8, 1]),
        (5, 2, 2, [2, 2, 2]),
        (1, 4, 4, [4]),
        (7, 3, 4, [4, 3]),
        (5, 1, 1, [1] * 5),
    ],
)
def test_rows_are_split_and_padded_to_what_the_engine_takes(rows: int, low: int, high: int, batches: list[int]) -> None:
    unet = engine(low, high)
    fed = feeds(rows)
    out = call_rows(unet, fed)
    assert [call["batch"] for call in unet.calls] == batches
    np.testing.assert_array_equal(out["out_sample"], 2 * fed["sample"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample": np.zeros((2, 4, 2, 3))},
            r"unet\.sample: expected float32 \[batch, 4, height, width\], got float64 \[2, 4, 2, 3\]",
        ),
        ({"sample": np.zeros((2, 3, 2, 3), np.float32)}, r"\[2, 3, 2, 3\]"),
        ({"timestep": np.zeros(3, np.float32)}, r"unet\.timestep: expected float32 \[batch\], got float32 \[3\]"),
        ({"timestep": np.zeros((), np.float32)}, r"unet\.timestep: expected float32 \[batch\], got float32 \[\]"),
        ({"sample": np.zeros((2, 4, 17, 3), np.float32)}, "height 17, .*but it was built for batch 1 to 2, height 1 to 16"),
        ({"more": np.zeros(2, np.float32)}, "fed sample, timestep, encoder_hidden_states, more, but it takes"),
    ],
)
def test_wrong_feeds_are_refused_with_both_shapes(change: dict[str, Array], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine(1, 2)(feeds(2) | change)


def test_a_file_that_is_no_fake_engine_s_is_named(tmp_path: Path) -> None:
    bundle = with_fake_engines(make_bundle(tmp_path / "bundle"))
    spec = dataclasses.replace(bundle.manifest.engines[0], files=("unet/config.json",))
    with pytest.raises(BundleError, match=r"unet/config\.json: not the file of a fake engine"):
        open_engine(bundle, spec, EngineOptions(), Shared())


@pytest.mark.parametrize(
    ("rows", "batches", "calls"),
    [
        (3, [(1, 1, 8)], [(3, 3)]),
        (9, [(1, 1, 8)], [(8, 8), (1, 1)]),
        (5, [(1, 1, 1), (4, 4, 4)], [(4, 4), (1, 1)]),
        (7, [(2, 2, 2), (4, 4, 4)], [(4, 4), (3, 4)]),
        (1, [(2, 2, 2), (4, 4, 4)], [(1, 2)]),
        (3, [(1, 1, 2), (3, 3, 4)], [(3, 3)]),
    ],
)
def test_a_call_is_padded_to_the_smallest_profile_with_room(
    rows: int, batches: list[tuple[int, int, int]], calls: list[tuple[int, int]]
) -> None:
    assert split_rows(rows, batches) == calls
