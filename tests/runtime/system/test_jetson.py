from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdruntime.system.jetson import jetson

RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, text in (("etc/nv_tegra_release", RELEASE), ("proc/device-tree/model", "NVIDIA Jetson Orin Nano\0")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_another_machine_is_no_jetson(tmp_path: Path) -> None:
    assert jetson(tmp_path) is None


def test_board_release_and_power_mode_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = root / "nvpmodel"
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 2\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(root), prepend=":")
    found = jetson(root)
    assert found is not None
    assert (found.model, found.release, found.power_mode) == ("NVIDIA Jetson Orin Nano", "36.4.3", "MAXN_SUPER")
    assert found.hint is not None
    assert found.hint.startswith("sudo apt install python3-libnvinfer")


def test_the_system_s_tensorrt_is_found_for_this_python(root: Path) -> None:
    (root / "usr/lib" / f"python3.{sys.version_info.minor}" / "dist-packages" / "tensorrt").mkdir(parents=True)
    found = jetson(root)
    assert found is not None
    assert found.hint == "JetPack installs TensorRT for the system's Python: use python3 -m venv --system-site-packages VENV"
