"""A call of the UNet that several requests share, and that an engine fails because of one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from computed import Feeds, Parts, request_for

from sdruntime.errors import SdruntimeError
from sdruntime.serving.batcher import Batcher, ImageFuture

WAIT = 60  # seconds after which a test is given up


@pytest.mark.parametrize("kind", [SdruntimeError, MemoryError, RuntimeError])
def test_a_call_that_one_job_makes_fail_ends_that_job_alone(tmp_path: Path, kind: type[Exception]) -> None:
    parts = Parts(tmp_path / "bundle")
    with parts.pipeline() as pipe:
        alone = [pipe(request_for(k, steps=5)).images[0].pixels for k in (1, 3)]
        parts.unet.calls.clear()

        def fail(feeds: Feeds) -> None:
            if len(parts.unet.calls) == 1:
                held.extend(batcher.submit(request_for(k, steps=5)) for k in (2, 3))
            elif (np.abs(feeds["encoder_hidden_states"] - bad).max(axis=(1, 2)) == 0).any() and len(parts.unet.calls) >= 3:
                raise kind("the engine cannot take this row")

        bad = pipe.jobs([request_for(2)])[0].rows[-1]["encoder_hidden_states"]
        held: list[ImageFuture] = []
        parts.unet.before = fail
        with Batcher(pipe) as batcher:
            first = batcher.submit(request_for(1, steps=5))
            np.testing.assert_array_equal(first.result(WAIT).pixels, alone[0])
            with pytest.raises(kind, match="cannot take this row"):
                held[0].result(WAIT)
            np.testing.assert_array_equal(held[1].result(WAIT).pixels, alone[1])
