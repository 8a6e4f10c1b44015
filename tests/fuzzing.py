"""Inputs that were damaged by chance: documents mutated in their structure, and what escapes the error tree, counted.

    python tests/fuzzing.py MODULE:TARGET SEED COUNT [ONLY]

A target is a function `prepare(folder) -> once`, where `once(random)` makes one input, gives it to the package and lets through
nothing but errors that the package does not raise on purpose. Each input has a limit of processor time, all have one of memory.
Prints one JSON document; `ONLY` runs a single input and shows its traceback.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

Once = Callable[[random.Random], object]
SECONDS, MEMORY, MOST_ESCAPES = 5, 3 << 30, 30
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 77, 1000, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan),
    *(2**31 - 1, 2**31, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**308, -(2**31), -(2**63), -(10**30)),
    *(
        "",
        " ",
        "x",
        "7",
        "nan",
        "../x",
        "/",
        "a/b/c/d/e",
        "\0",
        "\ud800",
        "ä€\U0001f600",
        "batch",
        "None",
        "é" * 300,
        "x" * 100_000,
    ),
    *([], {}, [[]], [None], [0, 0], [1, 2, 3], ["a", "b"], {"a": 1}, {"": {}}, [1] * 3000, [1e308, -1e308]),
)


def mutated(document: Any, chance: random.Random, *, most: int = 4) -> Any:
    """A copy with one to `most` changes in places that were taken by chance."""
    made = [copy.deepcopy(document)]
    for _ in range(chance.randint(1, most)):
        _change(made, chance)
    return made[0]


def _change(root: list[Any], chance: random.Random) -> None:
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.85:
        holder = holder[key]
        key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value = holder[key]
    kind = chance.randrange(9)
    if kind <= 3 or holder is root:
        holder[key] = copy.deepcopy(chance.choice(VALUES))
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        other = chance.choice(["", "x", f"{key}s", str(key)[:-1], "name", "é" * 100])
        holder.insert(chance.randint(0, len(holder)), copy.deepcopy(value)) if isinstance(holder, list) else holder.update(
            {other: value}
        )
    elif kind == 6 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = chance.choice([-value, value + 1, value - 1, value * 2, value * 1000, _third(value), value * 10**9])
    elif kind == 6 and isinstance(value, str):
        at = chance.randint(0, len(value))
        holder[key] = (
            value[:at]
            + chance.choice(["", "x", "\n", "\0", "/", " ", "é", "</w>", "\udc00"])
            + value[at + chance.randint(0, 2) :]
        )
    elif kind == 7:
        for _ in range(chance.choice([1, 2, 70, 200])):
            value = [value] if chance.random() < 0.5 else {"a": value}
        holder[key] = value
    else:
        holder[key] = copy.deepcopy(_somewhere(root[0], chance))


def _somewhere(value: Any, chance: random.Random) -> Any:
    while isinstance(value, dict | list) and value and chance.random() < 0.8:
        value = chance.choice(list(value.values()) if isinstance(value, dict) else value)
    return value


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with a few of them changed, omitted, doubled or cut off."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not made:
            break
        at, length = chance.randrange(len(made)), chance.choice([1, 1, 2, 4, 8, 100])
        kind = chance.randrange(6)
        if kind == 0:
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            made[at : at + length] = chance.randbytes(length)
        elif kind == 2:
            made[at : at + length] = chance.choice([b"\xff", b"\0", b"\x7f"]) * length
        elif kind == 3:
            del made[at : at + length]
        elif kind == 4:
            made[at:at] = made[at : at + length]
        else:
            del made[at:]
    return bytes(made)


class Hang(Exception):
    """An input took more processor time than it may."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s")


def run(target: str, seed: int, count: int, only: int | None = None) -> dict[str, Any]:
    module, _, name = target.partition(":")
    warnings.simplefilter("ignore")
    escapes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        once: Once = getattr(importlib.import_module(module), name)(Path(folder))
        signal.signal(signal.SIGPROF, _hang)
        resource.setrlimit(resource.RLIMIT_AS, (_held() + MEMORY, resource.RLIM_INFINITY))
        outcomes = {"refused": 0, "taken": 0}
        for index in range(count) if only is None else [only]:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                outcomes["refused" if once(random.Random(f"{seed}/{index}")) else "taken"] += 1
            except BaseException as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                if isinstance(error, KeyboardInterrupt) or only is not None:
                    raise
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
                text = "".join(traceback.format_exception_only(error)).strip()[:300]
                escapes.setdefault(where, {"input": index, "error": text, "times": 0})["times"] += 1
                if len(escapes) >= MOST_ESCAPES:
                    break
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    return {"target": target, "escapes": escapes, **outcomes}


def _third(value: float) -> float:
    """Of a whole number beyond float64 a whole number."""
    try:
        return value / 3 if value else 0.1
    except OverflowError:
        return value // 3


def _held() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 4 << 30


def escaped(target: str, count: int, *, seed: int = 1) -> dict[str, Any]:
    """What `run` finds, in a process of its own. Some inputs must be refused and some taken, or the target tests nothing."""
    command = [sys.executable, __file__, target, str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] > count / 20, found
    assert found["taken"] > count / 200, found
    escapes: dict[str, Any] = found["escapes"]
    return escapes


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "runtime")]
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if sys.argv[4:] else None)))
