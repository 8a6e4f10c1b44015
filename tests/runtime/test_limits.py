"""What a bundle, a scheduler's config or a host may ask for: each once ended in a raw error, a hang or all of the memory."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import SCHEDULER, make_bundle, with_fake_engines

from sdruntime.backends.base.building import Library
from sdruntime.backends.base.feeds import check_tensors
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import NAME
from sdruntime.bundle.records import json_from_text
from sdruntime.cli.describe import bundle_document, bundle_lines
from sdruntime.engines.choose import Machine
from sdruntime.errors import BundleError, EngineError, SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.compile import compile_table
from sdruntime.serving.channel import HEADER, SHARED, BadFrame, Channel
from sdruntime.serving.service import blob_bytes

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_fake_engines(make_bundle(tmp_path / "bundle")).folder


def changed(folder: Path, change: Change) -> None:
    document = json.loads((folder / NAME).read_text())
    change(document)
    (folder / NAME).write_text(json.dumps(document))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda d: d["engines"][1]["profiles"][0].update(batch=[2**40] * 3),
            "batch: max 1,099,511,627,776 is above 1,024",
        ),
        (lambda d: d["engines"][1]["profiles"][0].update(batch=[100_000] * 3), "range of batch: max 100,000 is above 1,024"),
        (lambda d: d["engines"][1]["profiles"][0].update(width=[1, 1, 2**40]), "range of width"),
        (lambda d: d["model"].update(default_size=[2**40, 2**40]), "a side is above 16,384 pixels"),
        (lambda d: d["model"].update(scaling_factor=1e-320), "scaling_factor 9.99989e-321 is outside 1e-06 to 1e"),
        (lambda d: d["model"].update(scaling_factor=10**23), "scaling_factor 1e"),
        (lambda d: d["provenance"].update(a=nested(100)), "nested too deeply"),
        (lambda d: d["provenance"].update(a=nested(900)), "nested too deeply"),
        (lambda d: d["provenance"].update(a=float("inf")), "Infinity is not a JSON number"),
        (lambda d: d["components"]["unet"]["inputs"][0].update(shape=[2**62, 4]), "neither a name nor a positive number"),
        (lambda d: d["components"]["unet"]["inputs"][0].update(shape=["batch"] * 9), "9 dimensions are above 8"),
        (
            lambda d: d["components"]["unet"]["outputs"][0].update(shape=["batch", 4, "high", "wide"]),
            "does not follow",
        ),
    ],
)
def test_a_manifest_that_asks_for_too_much_is_refused(folder: Path, change: Change, text: str) -> None:
    changed(folder, change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("component", "kind", "change", "text"),
    [
        ("unet", "outputs", {"name": "noise"}, "unet.outputs: out_sample is missing"),
        ("unet", "inputs", {"name": "latents"}, "unet.inputs: latents is not a tensor of the pipeline"),
        ("vae_decoder", "outputs", {"name": "image"}, "vae_decoder.outputs: sample is missing"),
        ("text_encoder", "outputs", {"name": "hidden"}, "text_encoder.outputs: last_hidden_state is missing"),
        ("unet", "outputs", {"shape": ["batch", 8, "height", "width"]}, "expected [batch, 4, height, width]"),
        ("unet", "outputs", {"dtype": "int64"}, "out_sample is int64"),
    ],
)
def test_tensors_that_the_pipeline_cannot_feed_or_take_are_told_when_it_opens(
    folder: Path, component: str, kind: str, change: dict[str, Any], text: str
) -> None:
    changed(folder, lambda document: document["components"][component][kind][0].update(change))
    with pytest.raises(BundleError) as caught:
        Pipeline.open(folder, backend="fake")
    assert text in str(caught.value)


def test_an_engine_whose_outputs_have_other_names_is_refused(folder: Path) -> None:
    bundle = Bundle.open(folder)
    component, spec = bundle.manifest.components["unet"], bundle.manifest.engines[1]
    inputs = [tensor.name for tensor in component.inputs]
    check_tensors(component, spec, inputs, ["out_sample", "more"])
    for fed, taken in ((inputs, ["noise"]), ([*inputs, "mask"], ["out_sample"]), (inputs[1:], ["out_sample"])):
        with pytest.raises(EngineError, match="but the manifest says"):
            check_tensors(component, spec, fed, taken)


def test_an_engine_of_an_unknown_backend_is_listed_as_one(folder: Path) -> None:
    changed(folder, lambda document: document["engines"][0].update(backend="abacus"))
    bundle, machine = Bundle.open(folder), Machine(libraries={"fake": Library(version="1", targets=("cpu",))})
    assert any("knows no backend 'abacus'" in line for line in bundle_lines(bundle, machine))
    assert json.dumps(bundle_document(bundle, machine))


@pytest.mark.parametrize("path", ["bundle\0", "bundle\ud800"])
def test_a_path_that_no_system_takes_is_refused(path: str) -> None:
    with pytest.raises(BundleError, match="not a valid path"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_train_timesteps", value) for value in (10**30, "1000", 1000.5, True, 0, [1000])),
        *(("beta_start", value) for value in (10**300, "0.1", -1, 1e-320, [], {})),
        *(("solver_order", value) for value in (1.5, 2.0, "2", 10**30, 0, True)),
        *(("steps_offset", value) for value in (10**30, "1", 0.5)),
        *(("trained_betas", value) for value in ([10**300], ["a"], "text", "", [0.1], [True], {"a": 1})),
        *(("sigma_max", value) for value in (10**300, "14", 0, -1)),
        *(("timestep_spacing", value) for value in (1, [], {}, "leadin")),
        *(("prediction_type", value) for value in (1, [], "epsilo")),
        *(("final_sigmas_type", value) for value in (1, ["zero"])),
    ],
)
def test_a_scheduler_config_with_strange_values_is_refused_by_the_key(key: str, value: object) -> None:
    given = json_from_text(json.dumps(SCHEDULER | {key: value}))
    sampler, schedule = ("euler", "karras") if key == "sigma_max" else ("DPMSolverMultistepScheduler", None)
    with pytest.raises(SettingError, match=key):
        compile_table(given, steps=5, sampler=sampler, schedule=schedule)


@pytest.mark.parametrize("sampler", ["unipc", "dpmpp_2m", "dpmpp_2s", "sa_solver", "deis", "dpm_2m", "euler", "heun"])
@pytest.mark.parametrize("schedule", [None, "karras", "exponential"])
def test_one_step_between_equal_sigmas_ends_in_a_table_or_in_an_error_of_ours(sampler: str, schedule: str | None) -> None:
    config = SCHEDULER | {"sigma_min": 1.0, "sigma_max": 1.0, "final_sigmas_type": "sigma_min"}
    with contextlib.suppress(SettingError):
        assert compile_table(config, steps=1, sampler=sampler, schedule=schedule).steps == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 10**400},
        {"guidance": "7"},
        {"guidance": float("nan")},
        {"rescale": 10**400},
        {"strength": None},
        {"seed": 10**5000},
        {"seed": 1.5},
        {"size": (10**400, 64)},
        {"size": (64,)},
        {"size": ("64", "64")},
        {"size": (20_000, 64)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_request_with_strange_numbers_is_refused(settings: dict[str, Any]) -> None:
    [name] = settings
    with pytest.raises(SettingError, match=name):
        Request(prompt="a cat", **settings)


@pytest.mark.parametrize("steps", [10**400, 10**5000, "20", 1.5, None], ids=range(5))
def test_steps_that_are_no_number_are_refused(steps: Any) -> None:
    with pytest.raises(SettingError, match="steps"):
        compile_table(SCHEDULER, steps=steps)


# ---- frames


def test_a_blob_that_nobody_expects_is_skipped_and_not_kept() -> None:
    ours, theirs = socket.socketpair()
    sent = 100 << 20
    with ours, theirs:

        def send() -> None:
            theirs.sendall(HEADER.pack(2, 0, sent) + b"{}")
            for _ in range(sent >> 20):
                theirs.sendall(bytes(1 << 20))
            theirs.sendall(HEADER.pack(2, 0, 3) + b"[]abc")

        sender = threading.Thread(target=send)
        channel = Channel(ours)
        sender.start()
        tracemalloc.start()
        skipped = channel.receive(lambda message: 10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        following = channel.receive(lambda message: 10)
        sender.join()
    assert skipped == (b"{}", None, sent)
    assert peak < 4e6
    assert following is not None
    assert (following.message, bytes(following.blob or b"")) == (b"[]", b"abc")


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ({"op": "submit", "job": 1, "request": {"prompt": "a"}}, 0),
        ({"op": "submit", "job": 1, "request": {"prompt": "a"}, "image": [64, 32]}, 64 * 32 * 3),
        ({"op": "submit", "job": 1, "request": {"prompt": "a"}, "image": [2**63, 2**63]}, 0),
        ({"op": "submit", "job": 1, "request": {"prompt": "a"}, "image": [4, 2], "mask": True, "depth": [3, 5]}, 4 * 2 * 4 + 15),
        ({"op": "submit", "job": 1, "request": {"prompt": "a"}, "image": [4, 2], "depth": [3, 2**63]}, 0),
        ({"op": "submit", "job": 1, "image": [64, 32]}, 0),
        ({"op": "cancel", "job": 1}, 0),
        ([], 0),
    ],
)
def test_a_message_says_how_large_its_blob_may_be(message: object, size: int) -> None:
    assert blob_bytes(json.dumps(message).encode()) == size
    assert blob_bytes(b"\xff") == 0


@pytest.mark.parametrize("header", [HEADER.pack(2**32 - 1, 0, 0), HEADER.pack(2, 2, 0), HEADER.pack(2, SHARED, 5)])
def test_what_is_no_frame_is_told(header: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(header)
        with pytest.raises(BadFrame, match="not a frame"):
            Channel(ours).receive()
