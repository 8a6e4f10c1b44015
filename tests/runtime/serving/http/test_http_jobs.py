"""The native API over a real server: submit, watch, fetch, finish, cancel; and the images of requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server is an extra")
pytest.importorskip("starlette", reason="the server is an extra")
from servers import Server

from sdruntime.__main__ import main
from sdruntime.pipeline.images.png import png_from_image

pytestmark = pytest.mark.slow
LONG = 900  # steps: longer than a test needs


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    started = Server(
        bundle, "--max-steps", "900", "--max-pixels", "65536", "--max-images", "4", "--max-jobs", "12", "--queue", "8"
    )
    yield started
    started.stop()


def file(pixels: np.ndarray) -> str:
    return base64.b64encode(png_from_image(pixels)).decode()


def image(seed: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_job_gives_the_file_that_the_command_line_writes(server: Server, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    words = ["a (cat:1.2)", "--steps", "3", "--seed", "11", "--size", "64x64", "--negative", "dog", "-o", str(out)]
    assert main(["generate", str(bundle), "--backend", "fake", *words]) == 0
    job = server.over(server.submit(prompt="a (cat:1.2)", steps=3, seed=11, negative="dog"))
    assert (job["state"], job["seed"], job["width"], job["height"], job["model"]) == ("done", 11, 64, 64, "tiny")
    answer = server.get(job["image"])
    assert answer.body == out.read_bytes()
    assert answer.headers["content-type"] == "image/png"
    assert job["parameters"].startswith("a (cat:1.2)\nNegative prompt: dog\nSteps: 3")


def test_several_images_have_seeds_one_after_the_other(server: Server) -> None:
    jobs = server.post("/v1/jobs", {"prompt": "x", "n": 3, "seed": 2**64 - 2, "steps": 1, "width": 64, "height": 64}).json["jobs"]
    assert [server.over(job)["seed"] for job in jobs] == [2**64 - 2, 2**64 - 1, 0]
    listed = [job["id"] for job in server.get("/v1/jobs").json["jobs"]]
    assert [job["id"] for job in reversed(jobs)] == listed[:3]


def test_events_tell_of_every_change(server: Server) -> None:
    job = server.submit(steps=5)
    seen = [(name, data["state"], data["step"]) for name, data in server.events(f"/v1/jobs/{job['id']}/events") if name == "job"]
    assert seen[-1] == ("job", "done", 5)
    assert [step for _, _, step in seen] == sorted(step for _, _, step in seen)
    again = list(server.events(f"/v1/jobs/{job['id']}/events"))
    assert [(name, data["state"]) for name, data in again] == [("job", "done")]


def test_other_formats_are_answered(server: Server) -> None:
    pillow = pytest.importorskip("PIL.Image")
    job = server.over(server.submit())
    for kind in ("jpeg", "webp"):
        answer = server.get(f"{job['image']}?format={kind}")
        assert answer.headers["content-type"] == f"image/{kind}"
        with pillow.open(io.BytesIO(answer.body)) as opened:
            assert opened.size == (64, 64)
    assert server.get(f"{job['image']}?format=gif").status == 422


def test_jobs_are_cancelled_and_finished(server: Server) -> None:
    first, second = server.submit(steps=LONG), server.submit(steps=LONG)
    server.running(first)
    assert server.get(f"/v1/jobs/{first['id']}/image").code == "not_finished"
    server.ask("DELETE", f"/v1/jobs/{second['id']}")
    server.ask("POST", f"/v1/jobs/{first['id']}/finish")
    assert server.over(second)["state"] == "cancelled"
    done = server.over(first)
    assert (done["state"], done["step"]) == ("done", LONG)
    assert server.get(done["image"]).status == 200
    assert server.get(f"/v1/jobs/{second['id']}/image").code == "cancelled"
    assert server.ask("DELETE", f"/v1/jobs/{first['id']}").json["state"] == "done"


def test_an_idempotency_key_repeats_no_work(server: Server) -> None:
    body = {"prompt": "x", "steps": 1, "width": 64, "height": 64}
    first, second = (server.post("/v1/jobs", body, Idempotency_Key="k1").json["jobs"] for _ in range(2))
    assert [job["id"] for job in first] == [job["id"] for job in second]
    conflict = server.post("/v1/jobs", {**body, "steps": 2}, Idempotency_Key="k1")
    assert (conflict.status, conflict.code) == (409, "idempotency_conflict")
    assert server.post("/v1/jobs", body, Idempotency_Key="k2").json["jobs"][0]["id"] != first[0]["id"]


def test_a_start_image_and_a_mask(server: Server, bundle: Path, tmp_path: Path) -> None:
    start, mask = image(), np.zeros((64, 64, 3), np.uint8)
    mask[:, 32:] = 255
    job = server.over(server.submit(width=None, height=None, image=file(start), mask=file(mask), strength=0.75, steps=4))
    for name, pixels in (("start", start), ("mask", mask)):
        (tmp_path / f"{name}.png").write_bytes(png_from_image(pixels))
    words = ["--image", str(tmp_path / "start.png"), "--mask", str(tmp_path / "mask.png"), "--strength", "0.75", "--steps", "4"]
    out = ["--seed", "7", "-o", str(tmp_path / "out.png")]
    assert main(["generate", str(bundle), "a cat", "--backend", "fake", *words, *out]) == 0
    assert server.get(job["image"]).body == (tmp_path / "out.png").read_bytes()


def test_a_form_is_read_like_a_document(server: Server) -> None:
    parts = [
        *(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}' for name, value in (("prompt", "a cat"),)),
        'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n',
    ]
    body = b"".join(
        b"--b\r\n" + part.encode() + (png_from_image(image()) if "filename" in part else b"") + b"\r\n" for part in parts
    )
    answer = server.ask("POST", "/v1/jobs", body + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status == 202, answer.body
    assert server.over(answer.json["jobs"][0])["width"] == 64


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"prompt": 5}, 422, "prompt"),
        ({"steps": 0}, 422, "steps 0 is outside"),
        ({"steps": 901}, 422, "steps 901: at most 900 on this server"),
        ({"width": 512, "height": 512}, 422, "an image of 262,144 pixels: at most 65,536"),
        ({"width": 128, "height": 128, "hires": 4}, 422, "an image of 262,144 pixels"),
        ({"n": 5}, 422, "n 5: expected a whole number from 1 to 4"),
        ({"n": True}, 422, "n True"),
        ({"sampler": "nothing"}, 422, "unknown sampler"),
        ({"unknown": 1}, 422, "unknown"),
        ({"model": "other"}, 404, "unknown model 'other'"),
        ({"prompt": "x" * 30_000}, 422, "prompts of 30,000 letters: at most 20,000"),
        ({"image": "/etc/passwd"}, 422, "image: not base64"),
        ({"image": "https://example.org/a.png"}, 422, "image: not base64"),
        ({"image": base64.b64encode(b"GIF89a").decode()}, 422, "image: not an image"),
        ({"image": 5}, 422, "image: expected a file as base64"),
        ({"mask": "AAAA"}, 422, "mask"),
        ({"controls": {}}, 422, "controls: expected a list"),
        ({"image_prompt_mask": {}}, 422, "image_prompt_mask: expected a list"),
        ({"image_prompt_mask": ["AAAA"]}, 422, "image_prompt_mask[0]: not an image"),
        ({"controls": [{}]}, 422, "controls[0]: expected an object with an"),
        ({"loras": [{"name": "x"}]}, 422, "not available on this server"),
        ({"loras": [{"path": "/x"}]}, 422, "loras: expected a list"),
        ({"prompt": "<lora:x:1>"}, 422, "--lora-dir"),
    ],
)
def test_a_wrong_document_is_refused_before_any_work(server: Server, fields: dict[str, Any], status: int, text: str) -> None:
    answer = server.post("/v1/jobs", {"prompt": "x", "width": 64, "height": 64, "steps": 1, **fields})
    assert answer.status == status, answer.body
    assert text in answer.json["error"]["message"]


def test_images_over_the_limit_and_of_other_sizes_are_refused(server: Server) -> None:
    large = server.post("/v1/jobs", {"prompt": "x", "image": file(image(0, 320, 320))})
    assert (large.status, large.code) == (422, "image_too_large")
    other = server.post("/v1/jobs", {"prompt": "x", "image": file(image()), "mask": file(image(0, 32, 32))})
    assert "must be equal" in other.json["error"]["message"]


def test_what_the_engines_do_not_take_is_the_job_s_own_failure(server: Server) -> None:
    job = server.over(server.submit(width=72, height=8))
    if job["state"] == "failed":
        assert server.get(f"/v1/jobs/{job['id']}/image").status == 422


def test_a_full_queue_and_a_greedy_client_are_told_when_to_come_again(server: Server) -> None:
    jobs = [server.submit(steps=LONG) for _ in range(4)]
    try:
        server.running(jobs[0])
        while True:
            answer = server.post("/v1/jobs", {"prompt": "x", "steps": LONG, "width": 64, "height": 64, "n": 4})
            if answer.status != 202:
                break
            jobs += answer.json["jobs"]
        assert (answer.status, answer.headers["retry-after"]) == (429, "5")
        assert answer.code in ("queue_full", "too_many_jobs")
        waiting = [job for job in map(server.job, jobs) if job["state"] == "waiting"]
        assert [job["position"] for job in waiting] == list(range(len(waiting)))
    finally:
        for job in jobs:
            server.ask("DELETE", f"/v1/jobs/{job['id']}")
    assert {server.over(job)["state"] for job in jobs} == {"cancelled"}


def test_unknown_routes_and_jobs_are_told_as_json(server: Server) -> None:
    assert (server.get("/nothing").status, server.get("/nothing").code) == (404, "not_found")
    assert server.get("/v1/jobs/").status == 404  # and no redirection
    assert server.ask("PUT", "/v1/jobs", {}).status == 405
    assert server.get("/v1/jobs/none").code == "no_such_job"
    assert server.ask("POST", "/v1/jobs", b"{").code == "invalid_json"
    assert server.ask("POST", "/v1/jobs", b"[" * 100_000).code == "invalid_json"
    assert server.post("/v1/jobs", []).code == "invalid_request"
