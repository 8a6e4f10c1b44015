"""Measure `sdruntime serve`, and the model for Triton.

    python -m benchmarks.serving BUNDLE [ROW…] [--small] [--triton http://127.0.0.1:8000/v2/models/NAME] [--json FILE]

Without ROW, all of them. Only `throughput` uses the bundle's engines; the others use engines that return at once or after a
fixed time. With --json, the rows replace those of the same name in FILE. --small: a few seconds each, to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.serving.faults import killed_workers, sigterms
from benchmarks.serving.load import disconnects, overload, slow_sockets
from benchmarks.serving.speed import overhead, throughput

Row = Callable[[Path, bool, "str | None"], dict[str, Any]]
ROWS: Mapping[str, Row] = {
    "overhead": lambda bundle, small, _: overhead(bundle, 20 if small else 300),
    "throughput": lambda bundle, small, triton: throughput(bundle, 32, 8, 4 if small else 20, "64x64", 1 if small else 5, triton),
    "slow_sockets": lambda bundle, small, _: slow_sockets(bundle, 100 if small else 1000, 2 if small else 20),
    "sigterms": lambda bundle, small, _: sigterms(bundle, 3 if small else 200),
    "disconnects": lambda bundle, small, _: disconnects(bundle, 16 if small else 1000),
    "overload": lambda bundle, small, _: overload(bundle, 5 if small else 120, 10),
    "killed_workers": lambda bundle, small, _: killed_workers(bundle, 2 if small else 50),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--triton", metavar="URL", help="a model of `sdruntime triton` with the same bundle, in a running Triton")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown row {', '.join(sorted(unknown))}")
    for name in options.rows or ROWS:
        before = os.getloadavg()[0]
        row = ROWS[name](options.bundle, options.small, options.triton)
        row["load before and after"] = [round(load, 2) for load in (before, os.getloadavg()[0])]
        row["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        print(json.dumps({name: row}, indent=1), flush=True)
        if options.json:
            rows = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps({**rows, name: row}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
