"""What slow and many clients do to a server: slow sockets, disconnects, and ten times the load that it can serve."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import random
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.serving.process import GENERATIONS, Client, Server, fake, generation, quantiles, serving, with_fake_engines
from sdruntime.serving.http.server import _raise_file_limit

STEP = 0.005  # seconds of a UNet call


def slow_sockets(bundle: Path, count: int, seconds: float) -> dict[str, Any]:
    """The milliseconds of a healthy client's images of one step, alone and beside clients that send a byte each second."""
    with with_fake_engines(bundle) as copy, serving(copy, *fake(STEP)) as server:
        client = Client(server.port)
        _milliseconds(client, 2.0)
        alone = _milliseconds(client, seconds)
        context = multiprocessing.get_context("spawn")
        open_now, over = context.Event(), context.Event()
        crowd = context.Process(target=_dribble, args=(server.port, count, open_now, over))
        crowd.start()
        assert open_now.wait(60)
        beside = _milliseconds(client, seconds)
        over.set()
        crowd.join()
        again = _milliseconds(client, seconds)
    p99 = max(quantiles(alone)["p99"], quantiles(again)["p99"])
    return {
        "goal": "p99 within 2 times",
        "sockets": count,
        "ms alone, before": quantiles(alone),
        "ms beside them": quantiles(beside),
        "ms alone, after": quantiles(again),
        "times": round(quantiles(beside)["p99"] / p99, 2),
    }


def _milliseconds(client: Client, seconds: float) -> list[float]:
    values: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        answer = client.ask("POST", GENERATIONS, generation(len(values), 1))
        assert answer.status == 200, answer.body
        values.append(1000 * answer.seconds)
    return values


def _dribble(port: int, count: int, open_now: Event, over: Event) -> None:
    """Keep `count` connections that send a head a byte at a time; one that the server closes is opened again."""
    _raise_file_limit()

    async def one() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                for letter in "GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaa":
                    writer.write(letter.encode())
                    await writer.drain()
                    await asyncio.sleep(1)
                    if over.is_set() or writer.transport.is_closing():
                        break
                writer.transport.abort()

    async def everyone() -> None:
        tasks = [asyncio.create_task(one()) for _ in range(count)]
        await asyncio.sleep(2)
        open_now.set()
        await asyncio.gather(*tasks)

    asyncio.run(everyone())


def disconnects(bundle: Path, count: int) -> dict[str, Any]:
    """Clients that leave at a random moment: how long their jobs go on, and whether the counters are exact."""
    times: list[float] = []
    steps: list[float] = []
    lock, chance = threading.Lock(), random.Random(0)
    with with_fake_engines(bundle) as copy, serving(copy, *fake(STEP, running=4)) as server:

        def leave(seeds: list[int]) -> None:
            for seed in seeds:
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                body = json.dumps(generation(seed, 900)).encode()
                connection.request("POST", GENERATIONS, body, {"Content-Type": "application/json"})
                while (path := _path(server, seed)) is None:
                    time.sleep(0.02)  # less often than the list takes the server
                time.sleep(chance.uniform(0, 0.1))
                before = server.ask("GET", path).document
                connection.close()
                left = time.time()
                while (job := server.ask("GET", path).document)["ended"] is None:
                    time.sleep(0.02)
                with lock:
                    times.append(1000 * (job["ended"] - left))
                    steps.append(job["step"] - before["step"])

        threads = [threading.Thread(target=leave, args=(list(range(k, count, 8)),)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        numbers = server.metrics()
    return {
        "goal": f"all cancelled within a step ({1000 * STEP:g} ms), counters exact",
        "ms from leaving to the job's end": quantiles(times),
        "steps of the job from just before": quantiles(steps),
        "cancelled": numbers.get('sdruntime_images_total{outcome="cancelled"}', 0),
        "other outcomes": sum(numbers.get(f'sdruntime_images_total{{outcome="{name}"}}', 0) for name in ("done", "failed")),
        "still running or waiting": numbers["sdruntime_images_running"] + numbers["sdruntime_images_waiting"],
    }


def _path(server: Server, seed: int) -> str | None:
    jobs = server.ask("GET", "/v1/jobs").document["jobs"]
    return next((f"/v1/jobs/{job['id']}" for job in jobs if job["seed"] == seed), None)


def overload(bundle: Path, seconds: float, times: float) -> dict[str, Any]:
    """Requests at a multiple of what the server can generate: how it refuses, the length of its queue, its memory."""
    queue, running, steps, call = 16, 8, 20, 0.05
    rate = times * running / (steps * call)  # requests per second
    statuses: dict[str, int] = {}
    refused: list[float] = []
    longest, memories = 0.0, []

    async def one(port: int, seed: int) -> None:
        begun = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps(generation(seed, steps)).encode()
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            status = (await reader.read()).split(b" ", 2)[1].decode()
            writer.close()
        except (OSError, IndexError) as error:
            status = type(error).__name__
        statuses[status] = statuses.get(status, 0) + 1
        if status == "429":
            refused.append(1000 * (time.perf_counter() - begun))

    async def everyone(server: Server) -> None:
        nonlocal longest
        tasks: list[asyncio.Task[None]] = []
        begun, checked = time.monotonic(), 0.0
        while (now := time.monotonic() - begun) < seconds:
            while len(tasks) < now * rate:
                tasks.append(asyncio.create_task(one(server.port, len(tasks))))
            if now > checked:
                checked = now + 0.5
                numbers = await asyncio.to_thread(server.metrics)
                longest = max(longest, numbers["sdruntime_images_waiting"])
                memories.append(server.memory())
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)

    with with_fake_engines(bundle) as copy, serving(copy, *fake(call, running), "--queue", str(queue)) as server:
        asyncio.run(everyone(server))
        after = server.memory()
    settled = memories[min(len(memories) - 1, 20)]  # after ten seconds
    return {
        "goal": "queue within its bound, refusals p99 at most 100 ms, memory growth at most 64 MB",
        "seconds": seconds,
        "requests per second": rate,
        "answers": statuses,
        "ms of a refusal": quantiles(refused),
        "longest queue": longest,
        "queue": queue,
        "MB at the start, after 10 s, at the most, after": [
            round(value / 1e6, 1) for value in (memories[0], settled, max(memories), after)
        ],
    }
