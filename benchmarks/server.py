"""Measure `sdruntime serve`: what HTTP adds to an image, and the throughput of concurrent clients beside that of the bare queue.

    python -m benchmarks.server BUNDLE [--images 32] [--clients 8] [--steps 20] [--size 64x64] [--json FILE]

Overhead: one client, one image after the other, of one step; the seconds of a request less those that the worker reports for its
job. Throughput: `--clients` threads ask for `--images` images in all, over HTTP and in this process with a Batcher, in turns of
three rounds each; the best of each counts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from sdruntime import Batcher, Pipeline, Request
from sdruntime.system.process import module_command
from sdruntime.system.sizes import parse_size

ROUNDS = 3
SINGLE = 200  # images of the overhead


class Client:
    """A connection that is kept open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status}: {answer}")
        return answer


def started(bundle: Path, clients: int) -> tuple[subprocess.Popen[str], int]:
    """Start a server and wait until it is ready."""
    words = ["serve", str(bundle), "--port", "0", "--max-jobs", str(max(64, clients)), "--log", "json"]
    process = subprocess.Popen(module_command("sdruntime", *words), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r":(\d+)\"", process.stderr.readline())
    assert found is not None
    port = int(found[1])
    threading.Thread(target=process.stderr.read, daemon=True).start()  # else the server would wait for a reader of its log
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/readyz")
        if connection.getresponse().status == 200:
            return process, port
        connection.close()
        time.sleep(0.2)


def overhead(port: int, request: dict[str, Any]) -> dict[str, float]:
    """Return the milliseconds that HTTP adds to an image."""
    client, added = Client(port), []
    for seed in range(SINGLE + 10):
        begun = time.perf_counter()
        client.ask("POST", "/v1/images/generations", request | {"steps": 1, "seed": seed})
        seconds = time.perf_counter() - begun
        job = client.ask("GET", "/v1/jobs")["jobs"][0]
        if seed >= 10:
            added.append(1000 * (seconds - job["seconds"]["total"]))
    added.sort()
    return {"p50": round(statistics.median(added), 2), "p99": round(added[int(0.99 * len(added))], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    prompt = "a large green square on the right on a white background"
    request = {"prompt": prompt, "size": options.size, "steps": options.steps}
    process, port = started(options.bundle, options.clients)
    times: dict[str, list[float]] = {"http": [], "batcher": []}
    try:
        added = overhead(port, request)
        for _ in range(ROUNDS):
            with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
                begun = time.perf_counter()
                ask = lambda seed: Client(port).ask("POST", "/v1/images/generations", request | {"seed": seed})  # noqa: E731
                list(pool.map(ask, range(options.images)))
                times["http"].append(time.perf_counter() - begun)
    finally:
        process.terminate()
        process.communicate()
    with Pipeline.open(options.bundle) as pipe, Batcher(pipe, queue=options.images) as batcher:
        for _ in range(ROUNDS + 1):
            begun = time.perf_counter()
            futures = batcher.submit_all(
                [
                    Request(prompt=prompt, seed=seed, steps=options.steps, size=parse_size(options.size), prompt_syntax="a1111")
                    for seed in range(options.images)
                ]
            )
            for future in futures:
                future.result()
            times["batcher"].append(time.perf_counter() - begun)
    rates = {name: round(options.images / min(seconds), 2) for name, seconds in times.items()}
    document = {
        "bundle": options.bundle.name,
        "images": options.images,
        "clients": options.clients,
        "steps": options.steps,
        "size": options.size,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "overhead in ms": added,
        "images per second": rates,
    }
    print(json.dumps(document, indent=1))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
