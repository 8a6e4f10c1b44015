"""Checks, latencies and reports on a machine with an NVIDIA GPU. See benchmarks/README.md, "On a GPU"."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("sdruntime") is None:  # a copied source tree, with nothing installed
    sys.path.insert(0, str(ROOT / "runtime"))
