"""What the C library costs: opening, calls that do nothing else, and a picture in a worker process beside one in the host's own.

python benchmarks/capi.py BUNDLE [--output benchmarks/results/capi.json]

Engines that return at once, so that what is measured is ours. Both isolations in turn, each round a process of its own; medians.
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
    """Milliseconds of a Python that does nothing else."""
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
        found: dict[str, list[dict[str, float]]] = {isolation: [] for isolation in ISOLATIONS}
        numpy: list[float] = []
        for _ in range(ROUNDS):
            numpy.append(import_numpy())
            for isolation in ISOLATIONS:
                environment = os.environ | {"SDRUNTIME_PYTHON": sys.prefix}
                command = [str(program), isolation, str(bundle)]
                printed = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout
                found[isolation].append(json.loads(printed))
    document: dict[str, object] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "processor": platform.machine(),
        "rounds": ROUNDS,
        "import_numpy_ms": statistics.median(numpy),
    }
    for isolation in ISOLATIONS:
        document[isolation] = {key: statistics.median(each[key] for each in found[isolation]) for key in found[isolation][0]}
    pictures = [[each["picture_ms"] for each in found[isolation]] for isolation in ISOLATIONS]
    document["process_more_ms"] = statistics.median(there - here for here, there in zip(*pictures, strict=True))
    text = json.dumps(document, indent=1) + "\n"
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
