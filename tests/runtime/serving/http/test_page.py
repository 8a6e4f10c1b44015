"""The page at `/` in Chromium: its controls, a reload, two tabs, a server that goes away, a narrow screen.

Every test fails on an error in the console, which includes what the Content-Security-Policy refuses.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server is an extra")
pytest.importorskip("starlette", reason="the server is an extra")
pytest.importorskip("playwright", reason="drives the browser")
from playwright import sync_api
from servers import Server

from sdruntime.pipeline.images.imagefile import image_from_bytes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
LONG = "900"  # steps: longer than a test needs
PATIENCE = 60_000  # milliseconds, for a busy machine
expect = sync_api.expect
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a bundle that has weights for previews."""
    folder = tmp_path_factory.mktemp("page") / "tiny"
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = [[0.2] * manifest["model"]["latent_channels"]] * 3
    manifest["model"]["preview"] = {"weights": weights, "bias": [0.1, 0.2, 0.3], "psnr": 10.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    started = Server(folder, "--max-steps", LONG, "--max-pixels", "65536", "--max-images", "4", "--running", "1")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A browser without history, and what its console says."""

    def __init__(self, chromium: Any, address: str, **options: Any) -> None:
        self.context = chromium.new_context(base_url=address, **options)
        self.context.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.context.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def page(self) -> Any:
        page = self.context.new_page()
        page.goto("/")
        expect(page.locator("#connection")).to_have_text("Ready")
        return page


@pytest.fixture
def visit(chromium: Any, server: Server) -> Iterator[Visit]:
    started = Visit(chromium, server.url)
    yield started
    started.context.close()
    assert started.errors == []


def pixels_of(file: str) -> np.ndarray:
    return image_from_bytes(base64.b64decode(file))


def generate(page: Any, prompt: str = "a red fox", **fields: str) -> Any:
    """Fill the form, and submit it. Returns the newest card."""
    for label, value in {"Prompt": prompt, "Width": "64", "Height": "64", "Steps": "2", **fields}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Generate").click()
    return page.locator("#gallery li").first


def test_an_image_is_generated_and_kept(visit: Visit, server: Server) -> None:
    page = visit.page()
    card = generate(page, Seed="7", Images="2")
    expect(page.locator("#gallery img")).to_have_count(2)
    card.get_by_role("button").click()
    viewer = page.get_by_role("dialog")
    expect(viewer.locator("pre")).to_contain_text("Seed: 8")
    page.keyboard.press("ArrowRight")
    expect(viewer.locator("pre")).to_contain_text("Seed: 7")
    with page.expect_download() as download:
        viewer.get_by_text("Download").click()
    made = server.over(server.submit(prompt="a red fox", seed=7, steps=2))
    assert Path(download.value.path()).read_bytes() == server.get(made["image"]).body
    assert download.value.suggested_filename == "tiny-7.png"
    page.keyboard.press("Escape")
    expect(viewer).to_have_count(0)
    page.reload()
    expect(page.locator("#gallery img")).to_have_count(2)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red fox")


def test_two_images_are_compared(visit: Visit) -> None:
    page = visit.page()
    generate(page, Images="2")
    expect(page.locator("#gallery img")).to_have_count(2)
    page.get_by_role("button", name="Open").first.click()
    page.get_by_role("button", name="Compare").click()
    over = page.get_by_alt_text("Compared with: a red fox")
    expect(over).to_be_visible()
    assert over.get_attribute("src") != page.locator("figure img").first.get_attribute("src")
    slider = page.get_by_label("Where the two images meet")
    slider.fill("20")
    assert "80%" in over.evaluate("image => image.style.clipPath")
    boxes = [page.locator("figure img").nth(k).bounding_box() for k in range(2)]
    assert boxes[0] == boxes[1]
    page.get_by_role("button", name="Compare").click()
    expect(over).to_have_count(0)


def test_settings_of_an_image_are_one_click_away(visit: Visit) -> None:
    page = visit.page()
    page.get_by_label("Sampler").select_option("heun")
    page.get_by_label("Schedule").select_option("karras")
    card = generate(page, "an owl <b>", Seed="11", Guidance="3.5", **{"Negative prompt": "dull"})
    expect(card.locator("img")).to_be_visible()
    page.get_by_label("Sampler").select_option("")
    page.get_by_label("Prompt", exact=True).fill("other")
    card.get_by_role("button").click()
    page.get_by_role("button", name="Use these").click()
    for label, value in {
        "Prompt": "an owl <b>",
        "Negative prompt": "dull",
        "Seed": "11",
        "Guidance": "3.5",
        "Steps": "2",
    }.items():
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    expect(page.get_by_label("Sampler")).to_have_value("heun")
    expect(page.get_by_label("Schedule")).to_have_value("karras")
    card.get_by_role("button").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#gallery li")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()


def test_progress_preview_and_both_ends(visit: Visit) -> None:
    page = visit.page()
    first = generate(page, "first", Steps=LONG)
    expect(first.locator(".state")).to_contain_text(f"of {LONG}")
    expect(first.get_by_alt_text("Preview")).to_be_visible()
    generate(page, "second", Steps=LONG)
    generate(page, "third", Steps=LONG)
    card = {name: page.locator("#gallery li", has_text=name) for name in ("first", "second", "third")}
    expect(card["third"].locator(".state")).to_contain_text("Waiting")
    card["third"].get_by_role("button", name="Stop").click()
    expect(card["third"]).to_contain_text("Cancelled")
    card["first"].get_by_role("button", name="Finish now").click()
    expect(card["first"].get_by_role("button", name="Open")).to_be_visible()
    card["second"].get_by_role("button", name="Stop").click()
    expect(card["second"]).to_contain_text("Cancelled")
    card["second"].get_by_role("button", name="Delete").click()
    expect(page.locator("#gallery li")).to_have_count(2)


def test_a_job_outlives_a_reload_and_shows_in_other_tabs(visit: Visit) -> None:
    page, other = visit.page(), visit.page()
    generate(page, Steps=LONG)
    expect(other.locator(".state")).to_contain_text(f"of {LONG}")
    page.reload()
    expect(page.locator(".state")).to_contain_text(f"of {LONG}")
    other.get_by_role("button", name="Finish now").click()
    for tab in (page, other):
        expect(tab.get_by_role("button", name="Open")).to_be_visible()
    page.get_by_role("button", name="Open").click()
    page.get_by_role("button", name="Delete").click()
    expect(other.locator("#gallery li")).to_have_count(0)


def test_an_error_stands_at_its_field(visit: Visit) -> None:
    page = visit.page()
    generate(page, Steps="5000")
    steps = page.get_by_label("Steps", exact=True)
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_contain_text("steps")
    steps.fill("2")
    expect(page.locator("#problem")).to_be_empty()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("button", name="Open")).to_be_visible()
    assert [error for error in visit.errors if "422" not in error] == []
    visit.errors.clear()


def test_a_start_image_its_mask_and_the_settings_of_a_file(visit: Visit, server: Server, tmp_path: Path) -> None:
    job = server.over(server.submit(prompt="an owl", sampler="euler", seed=5, steps=3))
    file = tmp_path / "owl.png"
    file.write_bytes(server.get(job["image"]).body)
    page = visit.page()
    page.get_by_text("Start image, mask and extension").click()
    page.locator("#file").set_input_files(file)
    canvas = page.get_by_label("Start image: paint")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 10, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    for name in ("Invert", "Undo"):
        page.get_by_role("button", name=name).click()
    with page.expect_request(lambda request: request.method == "POST" and request.url.endswith("/v1/jobs")) as sent:
        card = generate(page, "a fox")
    expect(card.get_by_role("button", name="Open")).to_be_visible()
    fields = sent.value.post_data_json
    assert (fields["strength"], "width" in fields) == (0.75, False)
    assert np.array_equal(pixels_of(fields["image"]), image_from_bytes(file.read_bytes()))
    mask = pixels_of(fields["mask"])[..., 0]
    assert (mask[32, 32], mask[2, 32], mask[62, 32]) == (255, 0, 0)

    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Right", exact=True).fill("64")
    generate(page, "wider")
    card = page.locator("#gallery li", has_text="wider")
    expect(card.get_by_role("button", name="Open")).to_be_visible()
    card.get_by_role("button").click()
    expect(page.locator("#parameters")).to_contain_text("Size: 128x64")
    page.get_by_role("button", name="Close").click()

    page.get_by_role("button", name="Use the settings in this file").click()
    for label, value in {"Prompt": "an owl", "Seed": "5", "Steps": "3"}.items():
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    expect(page.get_by_label("Sampler")).to_have_value("euler")
    expect(canvas).to_be_hidden()


def test_control_images_go_to_the_networks_of_the_model(visit: Visit, server: Server, tmp_path: Path) -> None:
    job = server.over(server.submit(prompt="edges", steps=2))  # now the server knows what its model is able to do
    file = tmp_path / "edges.png"
    file.write_bytes(server.get(job["image"]).body)

    def with_networks(route: Any) -> None:
        answer = route.fetch()
        document = answer.json()
        document["models"][0]["abilities"]["controlnets"] = ["canny", "pose"]
        route.fulfill(response=answer, json=document)

    visit.context.route("**/v1/capabilities", with_networks)
    visit.context.route("**/v1/jobs", lambda route: route.fulfill(status=202, json={"jobs": []}))
    page = visit.page()
    page.get_by_label("Add a control image").set_input_files(file)
    row = page.locator("#controls li")
    row.get_by_label("Network of the control image").select_option("pose")
    row.get_by_label("What it reads").select_option("canny")
    row.get_by_label("Scale").fill("0.6")
    row.get_by_label("End").fill("0.8")
    fields = submitted(page)
    [control] = fields["controls"]
    assert np.array_equal(pixels_of(control.pop("image")), image_from_bytes(file.read_bytes()))
    assert control == {"net": "pose", "preprocess": "canny", "scale": 0.6, "start": 0, "end": 0.8}
    row.get_by_role("button", name="Remove the control image").click()
    expect(row).to_have_count(0)
    assert "controls" not in submitted(page)


def submitted(page: Any) -> dict[str, Any]:
    """Generate, and return the request."""
    with page.expect_request(lambda request: request.method == "POST" and request.url.endswith("/v1/jobs")) as sent:
        generate(page)
    fields: dict[str, Any] = sent.value.post_data_json
    return fields


def test_a_server_that_goes_away_and_comes_back(chromium: Any, bundle: Path) -> None:
    first = Server(bundle, "--max-steps", LONG)
    visit = Visit(chromium, first.url)
    try:
        page = visit.page()
        expect(generate(page, "before", Steps=LONG).locator(".state")).to_contain_text(f"of {LONG}")
        first.process.kill()
        first.wait()
        expect(page.locator("#connection")).to_contain_text("Offline")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#problem")).to_contain_text("cannot be reached")
        second = Server(bundle, "--max-steps", LONG, "--port", str(first.port))
        try:
            expect(page.locator("#connection")).to_have_text("Ready")
            expect(page.locator("#gallery li", has_text="before")).to_contain_text("restarted")
            expect(generate(page, "after").get_by_role("button", name="Open")).to_be_visible()
        finally:
            second.stop()
    finally:
        first.stop()
        visit.context.close()
    assert [error for error in visit.errors if "Failed to load resource" not in error] == []


def test_a_token_is_the_password(chromium: Any, bundle: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret-token-of-this-test-0123456789")
    server = Server(bundle, "--token", token)
    try:
        answer = server.get("/")
        assert (answer.status, answer.headers["www-authenticate"].split()[0]) == (401, "Basic")
        visit = Visit(chromium, server.url, http_credentials={"username": "any", "password": token.read_text()})
        expect(generate(visit.page()).get_by_role("button", name="Open")).to_be_visible()
        visit.context.close()
    finally:
        server.stop()


def test_on_a_narrow_screen_nothing_is_cut_off(visit: Visit) -> None:
    page = visit.page()
    page.set_viewport_size({"width": 360, "height": 740})
    expect(generate(page, "x" * 200).get_by_role("button", name="Open")).to_be_visible()
    wide = "() => document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(wide) <= 0
    page.get_by_role("button", name="Open").click()
    assert page.evaluate("() => document.querySelector('dialog').scrollWidth <= innerWidth")
    page.get_by_role("button", name="Close").click()


def test_the_files_are_cached_by_their_content(server: Server) -> None:
    first = server.get("/")
    assert first.status == 200
    assert "default-src 'self'" in first.headers["content-security-policy"]
    again = server.get("/", If_None_Match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert server.get("/page/..%2Ffiles.py").status == 404
    assert server.get("/favicon.ico").headers["content-type"] == "image/svg+xml"


def test_capabilities_and_the_settings_of_a_file(server: Server) -> None:
    described = server.get("/v1/capabilities").json
    [model] = described["models"]
    assert (model["name"], model["stage"], model["abilities"]["size"]) == ("tiny", "ready", [512, 512])
    assert described["limits"]["steps"] == int(LONG)
    job = server.over(server.submit(prompt="an owl", sampler="euler", seed=5))
    read = server.post("/v1/settings", {"parameters": job["parameters"]}).json
    assert {"prompt": "an owl", "sampler": "euler", "seed": 5, "steps": 2, "width": 64}.items() <= read["fields"].items()
    assert server.post("/v1/settings", {}).status == 422
    assert server.post("/v1/settings", {"image": "AAAA"}).code == "invalid_image"


@pytest.mark.full
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_axe_finds_nothing_serious(chromium: Any, server: Server, tmp_path: Path, scheme: str, width: int) -> None:
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    packed = subprocess.run(["npm", "pack", "--silent", "axe-core@4"], cwd=tmp_path, capture_output=True, text=True, check=False)
    if packed.returncode:
        pytest.skip(f"npm has no axe-core: {packed.stderr.strip()[:200]}")
    with tarfile.open(next(tmp_path.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        axe = member.read().decode()
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}, "bypass_csp": True}
    visit = Visit(chromium, server.url, **options)
    page = visit.page()
    expect(generate(page).get_by_role("button", name="Open")).to_be_visible()
    generate(page, Steps="5000")
    expect(page.locator("#problem")).not_to_be_empty()
    page.evaluate(axe)
    for _ in range(2):
        violations = page.evaluate("async () => (await axe.run()).violations")
        assert [found["id"] for found in violations if found["impact"] in ("serious", "critical")] == []
        if page.get_by_role("dialog").count() == 0:
            page.get_by_role("button", name="Open").click()
    visit.context.close()
