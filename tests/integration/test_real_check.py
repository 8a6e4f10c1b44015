"""`make real-check` on the shapes example, which is small and trained, and its table in docs/verification.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import real_check


def test_the_page_shows_the_rows_that_are_there() -> None:
    page = real_check.PAGE.read_text(encoding="utf-8")
    rows = real_check.rows_of(real_check.ROWS)
    assert page == real_check.with_table(page, rows)
    assert (real_check.NOBODY in page) == (not rows)


def test_a_row_becomes_a_line_and_a_failure_shows() -> None:
    steps = {"build": "ok", "verify": "not there", "pictures": "ValueError: PSNR 12 dB"}
    found = {"steps": steps, "size": [512, 512], "psnr": [50.0, 12.0], "ssim": [0.99, 0.4]}
    machine = {"processor": "A processor", "measured": "2026-01-01"}
    text = real_check.table([{"model": "owner/name", "machine": machine, "checks": {"fp16": found}}])
    line = (
        "| owner/name | fp16 | 512×512 | 2 | 12.0 dB | 0.4000 | build ok, verify no, pictures FAILED | A processor, 2026-01-01 |"
    )
    assert text.splitlines()[-1] == line


def test_a_model_that_is_not_there_is_a_row_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["no-such-model", "--rows", str(tmp_path / "rows.jsonl"), "--work", str(tmp_path), "--precision", "fp32"]
    assert real_check.main(arguments) == 1
    (row,) = real_check.rows_of(tmp_path / "rows.jsonl")
    assert "failed with exit code 2" in row["checks"]["fp32"]["steps"]["build"]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.full
def test_the_shapes_checkpoint_passes(shapes_checkpoint: Path, tmp_path: Path, trace_cache: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    options = ["--rows", str(rows), "--work", str(tmp_path / "work"), "--steps", "4", "--prompts", "2"]
    assert real_check.main([str(shapes_checkpoint), *options]) == 0
    row = json.loads(rows.read_text(encoding="utf-8"))
    assert row["checks"].keys() == {"fp32", "fp16"}
    for precision, found in row["checks"].items():
        assert len(found["psnr"]) == len(found["ssim"]) == 2
        assert min(found["psnr"]) >= real_check.FLOORS[precision][0]
        assert found["least_deviation"] >= 10
    assert str(tmp_path) not in rows.read_text(encoding="utf-8")
