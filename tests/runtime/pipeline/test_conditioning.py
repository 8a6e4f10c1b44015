from __future__ import annotations

import pytest
from bundles import with_fake_engines

from sdruntime.backends.fake.engine import FakeEngine
from sdruntime.bundle.bundle import Bundle
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.text.conditioning import KEPT

SIZE = (64, 64)


def encoded(pipe: Pipeline) -> int:
    """How many texts its encoder was given so far."""
    engine = pipe.engine("text_encoder")
    assert isinstance(engine, FakeEngine)
    return sum(call["batch"] for call in engine.calls)


def test_a_text_is_encoded_once_while_the_pipeline_is_open(bundle: Bundle) -> None:
    pipe = Pipeline.open(with_fake_engines(bundle), backend="fake")
    with pipe:
        pipe("a cat", negative="grey", steps=1, size=SIZE, seed=1)
        assert encoded(pipe) == 2
        pipe(["a cat", "a dog", "grey"], negative="grey", steps=2, size=SIZE, seed=2)
        assert encoded(pipe) == 3
    with pipe:
        pipe("a cat", negative="grey", steps=1, size=SIZE, seed=1)
        assert encoded(pipe) == 2


def test_no_caller_can_spoil_what_is_kept(bundle: Bundle) -> None:
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe:
        stream = pipe.stream("a cat", steps=1, size=SIZE, seed=1)
        with pytest.raises(ValueError, match="read-only"):
            stream.jobs[0].rows[-1]["encoder_hidden_states"][:] = 1


def test_the_texts_that_were_asked_for_last_are_kept(bundle: Bundle) -> None:
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe:
        pipe.stream([f"cat {k}" for k in range(KEPT + 1)], guidance=1.0, size=SIZE, seed=1)
        pipe.stream("cat 1", guidance=1.0, size=SIZE, seed=1)
        assert encoded(pipe) == KEPT + 1
        pipe.stream("cat 0", guidance=1.0, size=SIZE, seed=1)
        pipe.stream("cat 1", guidance=1.0, size=SIZE, seed=1)
        assert encoded(pipe) == KEPT + 2
        pipe.stream("cat 2", guidance=1.0, size=SIZE, seed=1)
        assert encoded(pipe) == KEPT + 3
