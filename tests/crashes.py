"""The changes that a bundle goes through, killed, failed and cut off at every operation: `python crashes.py WHAT HOW NUMBER`.

Prints one JSON document. A process of its own, because a hook that watches operations stays for the life of its process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bundles import make_bundle, with_fake_engines
from crash import Recorder, Tree, visible, watched, write_tree

import sdruntime.backends.fake.build
import sdruntime.backends.fake.engine
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.changes.staging import staging
from sdruntime.engines.building import BuildRequest, build_engines, rebuild_stale
from sdruntime.errors import SdruntimeError
from sdruntime.system import owner

SIZED = BuildRequest(backend="fake", size="64x64,128x64", components=("unet", "vae_decoder"))


def add(place: Path) -> None:
    for _ in build_engines(place, BuildRequest(backend="fake", components=("unet", "vae_decoder"))):
        pass


def stale(place: Path) -> None:
    for module in (sdruntime.backends.fake.build, sdruntime.backends.fake.engine):
        module.VERSION = "2"
    for _ in rebuild_stale(place):
        pass


def export(place: Path) -> None:
    with staging(place) as folder:
        for path in sorted((place.parent.parent / "newer").rglob("*")):
            if path.is_dir():
                (folder / path.relative_to(place.parent.parent / "newer")).mkdir()
            else:
                (folder / path.relative_to(place.parent.parent / "newer")).write_bytes(path.read_bytes())


CHANGES: dict[str, Callable[[Path], None]] = {"add": add, "stale": stale, "export": export}


def prepared(what: str, folder: Path) -> Path:
    """`folder`/root/bundle, before the change."""
    (folder / "root").mkdir(parents=True)
    bundle = make_bundle(folder / "root" / "bundle")
    if what == "stale":
        for _ in build_engines(bundle.folder, SIZED):
            pass
    if what == "export":
        with_fake_engines(bundle)
        newer = make_bundle(folder / "newer")
        newer.with_files({path: b"newer" for path in newer.manifest.files if path.endswith(".onnx")})
    return bundle.folder


def manifest_of(bundle: Path) -> str:
    return (bundle / "manifest.json").read_text()


def fault(place: Path) -> str:
    """Why what is at `place` is no sound bundle; "" if it is one."""
    try:
        return "; ".join(Bundle.open(place).changed_files())
    except SdruntimeError as error:
        return str(error)


def leftovers(place: Path) -> list[str]:
    """Temporary files and folders, and engine files that the manifest does not list."""
    manifest = Bundle.open(place).manifest
    hidden = [*place.parent.glob(".*"), *place.glob(".*")]
    engines = (path for path in (place / "engines").glob("*") if f"engines/{path.name}" not in manifest.files)
    return sorted(path.name for path in [*hidden, *engines])


def at_operations(what: str, how: str, folder: Path, *, every: int) -> dict[str, Any]:
    """Kill the change, or let it fail with EIO, before operation 0, `every`, …; then open the bundle, and change it again."""
    original = prepared(what, folder / "original")
    legitimate = published(what, folder / "record")
    found: dict[str, Any] = {"operations": 0, "faults": []}
    while True:
        number = found["operations"]
        shutil.copytree(original.parent.parent, folder / "try")
        place = folder / "try" / "root" / "bundle"
        child = os.fork()
        if child == 0:
            os._exit(_child(CHANGES[what], place, number, how))
        status = os.waitpid(child, 0)[1]
        told = fault(place) or ("" if manifest_of(place) in legitimate else "neither the old bundle nor the new one")
        if not told:
            again = os.fork()
            if again == 0:
                os._exit(_child(CHANGES[what], place, -1, how))
            if os.waitpid(again, 0)[1] != 0:
                told = "the change cannot be made again"
            else:
                told = fault(place) or ", ".join(leftovers(place))
        if told:
            found["faults"].append(f"operation {number}: {told}")
        shutil.rmtree(folder / "try")
        if status == 0:
            return found
        found["operations"] += every


def _child(change: Callable[[Path], None], place: Path, number: int, how: str) -> int:
    counted = 0

    def count() -> None:
        nonlocal counted
        if counted == number:
            counted += 1
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        counted += 1

    try:
        with watched(count):
            change(place)
    except (OSError, SdruntimeError, RuntimeWarning):
        return 1
    return 1 if counted > number >= 0 and how != "kill" else 0


def published(what: str, folder: Path) -> set[str]:
    """Every manifest that the change shows on its way."""
    place, shown = prepared(what, folder), set()

    def look() -> None:
        shown.add(manifest_of(place))

    child_reads, child_writes = os.pipe()
    child = os.fork()
    if child == 0:
        with watched(look):
            CHANGES[what](place)
        look()
        with os.fdopen(child_writes, "w") as pipe:
            json.dump(sorted(shown), pipe)
        os._exit(0)
    os.close(child_writes)
    with os.fdopen(child_reads) as pipe:
        found = set(json.load(pipe))
    os.waitpid(child, 0)
    return found


def power_cut(what: str, folder: Path, *, most: int, folders_last: bool) -> dict[str, Any]:
    """Every state that a power cut during the change may leave, opened; some are changed again."""
    place, legitimate = prepared(what, folder / "cut"), published(what, folder / "record")
    recorder = Recorder(place.parent, folders_last)
    with recorder.recording():
        CHANGES[what](place)
    last = manifest_of(place)
    found: dict[str, Any] = {"operations": recorder.step, "states": 0, "unsafe": 0, "faults": [], "again": 0}
    known: dict[str, str] = {}
    for step, tree in recorder.states(most=most):
        found["states"] += 1
        mark = repr(visible(tree))
        if mark not in known:
            known[mark] = told = _opened(tree, folder / "state", legitimate)
            if not told:
                found["again"] += 1
                known[mark] = _changed_again(what, tree, folder / "state", folder / "cut")
        told = known[mark]
        if not told and step == recorder.step and tree["bundle"]["manifest.json"].decode() != last:  # type: ignore[index,union-attr]
            told = "reported as done, but lost"
        if told:
            found["unsafe"] += 1
            found["faults"] = [*found["faults"], f"after operation {step}: {told}"][:10]
    recorder.close()
    return found


def _opened(tree: Tree, folder: Path, legitimate: set[str]) -> str:
    write_tree(tree, folder)
    try:
        return fault(folder / "bundle") or (
            "" if manifest_of(folder / "bundle") in legitimate else "neither the old bundle nor the new one"
        )
    finally:
        shutil.rmtree(folder)


def _changed_again(what: str, tree: Tree, folder: Path, origin: Path) -> str:
    """Whether the change can be made on what a power cut left, after a restart: every process of before is gone."""
    folder.mkdir()
    write_tree(tree, folder / "root")
    if (origin / "newer").exists():
        shutil.copytree(origin / "newer", folder / "newer")
    child = os.fork()
    if child == 0:
        _, space, host = owner._system()
        owner._system = lambda: ("0" * 8, space, host)  # type: ignore[assignment]  # another boot
        try:
            CHANGES[what](folder / "root" / "bundle")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    try:
        return fault(folder / "root" / "bundle")
    finally:
        shutil.rmtree(folder)


def main(what: str, how: str, number: str) -> None:
    """WHAT: add, stale or export. HOW: kill or fail at every NUMBERth operation; cut, where a step has up to NUMBER states that
    are tried; unsynced: the same as if no folder were synced."""
    warnings.simplefilter("ignore")  # about what an error left behind
    memory = Path("/dev/shm")  # syncs cost nothing there
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        if how in ("cut", "unsynced"):
            found = power_cut(what, Path(folder), most=int(number), folders_last=how == "cut")
        else:
            found = at_operations(what, how, Path(folder), every=int(number))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
