"""Describe a Jetson: board, L4T release, power mode."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT = 5  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Jetson:
    """A Jetson. `release`: the L4T release, such as "36.4.3" (JetPack 6.2). A text that cannot be read is ""."""

    model: str
    release: str
    power_mode: str
    system_tensorrt: bool  # JetPack's Python bindings are installed for this version of the system's Python

    @property
    def hint(self) -> str | None:
        """How to use JetPack's TensorRT from an interpreter that does not find it."""
        if not self.system_tensorrt:
            return "sudo apt install python3-libnvinfer, then a venv that uses it: python3 -m venv --system-site-packages VENV"
        return "JetPack installs TensorRT for the system's Python: use python3 -m venv --system-site-packages VENV"


def jetson(root: Path = Path("/")) -> Jetson | None:
    """Return the Jetson that this process runs on, or None on any other machine."""
    release = _text(root / "etc/nv_tegra_release")
    if not release:
        return None
    version = re.search(r"R(\d+).*?REVISION: *([\d.]+)", release)
    folder = root / "usr/lib" / f"python3.{sys.version_info.minor}" / "dist-packages"
    return Jetson(
        model=_text(root / "proc/device-tree/model").rstrip("\0\n"),
        release=f"{version[1]}.{version[2]}" if version else "",
        power_mode=_power_mode(),
        system_tensorrt=(folder / "tensorrt").is_dir(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _power_mode() -> str:
    tool = shutil.which("nvpmodel")
    if tool is None:
        return ""
    try:
        output = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=_TIMEOUT, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    mode = re.search(r"Power Mode: *(\S+)", output)
    return mode[1] if mode else ""
