"""Show the images of `generate` while they are generated: in files, or in a terminal that can show images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdruntime.cli.terminal import check_output
from sdruntime.cli.terminal_images import TerminalImages, enlarged
from sdruntime.errors import SettingError, quoted
from sdruntime.pipeline.images.png import png_from_image, write_file
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.vae.preview import Kind, best_preview, check_preview
from sdruntime.sampling.job import State

OPTION = "--preview-dir"


class Previews:
    """The previews of a command, after every `every` model calls.

    They go to SEED-STEP.png in `folder`, which is made, or to the terminal if `folder` is None. `kind` None: the best
    that costs little. Raises SettingError if there is no place to show them.
    """

    def __init__(self, kind: Kind | None, folder: Path | None, *, every: int = 1, overwrite: bool = False, shown: bool = True):
        if every < 1:
            raise SettingError(f"--preview-every {every}: expected a number of steps, at least 1")
        self._kind, self._folder, self._every = kind, folder, every
        self._terminal = TerminalImages.on(sys.stderr) if shown and folder is None else None
        if folder is not None:
            check_output(folder / "preview.png" if folder.is_dir() else folder, OPTION)
            if folder.exists() and not folder.is_dir():
                raise SettingError(f"{OPTION} {folder}: this is a file: name a folder")
            if folder.is_dir() and any(folder.iterdir()) and not overwrite:
                raise SettingError(f"{OPTION} {folder}: the folder is not empty: name another one, or add --overwrite")
        elif self._terminal is None:
            reason = (
                "this terminal shows no images (kitty, iTerm2 or sixel)" if shown else "nothing is shown with --json or --quiet"
            )
            raise SettingError(f"--preview: {reason}: add {OPTION} {quoted('previews')}")

    def check(self, pipe: Pipeline) -> None:
        """Check the kind of preview before the first image. Raises Unsupported for a bundle that lacks what it needs."""
        self._kind = self._kind or best_preview(pipe.bundle.manifest)
        check_preview(self._kind, pipe.bundle.manifest)
        if self._folder is not None:
            self._folder.mkdir(exist_ok=True)

    def show(self, pipe: Pipeline, state: State, requests: Sequence[Request]) -> None:
        """Show the state between two model calls, if it is the turn of one."""
        if state.step % self._every or self._kind is None:
            return
        previews = pipe.preview(state.jobs, self._kind)
        if self._terminal is not None:
            height = max(len(pixels) for pixels in previews)
            self._terminal.show(np.concatenate([enlarged(pixels, height) for pixels in previews], axis=1))
        for request, job, pixels in zip(requests, state.jobs, previews, strict=True):
            if self._folder is not None and job.step == state.step:  # others ended before
                whole = enlarged(pixels, job.run.x.shape[1] * pipe.model.vae_factor)
                write_file(self._folder / f"{request.seed}-{state.step:03}.png", png_from_image(whole))
