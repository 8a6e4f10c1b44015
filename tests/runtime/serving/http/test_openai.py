"""OpenAI's own client against the server."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server is an extra")
pytest.importorskip("starlette", reason="the server is an extra")
pytest.importorskip("openai", reason="the client under test")
pytest.importorskip("PIL.Image", reason="the server is an extra")
import openai
import PIL.Image
from servers import WAIT, Server

from sdruntime.__main__ import main
from sdruntime.pipeline.images.png import image_from_png, png_from_image, text_from_png

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TOKEN = "a-token-of-some-length"
SMALL: dict[str, Any] = {"size": "64x64", "extra_body": {"steps": 2, "seed": 7}}


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN + "\n")
    started = Server(bundle, "--token", token, "--max-steps", "900")
    yield started
    started.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0, timeout=WAIT) as opened:
        yield opened


def noise(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, channels), np.uint8)


def test_an_image_is_the_one_of_the_command_line(client: Any, bundle: Path, tmp_path: Path) -> None:
    answer = client.images.generate(prompt="a cat", n=2, **SMALL)
    out = tmp_path / "a.png"
    words = ["a cat", "--steps", "2", "--seed", "7", "--size", "64x64", "-o", str(out)]
    assert main(["generate", str(bundle), "--backend", "fake", *words]) == 0
    files = [base64.b64decode(image.b64_json) for image in answer.data]
    assert files[0] == out.read_bytes()
    assert ", Seed: 8," in text_from_png(files[1])["parameters"]
    assert (answer.size, answer.output_format) == ("64x64", "png")
    assert abs(answer.created - time.time()) < WAIT


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "sdruntime"
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.images.generate(prompt="x", model="other", **SMALL)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_formats(client: Any, form: str) -> None:
    answer = client.images.generate(prompt="x", output_format=form, output_compression=80, **SMALL)
    with PIL.Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
        assert (image.format, image.size) == (form.upper(), (64, 64))


def test_a_url_leads_to_the_image(client: Any, server: Server) -> None:
    answer = client.images.generate(prompt="x", response_format="url", **SMALL)
    url = answer.data[0].url
    assert url.startswith(server.url)
    got = server.get(url.removeprefix(server.url), Authorization=f"Bearer {TOKEN}")
    assert image_from_png(got.body).shape == (64, 64, 3)


def test_a_stream_ends_with_the_image(client: Any) -> None:
    """The bundle has no weights for previews, so there are no partial images."""
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=2, **SMALL))
    assert [event.type for event in events] == ["image_generation.completed"]
    plain = client.images.generate(prompt="a cat", **SMALL)
    assert events[0].b64_json == plain.data[0].b64_json


def test_an_edit_keeps_what_the_mask_does_not_show(client: Any) -> None:
    start, alpha = noise(), np.full((64, 64, 1), 255, np.uint8)
    alpha[:, 40:] = 0
    picture = ("a.png", png_from_image(start), "image/png")
    out = io.BytesIO()
    PIL.Image.fromarray(np.concatenate([start, alpha], axis=2)).save(out, "PNG")
    masks = {
        "transparent": out.getvalue(),
        "white": png_from_image(np.repeat(255 - alpha, 3, axis=2)),
    }
    edited = {
        name: client.images.edit(
            image=picture, mask=("m.png", data, "image/png"), prompt="x", extra_body={"steps": "3", "seed": "5"}
        )
        for name, data in masks.items()
    }
    first, second = (image_from_png(base64.b64decode(answer.data[0].b64_json)) for answer in edited.values())
    np.testing.assert_array_equal(first, second)
    own = client.images.edit(image=("a.png", out.getvalue(), "image/png"), prompt="x", extra_body={"steps": "3", "seed": "5"})
    np.testing.assert_array_equal(image_from_png(base64.b64decode(own.data[0].b64_json)), first)
    text = text_from_png(base64.b64decode(edited["white"].data[0].b64_json))["parameters"]
    assert "Mask hash: " in text
    assert "Denoising strength: 1," in text


def test_an_edit_of_another_size_and_several_images(client: Any) -> None:
    picture = ("a.png", png_from_image(noise()), "image/png")
    answer = client.images.edit(image=picture, prompt="x", size="128x64", extra_body={"steps": "2"})  # type: ignore[arg-type]
    assert image_from_png(base64.b64decode(answer.data[0].b64_json)).shape == (64, 128, 3)
    with pytest.raises(openai.UnprocessableEntityError, match="2 images: this model edits one"):
        client.images.edit(image=[picture, picture], prompt="x")


def test_a_variation(client: Any) -> None:
    answer = client.images.create_variation(image=("a.png", png_from_image(noise()), "image/png"), n=2)
    texts = [text_from_png(base64.b64decode(image.b64_json))["parameters"] for image in answer.data]
    assert all("Denoising strength: 0.6," in text for text in texts)
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"size": "64"}, "expected WIDTHxHEIGHT"),
        ({"output_format": "gif"}, "output_format 'gif'"),
        ({"output_format": "jpeg", "output_compression": 0}, "output_compression 0"),
        ({"n": 100}, "n 100: expected a whole number from 1 to 8"),
        ({"response_format": "file"}, "response_format"),
        ({"partial_images": 9}, "partial_images 9"),
        ({"extra_body": {"steps": "many"}}, "steps 'many': expected a number"),
        ({"extra_body": {"sampler": "nothing"}}, "unknown sampler"),
    ],
)
def test_what_is_wrong_is_an_error_of_the_client(client: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(**{"prompt": "x", **SMALL, **settings})
    assert text in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_a_wrong_token_is_refused(server: Server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.images.generate(prompt="x")
    basic = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
    assert server.get("/v1/models", Authorization=f"Basic {basic}").status == 200
    assert server.get("/v1/models").headers["www-authenticate"].startswith("Basic ")
    assert server.get("/healthz").body == b"ok"


def test_a_client_that_leaves_cancels_its_images(server: Server) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    body = {"prompt": "left", "size": "1024x1024", "steps": 900, "n": 3}
    with pytest.raises(TimeoutError):
        server.ask("POST", "/v1/images/generations", body, headers, timeout=0.5)
    deadline = time.monotonic() + WAIT
    while True:
        jobs = server.ask("GET", "/v1/jobs", headers=headers).json["jobs"][:3]
        if {job["state"] for job in jobs} == {"cancelled"}:
            break
        assert time.monotonic() < deadline, jobs
        time.sleep(0.05)


def test_the_description_names_every_route_and_field(server: Server) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    described = server.ask("GET", "/openapi.json", headers=headers).json
    assert described["openapi"] == "3.1.0"
    assert {"/v1/jobs", "/v1/jobs/{id}/events", "/v1/images/edits", "/metrics", "/readyz"} <= described["paths"].keys()
    job = described["components"]["schemas"]["Job"]
    assert {"prompt", "n", "image", "controls", "loras", "guidance_interval"} <= job["properties"].keys()
    assert job["required"] == ["prompt"]
    assert "path" not in json.dumps(job["properties"]["loras"])
