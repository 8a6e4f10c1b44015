"""Rounds of builders and readers on one bundle: `python neighbours.py ROUNDS LOCKS KIND`.

LOCKS: flock, stubbed (flock says yes and does nothing) or none (no lock at all). KIND: different (four builders, each another
engine), same (each the same engine), stale (two rebuild what is out of date, two add), export (two add, two replace the
bundle). Prints one JSON document.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bundles import make_bundle, with_fake_engines
from crashes import CHANGES, fault, leftovers

import sdruntime.bundle.changes.change
import sdruntime.bundle.changes.staging
from sdruntime.bundle.bundle import Bundle, opening
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import BundleError
from sdruntime.pipeline.pipeline import Pipeline

WRITERS, READERS = 4, 2
SIZES = ("64x64", "128x64", "128x128", "192x128")
Work = Callable[[], object]


def sized(place: Path, number: int) -> int:
    """Add one engine; how many were added or present."""
    asked = BuildRequest(backend="fake", size=SIZES[number], components=("unet",))
    return sum(event.state in ("done", "present") for event in build_engines(place, asked))


def read(place: Path, kind: str) -> None:
    """Open a bundle in each of the ways that readers do."""
    Bundle.open(place)
    opening(place, Bundle.checked)
    if kind != "stale":  # where the engines become those of another version of the library
        with Pipeline.open(place, backend="fake"):
            pass
        pipe = Pipeline.open(place, backend="fake")
        pipe.engine("text_encoder")  # opens at first use
        pipe.close()


def replaced(place: Path) -> None:
    """An addition to a bundle that is being replaced: done, or an error that says so."""
    try:
        sized(place, 0)
    except BundleError as error:
        if "replaced" not in str(error) and "exported again" not in str(error):
            raise


def writers(kind: str, place: Path) -> list[Work]:
    if kind == "different":
        return [lambda number=number: sized(place, number) for number in range(WRITERS)]  # type: ignore[misc]
    if kind == "same":
        return [lambda: sized(place, 0)] * WRITERS
    if kind == "stale":
        return [lambda: CHANGES["stale"](place)] * 2 + [lambda: sized(place, 2), lambda: sized(place, 3)]
    return [lambda: CHANGES["export"](place)] * 2 + [lambda: replaced(place)] * 2


def expected(kind: str) -> set[str]:
    """The sizes of the UNet's engines after a round."""
    added = {"different": SIZES, "same": SIZES[:1], "stale": SIZES[2:], "export": ()}[kind]
    return {"64x64-2048x2048", *added}  # it had the first one before


def one_round(kind: str, place: Path) -> list[str]:
    """What went wrong; each writer and reader is a process, and all begin at once."""
    go_read, go_write = os.pipe()
    children = {}
    for name, work in [(f"writer {n}", work) for n, work in enumerate(writers(kind, place))] + [
        (f"reader {n}", lambda: read(place, kind)) for n in range(READERS)
    ]:
        child = os.fork()
        if child == 0:
            os.close(go_write)
            os.read(go_read, 1)  # until the parent closes its end
            os._exit(_done(work, place.parent / f"told-{os.getpid()}", again=name.startswith("reader")))
        children[child] = name
    os.close(go_read)
    os.close(go_write)
    wrong, left = [], dict(children)
    while any(name.startswith("writer") for name in left.values()):
        _reap(left, wrong, place)
    (place.parent / "over").touch()  # readers end
    while left:
        _reap(left, wrong, place)
    if told := fault(place):
        wrong.append(f"afterwards: {told}")
        return wrong
    engines = [engine for engine in Bundle.open(place).manifest.engines if engine.component == "unet"]
    labels = [engine.name.partition("-fp32-")[2].rpartition("-b")[0] for engine in engines]
    if kind != "export" and (set(labels) != expected(kind) or len(labels) != len(expected(kind))):
        wrong.append(f"engines: {labels}")
    list(build_engines(place, BuildRequest(backend="fake", components=("text_encoder",))))
    (place.parent / "over").unlink()
    return wrong + [f"left over: {name}" for name in leftovers(place)]


def _reap(left: dict[int, str], wrong: list[str], place: Path) -> None:
    child, status = os.wait()
    name, told = left.pop(child), place.parent / f"told-{child}"
    if status != 0:
        wrong.append(f"{name}: {told.read_text() if told.exists() else status}")
        told.unlink(missing_ok=True)


def _done(work: Work, told: Path, *, again: bool) -> int:
    try:
        work()
        while again and not (told.parent / "over").exists():
            work()
    except BaseException:
        told.write_text(traceback.format_exc())
        return 1
    return 0


def main(rounds: str, locks: str, kind: str) -> None:
    warnings.simplefilter("error")
    if locks == "stubbed":
        fcntl.flock = lambda handle, operation: None  # type: ignore[assignment]
    if locks == "none":
        sdruntime.bundle.changes.change.locked = sdruntime.bundle.changes.staging.locked = lambda folder: contextlib.nullcontext()  # type: ignore[assignment]
    wrong: Counter[str] = Counter()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        (Path(folder) / "root").mkdir()
        original = with_fake_engines(make_bundle(Path(folder) / "original")).folder
        newer = make_bundle(Path(folder) / "newer")
        newer.with_files({path: b"newer" for path in newer.manifest.files if path.endswith(".onnx")})
        with_fake_engines(Bundle.open(newer.folder))
        for _ in range(int(rounds)):
            place = Path(shutil.copytree(original, Path(folder) / "root" / "bundle"))
            wrong.update(one_round(kind, place))
            shutil.rmtree(place)
    print(json.dumps({"rounds": int(rounds), "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
