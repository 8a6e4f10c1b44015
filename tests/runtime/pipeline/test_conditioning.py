from __future__ import annotations

from pathlib import Path
from typing import Any

import bundles
import pytest
from bundles import with_fake_engines

from sdruntime.backends.fake.engine import FakeEngine
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import EngineError, SettingError, Unsupported
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.text.conditioning import KEPT, Conditioner

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


def shapes(pipe: Pipeline, **settings: Any) -> list[tuple[int, ...]]:
    (job,) = pipe.stream(size=SIZE, seed=1, prompt_syntax="a1111", **settings).jobs
    return [row["encoder_hidden_states"].shape for row in job.rows]


def test_the_shorter_text_is_filled_with_empty_chunks(bundle: Bundle) -> None:
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe:
        assert shapes(pipe, prompt="a BREAK b BREAK c", negative="x") == [(231, 8), (231, 8)]
        assert encoded(pipe) == 3 + 1 + 1
        assert shapes(pipe, prompt="a", negative="x") == [(77, 8), (77, 8)]
        assert encoded(pipe) == 6
        assert shapes(pipe, prompt="a", negative="a BREAK b") == [(154, 8), (154, 8)]
        assert encoded(pipe) == 8  # the empty chunk is kept


def test_what_is_kept_depends_on_all_that_changes_it(bundle: Bundle) -> None:
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe:
        for count, settings in enumerate(
            [{}, {"prompt_syntax": "a1111"}, {"prompt_syntax": "a1111", "emphasis": "no-norm"}], start=1
        ):
            for _ in range(2):
                pipe.stream("a (cat)", guidance=1.0, size=SIZE, seed=1, **settings)
                assert encoded(pipe) == count


def test_chunks_are_kept_by_number(bundle: Bundle) -> None:
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe:
        long = " BREAK ".join("abcdefghijklmnopqrstuvwxyzabcdef")  # 32 chunks
        for prompt in ("x", long, f"a{long}"):
            pipe.stream(prompt, prompt_syntax="a1111", guidance=1.0, size=SIZE, seed=1)
        assert encoded(pipe) == 65
        pipe.stream([long, f"a{long}"], prompt_syntax="a1111", guidance=1.0, size=SIZE, seed=1)
        assert encoded(pipe) == 65
        pipe.stream("x", prompt_syntax="a1111", guidance=1.0, size=SIZE, seed=1)
        assert encoded(pipe) == 66


def test_a_prompt_that_changes_to_too_many_chunks_is_refused(bundle: Bundle) -> None:
    options = "|".join("abcdefghijklmnopqrstuvwxyz0123")
    request = Request(prompt=f"[{options}] " + "BREAK x " * 19, steps=40, guidance=1.0, prompt_syntax="a1111", size=SIZE)
    told = r"changes to 30 texts of up to 20 chunks; the maximum is 512 chunks in all"
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe, pytest.raises(SettingError, match=told):
        pipe.jobs([request])


def test_rows_change_at_their_steps(bundle: Bundle) -> None:
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe:
        stream = pipe.stream("[a:b:2]", negative="[x|y BREAK z]", steps=4, prompt_syntax="a1111", size=SIZE, seed=1)
        (job,) = stream.jobs
        assert sorted(job.changes) == [1, 2, 3]
        assert {row["encoder_hidden_states"].shape for rows in job.changes.values() for row in rows} == {(154, 8)}
        for _ in stream:
            pass


def test_an_engine_for_one_chunk_names_the_way_to_more(bundle: Bundle) -> None:
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", chunks="1")):
        pass
    told = (
        r"sequence 77; requested is 64x64, sequence 154\n"
        r"the prompt takes 2 chunks of 75 tokens: shorten it, or build one: sdruntime build .* --size 64x64 --chunks 1:2$"
    )
    with Pipeline.open(bundle.folder, backend="fake") as pipe, pytest.raises(EngineError, match=told):
        pipe("a BREAK b", prompt_syntax="a1111", size=SIZE, steps=1)


def test_a_bundle_without_the_states_of_the_layers_refuses_clip_skip(bundle: Bundle) -> None:
    message = "clip_skip: the bundle was exported without the text encoder's inner layers: export it again"
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe, pytest.raises(Unsupported, match=message):
        pipe("a cat", clip_skip=1, steps=1, size=SIZE)


@pytest.mark.parametrize(
    ("layers", "dtype", "most"),
    [
        (("batch", 2, 77, 8), "float32", 2),
        (("batch", "batch", 77, 8), "float32", 0),
        (("batch", 2, 77, 4), "float32", 0),
        (("batch", 77, 8), "float32", 0),
        (("batch",), "float32", 0),
        (("batch", 2, 77, 8), "int32", 0),
    ],
)
def test_the_states_of_the_layers_are_those_of_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: tuple[Any, ...], dtype: Any, most: int
) -> None:
    inputs, outputs = bundles.TENSORS["text_encoder"]
    monkeypatch.setitem(
        bundles.TENSORS, "text_encoder", (inputs, (*outputs, bundles.TensorSpec(name="layers", dtype=dtype, shape=layers)))
    )
    assert Conditioner.open(bundles.make_bundle(tmp_path / "bundle")).most_skipped == most
