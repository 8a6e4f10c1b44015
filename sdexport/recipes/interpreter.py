"""Build engines with another Python that has the system's engine libraries (as in an NGC container or JetPack).

It needs numpy but no torch. Nothing is installed into it: it can import `sdruntime`, but no other package of this environment.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import sdruntime
from sdruntime.bundle.manifest import Precision
from sdruntime.engines.building import BuildEvent, BuildRequest
from sdruntime.errors import EnvironmentFault
from sdruntime.system.events import finish, mapped
from sdruntime.system.process import Message, Outcome, run_apart
from sdruntime.verification.build import build_job, check_job, event_of

_TO_CLEAN_UP = 30.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A `run.Builder` that runs `python`, the command of the interpreter."""

    python: str

    def check(self, request: BuildRequest, precision: Precision) -> None:
        """Raise EnvironmentFault if it cannot run sdruntime, LibraryMissing, or DeviceMissing if it cannot build the target."""
        try:
            finish(self._events(check_job(request, precision)))
        except EnvironmentFault as error:
            error.args = (f"--python {self.python}: {error}",)
            raise

    def build(self, folder: Path, request: BuildRequest, *, verify: bool) -> Generator[BuildEvent, None, None]:
        """Build as `sdruntime.engines.building.build_engines` does. Closing the generator interrupts the build and cleans up."""
        yield from mapped(self._events(build_job(str(folder.resolve()), request, verify=verify)), event_of)

    def _events(self, job: Message) -> Generator[Message, None, Outcome]:
        if shutil.which(self.python) is None:
            raise EnvironmentFault("cannot be started: no such program")
        advice = f"Python 3.10 or later with numpy is needed: {shlex.quote(self.python)} -m pip install 'numpy>=1.26'"
        with tempfile.TemporaryDirectory() as import_path:
            (Path(import_path) / "sdruntime").symlink_to(Path(sdruntime.__file__).resolve().parent)
            events = run_apart(
                "sdruntime.verification.build",
                job,
                what=self.python,
                failed=lambda reason: EnvironmentFault(f"{reason}; {advice}"),
                killed=EnvironmentFault,
                advice="free some, or build on a larger machine",
                python=self.python,
                path=import_path,
                patience=_TO_CLEAN_UP,
            )
            return (yield from mapped(events, lambda event: event))
