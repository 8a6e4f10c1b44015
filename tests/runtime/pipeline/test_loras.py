"""Requests with LoRAs, on ONNX Runtime's engines of a small model of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import loras
import numpy as np
import pytest
from hosts import Host
from infotext import read_infotext

from sdruntime.__main__ import main
from sdruntime.adapters.lora import Lora
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.backends.onnx_file.stored import weight_tensors
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines import adapted
from sdruntime.errors import EngineError, SettingError, UnknownName, Unsupported
from sdruntime.pipeline.images.png import image_from_png
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.requests.tags import with_tagged
from sdruntime.serving.batcher import Batcher

pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")
SIZE = (64, 64)
Shapes = dict[str, dict[str, tuple[int, ...]]]


def request(*used: Lora, seed: int = 7, **settings: object) -> Request:
    return Request(prompt="a cat", steps=2, size=SIZE, seed=seed, loras=used, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shapes(small_bundle: Path) -> Shapes:
    bundle = Bundle.open(small_bundle)
    return {name: {key: each.shape for key, each in weight_tensors(bundle, name).items()} for name in ("text_encoder", "unet")}


@pytest.fixture(scope="module")
def folder(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs named attention, whole, differences and text."""
    folder = tmp_path_factory.mktemp("loras")
    loras.write(folder / "attention.safetensors", loras.kohya(shapes))
    loras.write(folder / "whole.safetensors", loras.kohya(shapes, wanted=loras.everything))
    loras.write(folder / "below" / "differences.safetensors", loras.full(shapes, wanted=loras.everything))
    loras.write(folder / "text.safetensors", loras.peft({"text_encoder": shapes["text_encoder"]}))
    return folder


@pytest.fixture(scope="module")
def pipe(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(small_bundle, backend="onnxruntime") as opened:
        yield opened


def test_each_lora_changes_the_image_and_none_restores_it(pipe: Pipeline, folder: Path) -> None:
    files = [folder / "attention.safetensors", folder / "whole.safetensors", folder / "below" / "differences.safetensors"]
    files.append(folder / "text.safetensors")
    plain = pipe(request()).pixels[0]
    images = [pipe(request(Lora(file, 0.7))).pixels[0] for file in files]
    assert all(not np.array_equal(one, other) for k, one in enumerate(images) for other in (plain, *images[:k]))
    assert np.array_equal(pipe(request()).pixels[0], plain)
    assert np.array_equal(pipe(request(Lora(files[0], 0.7))).pixels[0], images[0])
    with pytest.warns(UserWarning, match=r"attention.safetensors has no effect: its strength is 0"):
        assert np.array_equal(pipe(request(Lora(files[0], 0.0))).pixels[0], plain)


def test_the_text_encoders_have_a_strength_of_their_own(pipe: Pipeline, folder: Path) -> None:
    file = folder / "attention.safetensors"
    images = [pipe(request(Lora(file, *scales))).pixels[0] for scales in ((0.7, 0.7), (0.7, 0.0), (0.0, 0.7))]
    assert len({image.tobytes() for image in images}) == 3


def test_requests_of_one_call_give_the_images_that_each_gives_alone(pipe: Pipeline, folder: Path) -> None:
    first, second = Lora(folder / "attention.safetensors", 0.7), Lora(folder / "whole.safetensors", -0.5)
    requests = [request(first), request(seed=8), request(second, seed=9), request(first, seed=10), request(seed=11)]
    alone = [pipe(each).pixels[0] for each in requests]
    together = pipe(requests).pixels
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    third = Lora(folder / "text.safetensors")
    with pytest.raises(SettingError, match="3 different sets of LoRAs in one call; the maximum is 2"):
        pipe([request(first), request(second), request(third)])


def test_a_batcher_runs_any_number_of_sets(small_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [(), *((Lora(folder / name),) for name in ("attention.safetensors", "whole.safetensors", "text.safetensors"))]
    with Pipeline.open(small_bundle, backend="onnxruntime") as pipe:
        alone = [pipe(request(*each)).pixels[0] for each in used]
        most = 0
        get = adapted.AdaptedEngines.get

        def counted(self: adapted.AdaptedEngines, *arguments: object) -> object:
            nonlocal most
            engine = get(self, *arguments)  # type: ignore[arg-type]
            most = max(most, len(self._sets))
            return engine

        monkeypatch.setattr(adapted.AdaptedEngines, "get", counted)
        with Batcher(pipe, running=4) as batcher:
            futures = [batcher.submit(request(*each)) for each in [*used, *used[::-1]]]
            images = [future.result(60).pixels for future in futures]
    for image, expected in zip(images, [*alone, *alone[::-1]], strict=True):
        assert np.abs(image.astype(int) - expected).max() <= 1
    assert most == adapted.KEPT_SETS


def test_metadata(pipe: Pipeline, folder: Path) -> None:
    used = Lora(folder / "attention.safetensors", 0.5, 0.25), Lora(folder / "whole.safetensors", 1)
    [image] = pipe(request(*used)).images
    read = read_infotext(image.text()["parameters"])
    assert read["Prompt"] == "a cat <lora:attention:0.25:0.5> <lora:whole:1>"
    hashes = dict(part.split(": ") for part in read["Lora hashes"].split(", "))
    assert hashes.keys() == {"attention", "whole"}
    assert all(len(text) == 12 and int(text, 16) for text in hashes.values())
    tagged = with_tagged(Request(prompt=read["Prompt"], prompt_syntax="a1111"), folder)
    assert tagged.prompt.strip() == "a cat"
    assert [(each.path, each.scales) for each in tagged.loras] == [(each.path, each.scales) for each in used]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <lora:attention> cat", ("a  cat", 1.0, 1.0)),
        ("<lora:attention:0.8>a", ("a", 0.8, 0.8)),
        ("a<lora:attention:0.5:0.8>", ("a", 0.8, 0.5)),
        ("a<lora:attention:te=0.5:unet=-1>", ("a", -1.0, 0.5)),
        ("a<lyco:differences:2>", ("a", 2.0, 2.0)),
    ],
)
def test_tags(text: str, expected: tuple[str, float, float], folder: Path) -> None:
    read = with_tagged(Request(prompt=text, prompt_syntax="a1111"), folder)
    [lora] = read.loras
    assert (read.prompt, *lora.scales) == expected
    assert with_tagged(Request(prompt=text), folder).prompt == text  # plain text has no tags


def test_tags_that_cannot_be_read(folder: Path, pipe: Pipeline) -> None:
    with pytest.raises(UnknownName, match="unknown LoRA 'atention': did you mean attention"):
        with_tagged(Request(prompt="<lora:atention:1>", prompt_syntax="a1111"), folder)
    for text in ("<lora:attention:x>", "<lora:attention:nan>", "<lora:attention:1:2:3>", "<lora:attention:dyn=4>"):
        with pytest.raises(SettingError, match="lora"):
            with_tagged(Request(prompt=text, prompt_syntax="a1111"), folder)
    with pytest.raises(SettingError, match="--lora-dir"):
        with_tagged(Request(prompt="<lora:attention:1>", prompt_syntax="a1111"), None)
    with pytest.raises(SettingError, match="no such folder"):
        with_tagged(Request(prompt="<lora:attention:1>", prompt_syntax="a1111"), folder / "none")
    for setting in ("prompt", "negative"):
        with pytest.raises(SettingError, match="<lora:attention:1> in a text"):
            pipe(Request(**{"prompt": "a", setting: "<lora:attention:1>"}, prompt_syntax="a1111", size=SIZE))


def test_faults_leave_the_pipeline_as_it_was(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    before = pipe(request()).pixels[0]
    other = loras.write(
        tmp_path / "other.safetensors", loras.kohya({"unet": {"conv_in.weight": (320, 4, 3, 3)}}, wanted=loras.everything)
    )
    with pytest.raises(SettingError, match="does not fit the model"):
        pipe(request(Lora(other)))
    with pytest.raises(SettingError, match="no such file"):
        pipe(request(Lora(tmp_path / "none.safetensors")))
    for wrong in ("a.safetensors", Lora("a"), [1], [Lora("a")] * 33):
        with pytest.raises(SettingError, match="loras"):
            Request(prompt="a", loras=wrong)  # type: ignore[arg-type]
    assert np.array_equal(pipe(request()).pixels[0], before)


def test_a_file_that_is_replaced_is_read_again(pipe: Pipeline, shapes: Shapes, tmp_path: Path) -> None:
    file = loras.write(tmp_path / "a.safetensors", loras.kohya(shapes))
    first = pipe(request(Lora(file))).pixels[0]
    loras.write(file, loras.peft(shapes))
    second = pipe(request(Lora(file))).pixels[0]
    assert not np.array_equal(first, second)


def test_backends_that_keep_their_weights(folder: Path, pipe: Pipeline) -> None:
    given = Pipeline.over(pipe.bundle, pipe.engines.engine)
    with pytest.raises(Unsupported, match="the engines are the caller's"):
        given(request(Lora(folder / "attention.safetensors")))
    spec = pipe.engines.chosen[0]
    object.__setattr__(renamed := type(spec)(**{name: getattr(spec, name) for name in spec.__slots__}), "backend", "tensorrt")
    with pytest.raises(Unsupported, match="sdexport build MODEL --lora FILE"):
        pipe.engines.check_adapters(renamed)


def test_weights_that_an_engine_does_not_have(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("sdruntime.backends.ort.engine.initializers", lambda model: {})
    with pytest.raises(EngineError, match=r"weights are not in the engine under their names: .*build the engine again"):
        pipe(request(Lora(folder / "attention.safetensors", 0.123)))


def test_a_service_takes_loras_and_survives_bad_ones(small_bundle: Path, folder: Path, tmp_path: Path, pipe: Pipeline) -> None:
    host = Host()
    try:
        host.open(small_bundle, backend="onnxruntime", lora_dir=str(folder))
        settings = {"steps": 2, "width": 64, "height": 64, "seed": 7, "prompt": "a cat"}
        pickle = tmp_path / "a.safetensors"
        pickle.write_bytes(b"PK\x03\x04" + bytes(100))
        wrong = {
            1: settings | {"loras": [{"path": str(pickle)}]},
            2: settings | {"loras": [{"path": "a", "scale": 1e9}]},
            3: settings | {"prompt": "a cat<lora:atention:1>", "prompt_syntax": "a1111"},
        }
        for job, request_ in wrong.items():
            host.submit(job, request=request_)
            assert host.wait("done", "failed", job=job)["event"] == "failed"
        messages = [event["message"] for event in host.events if event["event"] == "failed"]
        for message, part in zip(
            messages, ("a pickle, which", "scale 1000000000.0: expected", "did you mean attention"), strict=True
        ):
            assert part in message
        host.submit(4, request=settings | {"loras": [{"path": str(folder / "attention.safetensors"), "scale": 0.7}]})
        host.submit(5, request=settings | {"prompt": "a cat<lora:attention:0.7>", "prompt_syntax": "a1111"})
        expected = pipe(request(Lora(folder / "attention.safetensors", 0.7))).pixels[0]
        for job in (4, 5):
            image = np.frombuffer(host.wait("done", "failed", job=job)["blob"], np.uint8)
            assert np.abs(image.reshape(64, 64, 3).astype(int) - expected).max() <= 1
    finally:
        host.close()


def test_the_command_line(
    small_bundle: Path, folder: Path, tmp_path: Path, pipe: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "attention.safetensors"
    common = [
        "generate",
        str(small_bundle),
        "--steps",
        "2",
        "--size",
        "64x64",
        "--seed",
        "7",
        "--backend",
        "onnxruntime",
        "--quiet",
    ]
    assert main([*common, "a cat", "--lora", f"{file}:0.7", "-o", str(tmp_path / "a.png")]) == 0
    assert main([*common, "a cat<lora:attention:0.7>", "--lora-dir", str(folder), "-o", str(tmp_path / "b.png")]) == 0
    images = [image_from_png((tmp_path / name).read_bytes()) for name in ("a.png", "b.png")]
    expected = pipe(request(Lora(file, 0.7))).pixels[0]
    assert all(np.abs(image.astype(int) - expected).max() <= 1 for image in images)
    assert main([*common, "a cat", "--lora-dir", str(folder), "-o", str(tmp_path / "c.png")]) == 2
    assert "--lora-dir" in capsys.readouterr().err
    assert main(["lora", "inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == {"4": 40}
    assert main(["lora", "inspect", str(file)]) == 0
    assert "lora (40)" in capsys.readouterr().out
    assert main(["lora", "inspect", str(tmp_path / "none.safetensors")]) == 2


def test_the_pool_s_bound_in_bytes(small_bundle: Path, folder: Path) -> None:
    """The UNet's engine alone changes. A set has room if its file and those of the others are within the bound."""
    files = [Lora(folder / name, 0.7, 0.0) for name in ("attention.safetensors", "whole.safetensors")]
    sets = [request(file) for file in (*files, Lora(files[0].path, 0.3, 0.0))]
    with Pipeline.open(small_bundle, backend="onnxruntime") as pipe:
        sizes = {spec.component: pipe.bundle.manifest.size_of(spec) for spec in pipe.engines.chosen}
        assert pipe.engines.most_sets == 2
    unet, both = sizes["unet"], sizes["unet"] + sizes["text_encoder"]
    for memory, kept, most in ((3 * unet, 3, 3 * unet // both), (2 * unet + 1, 2, 2 * unet // both or 1), (0, 1, 1)):
        options = EngineOptions(lora_memory=memory)
        with Pipeline.open(small_bundle, backend="onnxruntime", options=options) as pipe:
            for each in sets:
                pipe(each)
            assert len(pipe.engines._adapted._sets) == kept
            assert pipe.engines.most_sets == max(1, most)
    with pytest.raises(SettingError, match="lora_memory -1: expected a whole number, 0 or more"):
        EngineOptions(lora_memory=-1)
