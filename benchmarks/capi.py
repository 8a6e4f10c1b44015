"""Measure the overhead of the C library: opening, trivial calls, and an image in a worker process compared to in-process.

python benchmarks/capi.py BUNDLE [--output benchmarks/results/capi.json]

The fake engines return at once, so only the overhead is measured. Both isolations run in turn, each round in its own process;
medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.serving.capi import build_library, compile_flags, link_flags

ROUNDS = 7
ISOLATIONS = ("in-process", "process")


def import_numpy() -> float:
    """Return the milliseconds of a Python process that only imports NumPy."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(options.bundle, Path(folder) / "bundle"))
        for _ in build_engines(bundle, BuildRequest(backend="fake", size="64x64:1024x1024")):
            pass
        prefix, program = Path(folder) / "prefix", Path(folder) / "capi"
        build_library(prefix)
        source = Path(__file__).with_suffix(".c")
        flags = ["-D_GNU_SOURCE", "-std=c99", "-O2", *compile_flags(), str(source), "-o", str(program), *link_flags(prefix)]
        subprocess.run(["cc", *flags], check=True)
        rounds: dict[str, list[dict[str, float]]] = {isolation: [] for isolation in ISOLATIONS}
        numpy: list[float] = []
        for _ in range(ROUNDS):
            numpy.append(import_numpy())
            for isolation in ISOLATIONS:
                environment = os.environ | {"SDRUNTIME_PYTHON": sys.prefix}
                command = [str(program), isolation, str(bundle)]
                printed = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout
                rounds[isolation].append(json.loads(printed))
    document: dict[str, object] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "processor": platform.machine(),
        "rounds": ROUNDS,
        "import_numpy_ms": statistics.median(numpy),
    }
    for isolation in ISOLATIONS:
        document[isolation] = {
            key: statistics.median(figures[key] for figures in rounds[isolation]) for key in rounds[isolation][0]
        }
    images = [[figures["picture_ms"] for figures in rounds[isolation]] for isolation in ISOLATIONS]
    document["process_more_ms"] = statistics.median(process - inside for inside, process in zip(*images, strict=True))
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
