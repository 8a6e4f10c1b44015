"""What HTTP and Triton add to an image, and the throughput of concurrent clients beside that of the bare queue."""

from __future__ import annotations

import concurrent.futures
import json
import statistics
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.serving.process import GENERATIONS, PROMPT, WAIT, Client, fake, generation, quantiles, serving, with_fake_engines
from sdruntime import Batcher, Pipeline, Request
from sdruntime.system.sizes import parse_size

WARM = 10


def overhead(bundle: Path, images: int) -> dict[str, Any]:
    """Milliseconds of a request less those that the worker reports for its job: one client, one image of one step at a time."""
    added: dict[str, Any] = {"goal": "p50 at most 5 ms at 64x64"}
    with with_fake_engines(bundle) as copy, serving(copy, *fake(0)) as server:
        client = Client(server.port)
        for size in ("64x64", "512x512"):
            values = []
            for seed in range(images + WARM):
                answer = client.ask("POST", GENERATIONS, generation(seed, 1, size))
                assert answer.status == 200, answer.body
                job = client.ask("GET", "/v1/jobs").document["jobs"][0]
                values.append(1000 * (answer.seconds - job["seconds"]["total"]))
            added[f"ms at {size}"] = quantiles(values[WARM:])
    return added


def throughput(bundle: Path, images: int, clients: int, steps: int, size: str, rounds: int, triton: str | None) -> dict[str, Any]:
    """Images per second of concurrent clients, in turns: HTTP, Triton if its model's address is known, the bare Batcher."""
    request = {"SIZE": list(parse_size(size)), "PROMPT": PROMPT, "STEPS": steps, "PROGRESS": "off"}
    with (
        serving(bundle, "--queue", str(images)) as server,
        Pipeline.open(bundle) as pipe,
        Batcher(pipe, queue=images) as batcher,
    ):

        def over_http(seed: int) -> None:
            answer = server.ask("POST", GENERATIONS, generation(seed, steps, size))
            assert answer.status == 200, answer.body

        def over_triton(seed: int) -> None:
            body = json.dumps({**request, "SEED": seed}).encode()
            with urllib.request.urlopen(f"{triton}/generate_stream", body, timeout=WAIT) as answer:
                assert b'"PNG"' in answer.read()

        def bare(seed: int) -> None:
            wanted = Request(prompt=PROMPT, seed=seed, steps=steps, size=parse_size(size), prompt_syntax="a1111")
            batcher.submit(wanted).result(WAIT)

        ways: dict[str, Callable[[int], None]] = {"batcher": bare, "http": over_http}
        if triton is not None:
            ways["triton"] = over_triton
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, ask in ways.items():
                with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                    begun = time.perf_counter()
                    list(pool.map(ask, range(images)))
                    if turn:  # the first warms up
                        rates[name].append(images / (time.perf_counter() - begun))
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "goal": "at least 0.95 of the batcher",
        "images": images,
        "clients": clients,
        "steps": steps,
        "size": size,
        "images per second": {name: [round(value, 2) for value in values] for name, values in rates.items()},
        "of the batcher": {name: round(median[name] / median["batcher"], 3) for name in rates if name != "batcher"},
    }
