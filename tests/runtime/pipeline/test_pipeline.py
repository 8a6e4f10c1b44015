"""pipeline.py as a newcomer uses it: without `with`, with diffusers' names, with an image of another size; short reprs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import with_fake_engines

from sdruntime.backends.base.engine import EngineOptions
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.pool import Engines
from sdruntime.errors import OutOfSpace, SdruntimeError, SettingError, UnknownName
from sdruntime.pipeline.images.imagefile import fitted
from sdruntime.pipeline.images.png import write_png
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.keywords import DIFFUSERS
from sdruntime.pipeline.requests.request import Request, requests_from
from sdruntime.serving.batcher import Batcher


@pytest.fixture
def ready(bundle: Bundle) -> Bundle:
    return with_fake_engines(bundle)


def fake_pipeline(ready: Bundle) -> Pipeline:
    return Pipeline.open(ready, backend="fake")


def test_the_first_use_opens_the_engines_and_close_releases_them(ready: Bundle) -> None:
    pipe = fake_pipeline(ready)
    assert pipe.engines.opened is None
    first = pipe("a prompt", steps=2, seed=1, size=(64, 64))
    assert {engine.spec.component for engine in (pipe.engines.opened or {}).values()} == {"text_encoder", "unet", "vae_decoder"}
    assert first.images[0].shape == (64, 64, 3)
    pipe.close()
    assert pipe.engines.opened is None
    with pytest.raises(SdruntimeError, match=r"the pipeline is closed: open the bundle again with Pipeline\.open"):
        pipe("a prompt", steps=2, size=(64, 64))
    with pipe:  # entering it says what is wanted
        np.testing.assert_array_equal(pipe("a prompt", steps=2, seed=1, size=(64, 64)).pixels[0], first.pixels[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pipeline("a bundle"), "Pipeline('a bundle'): to open a bundle, write Pipeline.open('a bundle')"),
        (lambda: Pipeline(Path("b")), "write Pipeline.open('b')"),
        (lambda: Pipeline(None), "Pipeline(None): to open a bundle, write Pipeline.open(the path of a bundle)"),
        (lambda: Pipeline.open(None), "bundle None: expected the path of its folder, as text or a pathlib.Path"),
        (lambda: Bundle.open(7), "bundle 7: expected the path of its folder"),
        (lambda: EngineOptions(threads="4"), "threads '4': expected a whole number, 0 or more"),
        (lambda: EngineOptions(device=None), "device None: expected a whole number, 0 or more"),
        (lambda: EngineOptions(session={"NUM_STREAMS": 2}), "session {'NUM_STREAMS': 2}: expected a mapping of text"),
        (lambda: EngineOptions(session="a=1"), "session 'a=1': expected a mapping of text"),
    ],
)
def test_arguments_of_another_type_are_refused_with_what_to_write(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        call()
    assert message in str(caught.value)


def test_the_constructor_opens_a_bundle_as_open_does(ready: Bundle) -> None:
    for arguments, message in (
        ({"options": {"threads": 2}}, "options {'threads': 2}: expected EngineOptions(...)"),
        ({"backend": None}, "backend None: expected a name, such as 'auto'"),
    ):
        with pytest.raises(SettingError) as caught:
            Pipeline.open(ready, **arguments)  # type: ignore[arg-type]
        assert message in str(caught.value)
    with Pipeline(ready, backend="fake") as pipe:
        assert pipe.engines.options == EngineOptions()


def test_the_size_of_seed_resize_is_one_that_an_image_can_have(ready: Bundle) -> None:
    factor = ready.manifest.model.vae_factor
    with fake_pipeline(ready) as pipe, pytest.raises(SettingError) as caught:
        pipe("a", seed_resize=(5 * factor + 1, 3 * factor))
    near = f"{5 * factor}x{3 * factor}"
    assert str(caught.value) == (
        f"seed_resize {5 * factor + 1}x{3 * factor}: both sides must be multiples of {factor}, such as {near}"
    )


def test_a_stream_and_a_batcher_open_it_too(ready: Bundle) -> None:
    pipe = fake_pipeline(ready)
    stream = pipe.stream("a prompt", steps=2, size=(64, 64))
    assert [state.step for state in stream] == [1, 2]
    pipe.close()
    other = fake_pipeline(ready)
    with Batcher(other) as batcher:
        assert batcher.submit(Request(prompt="x", steps=2, size=(64, 64))).result(60).shape == (64, 64, 3)
    other.close()


def test_a_first_use_that_fails_releases_what_it_opened_and_may_be_tried_again(ready: Bundle) -> None:
    pipe = fake_pipeline(ready)

    def no_room(*_: object) -> None:
        raise OutOfSpace("no room")

    with pytest.MonkeyPatch.context() as failing:
        failing.setattr(Engines, "_check_memory", no_room)
        with pytest.raises(OutOfSpace, match="no room"):
            pipe("a prompt", steps=2, size=(64, 64))
    assert pipe.engines.opened is None
    assert len(pipe("a prompt", steps=2, size=(64, 64)).images) == 1
    pipe.close()


def test_a_wrong_setting_is_refused_before_anything_is_opened(ready: Bundle) -> None:
    pipe = fake_pipeline(ready)
    for wrong in ({"size": (60, 64)}, {"sampler": "nonsense"}, {"step": 3}):
        with pytest.raises(SettingError):
            pipe("a prompt", **wrong)
    assert pipe.engines.opened is None


def test_a_batcher_takes_a_prompt_and_settings(ready: Bundle) -> None:
    with fake_pipeline(ready) as pipe, Batcher(pipe) as batcher:
        image = batcher.submit("a red fox in snow").result(60)
        assert image.request == Request(prompt="a red fox in snow", seed=image.seed, steps=20, guidance=7.5)
        image = batcher.submit("a red fox in snow", seed=5, steps=2).result(60)
        assert image.request == Request(prompt="a red fox in snow", seed=5, steps=2, guidance=7.5)
        assert repr(batcher).endswith(", 0 unfinished requests>")
    assert repr(batcher).endswith(", not open>")


@pytest.mark.parametrize(
    ("request_", "settings", "told"),
    [
        (3, {}, "submit: expected text or a Request, got int"),
        (["a", "b"], {}, "submit: expected text or a Request, got list"),
        (Request(prompt="a"), {"steps": 3}, "steps: a Request has its own settings"),
        ("a", {"num_inference_steps": 3}, "write steps="),
        ("a", {"count": 2}, "a submission is one image"),
    ],
)
def test_a_batcher_refuses_what_is_no_request(ready: Bundle, request_: Any, settings: dict[str, Any], told: str) -> None:
    with fake_pipeline(ready) as pipe, Batcher(pipe) as batcher, pytest.raises(SettingError, match=told):
        batcher.submit(request_, **settings)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_names_are_answered_with_ours(ready: Bundle, name: str) -> None:
    with pytest.raises(SettingError, match=f"unknown setting '{name}': write ") as caught:
        fake_pipeline(ready)("a prompt", **{name: 1})
    wanted = DIFFUSERS[name].partition("=")[0]
    assert wanted in ("count", *Request.__slots__) or "pipe.stream" in wanted or "image.pixels" in wanted
    assert DIFFUSERS[name] in str(caught.value)


def test_a_start_image_is_read_once_for_all_of_its_requests(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    requests = requests_from(["a", "b"], count=3, image=tmp_path / "a.png")
    assert all(request.pixels is requests[0].pixels for request in requests)


def test_an_unknown_setting_has_near_names() -> None:
    with pytest.raises(UnknownName, match="unknown setting 'guidence': did you mean guidance"):
        requests_from("a prompt", guidence=3)


def test_an_image_of_another_size_is_fitted_on_request_only(small_bundle: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow resizes")
    image = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    with Pipeline.open(small_bundle, options=EngineOptions(measure=False)) as pipe:
        for size in (None, (64, 64)):
            with pytest.raises(SettingError, match=r'the image is 200x90.*pass fit "resize" or "crop" \(--fit\)'):
                pipe("a cat", image=image, size=size, steps=2)
        for fit in ("resize", "crop"):
            ours = pipe("a cat", image=image, fit=fit, size=(64, 64), steps=4, seed=1)
            reference = pipe("a cat", image=fitted(image, (64, 64), fit), steps=4, seed=1)
            np.testing.assert_array_equal(ours.pixels[0], reference.pixels[0])
            assert ours.pixels[0].std() >= 10
            assert f"Resize mode: {'Just' if fit == 'resize' else 'Crop and'} resize" in ours.images[0].text()["parameters"]
        assert pipe("a cat", image=image, fit="crop", steps=2).images[0].size == pipe.model.default_size[::-1]
    with pytest.raises(UnknownName, match="unknown fit 'croped': did you mean crop"):
        Request(prompt="x", fit="croped")  # type: ignore[arg-type]


def test_reprs_are_short(ready: Bundle) -> None:
    pipe = fake_pipeline(ready)
    assert repr(ready) == f"<Bundle {str(ready.folder)!r}: by-hand (sd1, fp32), 4 engines>"
    assert repr(pipe) == f"<Pipeline of {ready!r}, fake cpu, not opened yet>"
    with pipe:
        assert repr(pipe).endswith(", open>")
    assert repr(pipe).endswith(", closed>")
    pixels = np.zeros((64, 128, 3), np.uint8)
    request = Request(prompt="a red fox in snow " * 9, seed=7, steps=30, image=pixels, options={"eta": 0.5})
    assert repr(request) == (
        "<Request 'a red fox in snow a red fox in snow a…', seed 7, image 128x64, steps 30, options {'eta': 0.5}>"
    )
    assert repr(Request(prompt="x")) == "<Request 'x', seed 0>"
    assert repr(Request(prompt="x", sigmas=[2, 1, 0])) == "<Request 'x', seed 0, sigmas (2.0, 1.0, 0.0)>"


def test_own_sigmas_beside_other_requests(ready: Bundle) -> None:
    alike = {"sampler": "euler", "seed": 3, "size": (64, 64)}
    levels = ([14.6, 4.0, 1.0, 0.0], [9.0, 4.0, 1.0, 0.0])
    requests = [Request(prompt="x", sigmas=sigmas, **alike) for sigmas in levels]
    with fake_pipeline(ready) as pipe:
        stream = pipe.stream([*requests, Request(prompt="x", steps=5, **alike)])
        assert [job.run.steps for job in stream.jobs] == [3, 3, 5]
        for _ in stream:
            pass
        first, second, _ = (job.run.x for job in stream.jobs)
        assert not np.array_equal(first, second)  # each has a table of its own
        assert "Steps: 3, " in stream.result.images[0].text()["parameters"]
        with pytest.raises(SettingError, match="steps 30: the 4 sigmas make 3 steps of euler"):
            pipe("x", sigmas=levels[0], steps=30, **alike)
