"""The examples of docs/api.md run as they stand, with `sd15` a small bundle."""

from __future__ import annotations

from pathlib import Path

import loras
import pytest
from api_page import EXAMPLES, PAGE

import sdruntime
from sdruntime.backends.onnx_file.stored import weight_tensors
from sdruntime.bundle.bundle import Bundle


def test_no_example_is_missed() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == PAGE.count("```") / 2 >= 9


def test_every_class_that_has_a_section_has_an_example() -> None:
    """Except of what a call returns, which the other examples use."""
    sections = {name for name in sdruntime.__all__ if f"\n## {name}\n" in PAGE}
    assert sections - set(EXAMPLES) == {"Result"}


@pytest.mark.parametrize("heading", EXAMPLES)
def test_it_runs(heading: str, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd15").symlink_to(small_bundle)
    weights = weight_tensors(Bundle.open(small_bundle), "unet")
    lora = loras.kohya({"unet": {name: tensor.shape for name, tensor in weights.items()}})
    loras.write(tmp_path / "watercolor.safetensors", lora)
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[heading], heading, "exec"), {"__name__": heading})
