"""The model for Triton: its files, and model.py against a fake of Triton's Python module."""

from __future__ import annotations

import base64
import errno
import importlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_triton
import numpy as np
import pytest
from bundles import tree, with_fake_engines
from fake_triton import InferenceRequest, TritonError

from sdruntime import Pipeline, Request
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import save_manifest
from sdruntime.bundle.model import LinearPreview
from sdruntime.errors import BundleError, OutOfSpace, SettingError
from sdruntime.pipeline.images.png import image_from_png, png_from_image
from sdruntime.serving.triton_server import repository
from sdruntime.serving.triton_server.repository import FIRST_LINE, STUB, write_model

PACKAGE = "sdruntime.serving.triton_server"
WAIT = 60.0
Start = Callable[..., Any]


# -- the files


def test_the_config_names_every_tensor(bundle: Bundle, tmp_path: Path) -> None:
    place = write_model(tmp_path / "models", bundle.folder, name="fox-1.5", instances=2, QUEUE="5", LORA_DIR='/a "b"')
    assert tree(tmp_path / "models").keys() == {"fox-1.5/config.pbtxt", "fox-1.5/1/model.py"}
    lines = (place / "config.pbtxt").read_text().splitlines()
    assert lines[0] == FIRST_LINE
    assert [line for line in lines if line and not line.startswith(("#", "input", "output"))] == [
        'name: "fox-1.5"',
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        "instance_group [ { kind: KIND_AUTO, count: 2 } ]",
        f'parameters {{ key: "BUNDLE", value {{ string_value: "{bundle.folder}" }} }}',
        'parameters { key: "QUEUE", value { string_value: "5" } }',
        'parameters { key: "LORA_DIR", value { string_value: "/a \\"b\\"" } }',
    ]
    assert 'input { name: "PROMPT", data_type: TYPE_STRING, dims: [ 1 ] }' in lines
    assert 'input { name: "SIZE", data_type: TYPE_INT32, dims: [ 2 ], optional: true }' in lines
    assert 'output { name: "IMAGE", data_type: TYPE_UINT8, dims: [ -1, -1, 3 ] }' in lines
    names = [line.split('"')[1] for line in lines if line.startswith(("input", "output"))]
    assert names == [
        *("PROMPT", "NEGATIVE", "SEED", "STEPS", "GUIDANCE", "SAMPLER", "SCHEDULE", "SIZE", "START_IMAGE", "MASK", "STRENGTH"),
        *("SETTINGS", "PROGRESS", "OUTPUT", "STEP", "PREVIEW", "PNG", "IMAGE", "INFO"),
    ]


def test_a_model_of_this_command_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    place = write_model(tmp_path / "models", bundle.folder, QUEUE="5")
    assert place == tmp_path / "models" / "bundle"
    (place / "1" / "__pycache__").mkdir()
    (place / "1" / "__pycache__" / "model.cpython-311.pyc").touch()
    (place / "1" / "model.py").write_text("old")
    assert write_model(tmp_path / "models", bundle.folder, QUEUE="6") == place
    assert (place / "1" / "model.py").read_text() == STUB
    assert 'string_value: "6"' in (place / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (lambda place: (place / "config.pbtxt").write_text('name: "other"\n'), "not a model that"),
        (lambda place: (place / "weights.bin").touch(), "not a model that"),
        (lambda place: (place / "config.pbtxt").write_bytes(b"\xff"), "not a model that"),
        (lambda place: [(place / name).write_text(f"{FIRST_LINE}\n") for name in ("config.pbtxt", "mine.txt")], "mine.txt"),
        (lambda place: [place.rmdir(), place.touch()], "this is a file"),
        (lambda place: [place.rmdir(), place.symlink_to(place.parent)], "symbolic link"),
    ],
)
def test_what_this_command_did_not_write_is_never_replaced(
    bundle: Bundle, tmp_path: Path, plant: Callable[[Path], object], what: str
) -> None:
    place = tmp_path / "models" / "bundle"
    place.mkdir(parents=True)
    plant(place)
    before = tree(tmp_path / "models")
    with pytest.raises(SettingError, match=what):
        write_model(tmp_path / "models", bundle.folder)
    assert tree(tmp_path / "models") == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["bundle"]


def test_a_wrong_setting_writes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("../x", ".hidden", "a b", "a/b"):
        with pytest.raises(SettingError, match="--name"):
            write_model(tmp_path / "models", bundle.folder, name=name)
    with pytest.raises(SettingError, match="--instances 0"):
        write_model(tmp_path / "models", bundle.folder, instances=0)
    with pytest.raises(BundleError):
        write_model(tmp_path / "models", tmp_path / "nowhere")
    assert not (tmp_path / "models").exists()


def test_nothing_half_written_stays_behind(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(repository, "sync_tree", full)
    with pytest.raises(OutOfSpace):
        write_model(tmp_path / "models", bundle.folder)
    assert [*(tmp_path / "models").iterdir()] == []


# -- the model


@pytest.fixture
def model_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_triton.fresh())
    for name in ("model", "metrics"):
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
    yield importlib.import_module(f"{PACKAGE}.model")
    for name in ("model", "metrics"):
        sys.modules.pop(f"{PACKAGE}.{name}", None)


@pytest.fixture
def start(model_module: Any, bundle: Bundle) -> Iterator[Start]:
    """start(PARAMETER=…) -> an open model, by default of fake engines, each of whose calls takes 5 ms."""
    started: list[Any] = []

    def initialized(**parameters: str) -> Any:
        if "BUNDLE" not in parameters:
            with_fake_engines(bundle)
            parameters = {"BUNDLE": str(bundle.folder), "BACKEND": "fake", "SESSION": '{"seconds": "0.005"}', **parameters}
        model = model_module.TritonPythonModel()
        model.initialize(arguments(**parameters))
        started.append(model)
        return model

    yield initialized
    for model in started:
        model.finalize()


def arguments(**parameters: str) -> dict[str, str]:
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    return {
        "model_config": json.dumps(config),
        "model_name": "fox",
        "model_instance_name": "fox_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }


def order(**tensors: Any) -> InferenceRequest:
    return InferenceRequest(**{"PROMPT": "a cat", "SEED": 7, "STEPS": 2, "SIZE": [64, 64], **tensors})


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_the_image_is_python_s_to_the_byte(start: Start, small_bundle: Path) -> None:
    with Pipeline.open(small_bundle) as pipe:
        [image] = pipe(Request(prompt="a (red:1.2) fox", seed=7, steps=3, guidance=7.1, prompt_syntax="a1111")).images
        png = png_from_image(image.pixels, image.text())
    model = start(BUNDLE=str(small_bundle))
    settings = {"PROMPT": "a (red:1.2) fox", "SEED": 7, "STEPS": 3, "GUIDANCE": 7.1}
    as_text, as_bytes, raw = (InferenceRequest(**settings, OUTPUT=output) for output in ("base64", "png", "raw"))
    for request in (as_text, as_bytes, raw):
        model.execute([request])
        request.sender.all_responses = request.sender.all()
    assert base64.b64decode(as_text.sender.all_responses[-1].outputs["PNG"][0]) == png
    assert as_bytes.sender.all_responses[-1].outputs["PNG"][0] == png
    np.testing.assert_array_equal(raw.sender.all_responses[-1].outputs["IMAGE"], image.pixels)
    info = json.loads(raw.sender.all_responses[-1].outputs["INFO"][0])
    assert (info["seed"], info["sampler"], info["width"]) == (7, image.sampler, image.size[0])
    assert info["parameters"] == image.text()["parameters"]


def test_progress_is_a_response_after_each_step(start: Start) -> None:
    model = start()
    steps, quiet = order(STEPS=3), order(PROGRESS="off")
    model.execute([steps, quiet])
    responses = steps.sender.all()
    assert [response.outputs["STEP"].tolist() for response in responses[:-1]] == [[0, 3], [1, 3], [2, 3], [3, 3]]
    assert responses[-1].outputs.keys() == {"PNG", "INFO"}
    assert [response.outputs.keys() for response in quiet.sender.all()] == [{"PNG", "INFO"}]


def test_a_preview_is_a_small_image(start: Start, bundle: Bundle) -> None:
    bundle = with_fake_engines(bundle)
    weights = LinearPreview(weights=((1.0, 0.0, 0.0, 0.0),) * 3, bias=(0.0, 0.0, 0.0), psnr=20.0)
    save_manifest(bundle.folder, bundle.with_preview(weights).manifest)
    model = start(BUNDLE=str(bundle.folder), BACKEND="fake")
    request = order(PROGRESS="preview")
    model.execute([request])
    first, *responses, _ = request.sender.all()
    assert first.outputs.keys() == {"STEP"}
    assert [response.outputs["PREVIEW"].shape for response in responses] == [(8, 8, 3)] * 2
    assert {response.outputs["PREVIEW"].dtype for response in responses} == {np.dtype(np.uint8)}


def test_a_bundle_without_weights_for_previews_refuses_them(start: Start) -> None:
    model = start()
    request = order(PROGRESS="preview")
    model.execute([request])
    assert request.sender.last().error.code == TritonError.UNSUPPORTED


def test_requests_in_flight_share_calls_of_the_unet(start: Start) -> None:
    model = start(RUNNING="8")
    requests = [order(SEED=seed, STEPS=20) for seed in range(8)]
    model.execute(requests)
    assert all(request.sender.last().error is None for request in requests)
    calls = model._pipe.engine("unet").calls
    assert sum(call["batch"] for call in calls) == 8 * 20 * 2  # both rows of guidance
    assert max(call["batch"] for call in calls) == 16
    assert len(calls) < 40


def test_a_start_image_is_a_file_or_base64_of_it(start: Start) -> None:
    model = start()
    file = io.BytesIO(png_from_image(np.zeros((64, 64, 3), np.uint8), {})).getvalue()
    requests = [
        InferenceRequest(PROMPT="a cat", STEPS=4, STRENGTH=0.5, START_IMAGE=data, MASK=file, OUTPUT="png")
        for data in (file, base64.b64encode(file))
    ]
    model.execute(requests)
    first, second = (image_from_png(request.sender.last().outputs["PNG"][0]) for request in requests)
    assert first.shape == (64, 64, 3)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("tensors", "code", "what"),
    [
        ({"STEPS": 0}, TritonError.INVALID_ARG, "steps 0 is outside 1 to 1,000"),
        ({"SAMPLER": "eulr"}, TritonError.INVALID_ARG, "did you mean euler"),
        ({"PROMPT": b"\xff"}, TritonError.INVALID_ARG, "PROMPT: not UTF-8"),
        ({"SIZE": [64]}, TritonError.INVALID_ARG, "SIZE: expected 2 values, got 1"),
        ({"OUTPUT": "jpeg"}, TritonError.INVALID_ARG, "unknown OUTPUT 'jpeg'"),
        ({"PROGRESS": "all"}, TritonError.INVALID_ARG, "unknown PROGRESS"),
        ({"SETTINGS": "{"}, TritonError.INVALID_ARG, "SETTINGS: not JSON"),
        ({"SETTINGS": "[]"}, TritonError.INVALID_ARG, "SETTINGS: expected a JSON object"),
        ({"SETTINGS": '{"clip_skp": 1}'}, TritonError.INVALID_ARG, "clip_skip"),
        ({"SETTINGS": '{"seed": 1}'}, TritonError.INVALID_ARG, "an input has it too"),
        ({"SETTINGS": '{"loras": [{"path": "/etc/passwd"}]}'}, TritonError.INVALID_ARG, "name LoRAs in the prompt"),
        ({"MASK": b""}, TritonError.INVALID_ARG, "send START_IMAGE too"),
        ({"START_IMAGE": b"?"}, TritonError.INVALID_ARG, "START_IMAGE: .*and not base64"),
        ({"START_IMAGE": b"AAAA"}, TritonError.INVALID_ARG, "START_IMAGE"),
        ({"PROMPT": "a <lora:fox:1>"}, TritonError.INVALID_ARG, "lora"),
    ],
)
def test_a_wrong_request_is_an_error_of_its_own(start: Start, tensors: dict[str, Any], code: str, what: str) -> None:
    model = start()
    wrong, right = order(**tensors), order()
    model.execute([wrong, right])
    [response] = wrong.sender.all()
    assert response.error is not None
    assert response.error.code == code
    assert re.search(what, response.error.message), response.error.message
    assert right.sender.last().error is None
    assert fake_triton.numbers("sdruntime_rejected_total") == {"queue_full": 0, "invalid": 1}


def test_settings_reach_the_request(start: Start) -> None:
    model = start()
    request = order(SETTINGS='{"rescale": 0.7, "rng": "cuda"}')
    model.execute([request])
    parameters = json.loads(request.sender.last().outputs["INFO"][0])["parameters"]
    assert "0.7" in parameters
    assert "RNG: NV" in parameters


def test_a_full_queue_refuses(start: Start) -> None:
    model = start(QUEUE="1", RUNNING="1")
    requests = [order(STEPS=100) for _ in range(4)]
    model.execute(requests)
    errors = [request.sender.last().error for request in requests]
    assert [error is None for error in errors] == [True, True, False, False]
    assert {error.code for error in errors[2:]} == {TritonError.UNAVAILABLE}
    assert fake_triton.numbers("sdruntime_rejected_total")["queue_full"] == 2


def test_cancelled_requests_end_whether_they_run_or_wait(start: Start) -> None:
    model = start(RUNNING="1")
    running, waiting, last = order(STEPS=900), order(STEPS=900), order()
    model.execute([running, waiting, last])
    running.sender.responses.get(timeout=WAIT)
    for request in (waiting, running):
        request.sender.cancelled = True
        error = request.sender.last().error
        assert (error.code, error.message) == (TritonError.CANCELLED, "cancelled")
    assert last.sender.last().error is None
    eventually(lambda: fake_triton.numbers("sdruntime_images_running") == {"": 0})
    assert fake_triton.numbers("sdruntime_images_total") == {"done": 1, "failed": 0, "cancelled": 2}


def test_the_metrics_count_what_was_done(start: Start) -> None:
    model = start(QUEUE="5")
    request = order(STEPS=4)
    model.execute([request])
    request.sender.all()
    eventually(lambda: fake_triton.numbers("sdruntime_steps_total") == {"": 4})
    assert fake_triton.numbers("sdruntime_images_total") == {"done": 1, "failed": 0, "cancelled": 0}
    assert fake_triton.numbers("sdruntime_queue_capacity") == {"": 5}
    assert fake_triton.numbers("sdruntime_images_waiting") == {"": 0}
    assert fake_triton.numbers("sdruntime_stage_seconds_total")["denoise"] > 0
    assert all(
        metric.labels.items() >= {"model": "fox", "instance": "fox_0_0"}.items()
        for family in fake_triton.MetricFamily.families
        for metric in family.metrics
    )


def test_the_end_of_the_server_ends_every_request(start: Start, model_module: Any, bundle: Bundle) -> None:
    with_fake_engines(bundle)
    model = model_module.TritonPythonModel()
    model.initialize(arguments(BUNDLE=str(bundle.folder), BACKEND="fake", SESSION='{"seconds": "0.005"}', RUNNING="1"))
    requests = [order(STEPS=900) for _ in range(3)]
    model.execute(requests)
    model.finalize()
    assert [request.sender.last().error.code for request in requests] == [TritonError.CANCELLED] * 3


def test_an_unexpected_error_is_logged_and_is_that_of_its_request(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    model = start()
    monkeypatch.setattr(type(model._pipe), "images", lambda *_: 1 // 0)
    request = order()
    model.execute([request])
    error = request.sender.last().error
    assert (error.code, error.message) == (TritonError.INTERNAL, "ZeroDivisionError: integer division or modulo by zero")
    assert "Traceback" in fake_triton.Logger.lines[-1]
    assert fake_triton.numbers("sdruntime_images_total")["failed"] == 1


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"BUNDLE": "/nowhere"}, "/nowhere"),
        ({"BUNDLE": "", "QUEUE": "5"}, "fault"),
        ({"QUEUE": "many"}, "QUEUE 'many': expected a whole number"),
        ({"QUEUE": "0"}, "queue 0: at least 1"),
        ({"SESSION": "[]"}, "expected a mapping"),
        ({"SESSION": "{"}, "SESSION '{': not JSON"),
        ({"BACKEND": "nothing"}, "unknown backend"),
    ],
)
def test_a_wrong_config_is_the_error_of_the_model(start: Start, parameters: dict[str, str], what: str) -> None:
    with pytest.raises(fake_triton.TritonModelException, match=what):
        start(**parameters)


def test_a_config_without_a_bundle_says_so(model_module: Any) -> None:
    with pytest.raises(fake_triton.TritonModelException, match="the parameter BUNDLE is missing"):
        model_module.TritonPythonModel().initialize(arguments())


def test_a_server_that_numpy_2_would_crash_is_refused(model_module: Any, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"\x7fELF...numpy.core.multiarray\0")
    new.write_bytes(b"\x7fELF...numpy._core\0")
    with pytest.raises(SettingError, match=r'NumPy 2\.1\.0 .* pip install "numpy<2"'):
        model_module.check_numpy("2.1.0", old)
    model_module.check_numpy("2.1.0", new)
    model_module.check_numpy("1.26.4", old)
