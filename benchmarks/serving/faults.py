"""What signals and lost workers do to the images of a server."""

from __future__ import annotations

import concurrent.futures
import http.client
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serving.process import GENERATIONS, Server, fake, generation, quantiles, serving, with_fake_engines

STEP = 0.005
CLIENTS = 4


def sigterms(bundle: Path, count: int) -> dict[str, Any]:
    """SIGTERM at a random moment, while clients ask for images one after the other."""
    outcomes: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    ends: list[float] = []
    chance = random.Random(0)
    with with_fake_engines(bundle) as copy:
        for _ in range(count):
            server = Server(copy, *fake(STEP))
            stop = threading.Event()
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                clients = [pool.submit(_ask_until, server, stop) for _ in range(CLIENTS)]
                time.sleep(chance.uniform(0.05, 1.0))
                begun = time.perf_counter()
                codes[server.terminate()] += 1
                ends.append(1000 * (time.perf_counter() - begun))
                stop.set()
                for client in clients:
                    outcomes += client.result()
    return {
        "goal": "no finished work lost",
        "signals": count,
        "requests": dict(outcomes),
        "exit codes": {str(code): number for code, number in codes.items()},
        "ms from the signal to the end": quantiles(ends),
    }


def _ask_until(server: Server, stop: threading.Event) -> Counter[str]:
    """Ask for images until the server refuses. "lost": an answer that breaks off, or none to a request that was sent."""
    outcomes: Counter[str] = Counter()
    while not stop.is_set():
        try:
            answer = server.ask("POST", GENERATIONS, generation(sum(outcomes.values()), 10))
        except ConnectionRefusedError:
            outcomes["no longer listening"] += 1
            break
        except (OSError, http.client.HTTPException):
            outcomes["lost"] += 1
            break
        outcomes[{200: "image", 503: "refused"}.get(answer.status, str(answer.status))] += 1
        if answer.status != 200:
            break
    return outcomes


def killed_workers(bundle: Path, count: int) -> dict[str, Any]:
    """SIGKILL of the worker while it generates: when its clients hear of it, and when the next image comes."""
    heard: list[float] = []
    served: list[float] = []
    outcomes: Counter[str] = Counter()
    with (
        with_fake_engines(bundle) as copy,
        serving(copy, *fake(STEP)) as server,
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool,
    ):
        for turn in range(count):
            clients = [pool.submit(_answered, server, 10 * turn + k) for k in range(CLIENTS)]
            while server.metrics()["sdruntime_images_running"] < CLIENTS:
                time.sleep(0.01)
            [worker] = server.workers()
            begun = time.perf_counter()
            os.kill(worker, signal.SIGKILL)
            for client in clients:
                status, at = client.result()
                outcomes[status] += 1
                heard.append(1000 * (at - begun))
            answer = server.ask("POST", GENERATIONS, generation(turn, 2))
            outcomes[f"next: {answer.status}"] += 1
            served.append(1000 * (time.perf_counter() - begun))
    return {
        "goal": "503 within 1 s, then serving again, none lost silently",
        "kills": count,
        "answers": dict(outcomes),
        "ms from the kill to the 503": quantiles(heard),
        "ms from the kill to the next image": quantiles(served),
    }


def _answered(server: Server, seed: int) -> tuple[str, float]:
    try:
        status = str(server.ask("POST", GENERATIONS, generation(seed, 900)).status)
    except (OSError, http.client.HTTPException) as error:
        status = f"lost: {type(error).__name__}"
    return status, time.perf_counter()
