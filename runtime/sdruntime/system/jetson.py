"""What a Jetson reports about itself: board, L4T release, power mode."""

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
    """`release` is L4T's, such as "36.4.3" (JetPack 6.2); "" for what could not be read."""

    model: str
    release: str
    power_mode: str
    system_tensorrt: bool  # JetPack's bindings lie among the system's packages for this Python

    @property
    def hint(self) -> str | None:
        """How this interpreter gets to JetPack's TensorRT, where it does not see it."""
        if not self.system_tensorrt:
            return "sudo apt install python3-libnvinfer, then a venv that sees it: python3 -m venv --system-site-packages VENV"
        return "JetPack installs TensorRT for the system's Python: use python3 -m venv --system-site-packages VENV"


def jetson(root: Path = Path("/")) -> Jetson | None:
    """The Jetson that this process runs on; None elsewhere."""
    release = _text(root / "etc/nv_tegra_release")
    if not release:
        return None
    found = re.search(r"R(\d+).*?REVISION: *([\d.]+)", release)
    folder = root / "usr/lib" / f"python3.{sys.version_info.minor}" / "dist-packages"
    return Jetson(
        model=_text(root / "proc/device-tree/model").rstrip("\0\n"),
        release=f"{found[1]}.{found[2]}" if found else "",
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
        told = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=_TIMEOUT, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"Power Mode: *(\S+)", told)
    return found[1] if found else ""
