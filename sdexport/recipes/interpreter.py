"""Another Python that sees the system's engine libraries (an NGC container's, JetPack's): `sdruntime build` run by it.

It needs numpy and no torch. Nothing is installed there: it is shown the one package, and none of this environment's others.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import sdruntime
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Precision
from sdruntime.cli.progress import LINES
from sdruntime.engines.building import BuildEvent, BuildRequest
from sdruntime.errors import (
    DeviceMissing,
    EngineError,
    EnvironmentFault,
    LibraryMissing,
    SdruntimeError,
    SettingError,
    VerificationFailed,
)
from sdruntime.system.process import module_command

_ERRORS = {kind.exit_code: kind for kind in (SettingError, EnvironmentFault, EngineError)}
# a line of the other sdruntime's log (sdruntime.cli.progress): the engine, and the stage where it has come to one
_SHOWN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d build ([^\s:]+)(?:: (?!after )([^:\n]+))?")
_TO_CLEAN_UP = 30  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """`python`: its command. Has the two methods of `engines.Here`."""

    python: str

    def check(self, asked: BuildRequest, precision: Precision) -> None:
        """Raises EnvironmentFault where it does not run sdruntime, LibraryMissing, and DeviceMissing where it has no target."""
        library = _libraries(self).get(asked.backend)
        if library is None:
            return  # the fake
        if library["version"] is None:
            raise LibraryMissing(f"{self.python}: {library['missing']}")
        if not library["targets"]:
            raise DeviceMissing(f"{self.python}: {asked.backend} {library['version']} builds on the GPU, and finds none")

    def build(self, folder: Path, asked: BuildRequest, *, verify: bool) -> Iterator[BuildEvent]:
        """As `sdruntime.engines.building.build_engines`; what it says is raised as the error that its exit code stands for."""
        before = Bundle.open(folder).manifest.engines
        unverified = () if verify else ("--no-verify",)
        with self._running("build", str(folder.resolve()), "--json", *unverified, *arguments(asked)) as (child, results):
            assert child.stderr is not None
            notes = []
            for line in child.stderr:
                if shown := _SHOWN.match(line):
                    name, stage = shown[1], Stage(name=shown[2]) if shown[2] else None
                    yield BuildEvent(component=name.split("-")[0], engine=name, state="stage" if stage else "begin", stage=stage)
                else:
                    notes.append(line.rstrip())
            try:
                self._end(child, notes)
            except SdruntimeError:
                bundle = Bundle.open(folder)
                yield from (_done(bundle, engine) for engine in bundle.manifest.engines if engine not in before)
                raise
            results.seek(0)
            yield from map(_event, json.load(results)["engines"])

    @contextlib.contextmanager
    def _running(self, *command: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
        """The process, and the file that takes its standard output. Left early, it is interrupted and waited for."""
        with tempfile.TemporaryDirectory() as shown, tempfile.TemporaryFile("w+", encoding="utf-8") as results:
            (Path(shown) / "sdruntime").symlink_to(Path(sdruntime.__file__).resolve().parent)
            paths = [shown, *filter(None, [os.environ.get("PYTHONPATH")])]
            try:
                child = subprocess.Popen(
                    module_command("sdruntime", *command, python=self.python),
                    stdin=subprocess.DEVNULL,
                    stdout=results,
                    stderr=subprocess.PIPE,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), **LINES},
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # a Ctrl-C of the terminal reaches it by way of us, and once
                )
            except OSError as error:
                raise EnvironmentFault(f"--python {self.python}: cannot be started: {error.strerror}") from error
            with child:
                try:
                    yield child, results
                finally:
                    if child.poll() is None:
                        child.send_signal(signal.SIGINT)
                        try:
                            child.wait(_TO_CLEAN_UP)
                        except subprocess.TimeoutExpired:
                            child.kill()

    def _end(self, child: subprocess.Popen[str], notes: list[str]) -> None:
        """Wait, and raise what a code other than 0 stands for."""
        code = child.wait()
        if code == 0:
            return
        begin = next((index for index, line in enumerate(notes) if line.startswith("error: ")), None)
        if begin is not None and code == VerificationFailed.exit_code:
            where, *faults = "\n".join(notes[begin:]).removeprefix("error: ").splitlines()
            raise VerificationFailed(where.rpartition(": ")[0], [fault.removeprefix("  - ") for fault in faults])
        if begin is not None:
            raise _ERRORS.get(code, SdruntimeError)("\n".join(notes[begin:]).removeprefix("error: "))
        last = next((line.strip() for line in reversed(notes) if line.strip()), "no output")
        if code < 0:
            raise EnvironmentFault(f"{self.python} was ended by {signal.Signals(-code).name}: {last}")
        advice = f"Python 3.10 or later with numpy is needed: {shlex.quote(self.python)} -m pip install 'numpy>=1.26'"
        raise EnvironmentFault(f"--python {self.python}: failed with code {code}: {last}; {advice}")


@functools.cache
def _libraries(interpreter: Interpreter) -> dict[str, Any]:
    with interpreter._running("doctor", "--json") as (child, results):
        assert child.stderr is not None
        interpreter._end(child, child.stderr.read().splitlines())
        results.seek(0)
        found: dict[str, Any] = json.load(results)["libraries"]
    return found


def arguments(asked: BuildRequest) -> list[str]:
    """What `sdruntime build` takes for the same."""
    found = ["--backend", asked.backend]
    for name in ("target", "size", "batch", "guidance"):
        if getattr(asked, name) is not None:
            found += [f"--{name}", getattr(asked, name)]
    for component in asked.components:
        found += ["--component", component]
    for component in asked.without:
        found += ["--without", component]
    for key, value in asked.options.items():
        found += ["--option", f"{key}={value}"]
    return found


def _event(row: dict[str, Any]) -> BuildEvent:
    return BuildEvent(
        component=row["component"],
        engine=row["engine"],
        state=row["state"],
        size=row["bytes"],
        seconds=row["seconds"],
        peak=row["peak_memory"],
    )


def _done(bundle: Bundle, engine: EngineSpec) -> BuildEvent:
    size = sum(bundle.manifest.files[path].size for path in engine.files)
    return BuildEvent(component=engine.component, engine=engine.name, state="done", size=size)
