"""Take the picture of the server's page: python docs/page.py BUNDLE, where BUNDLE is that of examples/shapes. Needs Chromium."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from sdruntime.system.process import module_command

PICTURE = Path(__file__).with_name("page.webp")
PROMPTS = (
    "a large green square on the right on a white background",
    "a small green cross on the right on a white background",
)


def picture(address: str) -> bytes:
    """Return the page as a PNG, with three images of two prompts."""
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(base_url=address, viewport={"width": 1280, "height": 800})
        page.goto("/")
        page.locator("#connection.ready").wait_for()
        for seed, prompt in enumerate(PROMPTS):
            for label, value in {"Prompt": prompt, "Guidance": "2", "Seed": str(seed + 1), "Images": "3"}.items():
                page.get_by_label(label, exact=True).fill(value)
            page.get_by_role("button", name="Generate").click()
            page.locator("#gallery li[data-state=done]").nth(3 * seed + 2).wait_for()
        return page.screenshot()


def main(bundle: str) -> None:
    command = module_command("sdruntime", "serve", bundle, "--port", "0", "--log", "json")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            data = picture(json.loads(server.stderr.readline())["address"])
        finally:
            server.terminate()
            server.stderr.read()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(PICTURE, quality=82, method=6)


if __name__ == "__main__":
    main(sys.argv[1])
