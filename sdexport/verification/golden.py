"""Make the reference outputs of a bundle with the checkpoint's own modules in PyTorch, in float32.

The inputs are those of `sdruntime.verification.golden`. This runs in a process of its own, with one network in memory at a time
(two text encoders together, which are smaller than their UNet). The images are those of diffusers' own pipeline over these
networks: `sdexport.verification.original`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sdexport.checkpoint.bounds import at_most
from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.names import match_weights
from sdexport.checkpoint.opening import GOLDEN_STEPS, fitting_steps
from sdexport.checkpoint.unpickle import convert_pickles
from sdexport.errors import EnvironmentFault, ExportError, ProcessKilled, SdexportError
from sdexport.families.components import Component, components
from sdexport.trace.versions import digest_of as hash_of
from sdexport.trace.versions import versions
from sdexport.verification.original import original_images, stand_in
from sdruntime.arrays import Array
from sdruntime.backends.base.engine import CPU
from sdruntime.bundle.bundle import Bundle, disk_full_as_error, sha256
from sdruntime.bundle.limits import any_shape
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec, Manifest, Precision
from sdruntime.bundle.roles import role
from sdruntime.engines.finite import checked_rows
from sdruntime.errors import SdruntimeError
from sdruntime.system.process import Message, run_apart, serve
from sdruntime.verification.golden import (
    Case,
    Golden,
    cases_of,
    digest_of,
    image_key,
    reference_images,
    sample_of,
    write_golden,
)
from sdruntime.verification.tolerance import TOLERANCES

_ADVICE = "free some, build on a larger machine, or build with --no-verify"
_OWN = "weights."  # as in sdexport.trace.to_onnx


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenJob:
    """Make the reference outputs of the staged bundle in `bundle`, from the checkpoint that it was built from."""

    checkpoint: str
    bundle: str
    allow_pickle: bool


class TorchEngine:
    """A component of a checkpoint in PyTorch, on the CPU in float32: `sdruntime.backends.base.engine.Engine`."""

    def __init__(self, checkpoint: Checkpoint, component: Component, spec: ComponentSpec, scratch: Path) -> None:
        self.component = spec
        self.spec = EngineSpec(
            component=component.name,
            backend="torch",
            version=versions()["torch"],
            target=CPU,
            precision="fp32",
            files=(f"{component.name}/torch",),
            profiles=(any_shape(spec.dimensions),),
        )
        self._module = _module(checkpoint, component, scratch)

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        import torch

        with torch.inference_mode():
            outputs = self._module(**{name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: output.numpy() for spec, output in zip(self.component.outputs, outputs, strict=True)}

    @property
    def module(self) -> Any:
        """The wrapper of sdexport.families.modules, with its weights."""
        return self._module

    def close(self) -> None:
        self._module = None

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Reference:
    """The networks of a checkpoint, of which one is in memory at a time, or the text encoders."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, scratch: Path) -> None:
        self._checkpoint, self._manifest, self._scratch = checkpoint, manifest, scratch
        self._table = {component.name: component for component in components(checkpoint)}
        self._open: dict[str, TorchEngine] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._table)

    @property
    def vocabulary(self) -> dict[str, int]:
        return {name: each.config["vocab_size"] for name, each in self._table.items() if "vocab_size" in each.config}

    def engine(self, name: str) -> TorchEngine:
        if name not in self._open:
            if not all(role(other).stage == "text" for other in (name, *self._open)):
                self._open.clear()  # their memory goes first
            self._open[name] = TorchEngine(self._checkpoint, self._table[name], self._manifest.components[name], self._scratch)
        return self._open[name]

    def answer(self, case: Case) -> Mapping[str, Array]:
        """The outputs of a case. Raises NotFinite."""
        engine = self.engine(case.component)
        return checked_rows(engine, case.feeds(engine.component), lambda row: f"golden case {case.name}, row {row}, in PyTorch")


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Of the weights that a checkpoint's networks are made of."""
    files = [path for part in checkpoint.parts.values() for path in part.files]
    return hash_of({path.relative_to(checkpoint.root).as_posix(): sha256(path) for path in files})


def make_golden(job: GoldenJob) -> Iterator[str]:
    """Write the reference outputs into the bundle: yields the name of each network that begins.

    Raises NotFinite for a checkpoint whose numbers are not finite in float32 already.
    """
    bundle = Bundle.open(job.bundle)
    manifest = bundle.manifest
    checkpoint = opened(Path(job.checkpoint), manifest.precision, allow_pickle=job.allow_pickle)
    with disk_full_as_error(bundle.folder):
        reference = Reference(checkpoint, manifest, bundle.folder / "golden.scratch.safetensors")
        cases = cases_of(manifest, reference.vocabulary)
        sampler = stand_in(checkpoint)
        steps = fitting_steps(checkpoint.scheduler, GOLDEN_STEPS, sampler=sampler)
        drawings = reference_images(manifest, steps=steps, sampler=sampler)
        numbers: dict[str, Array] = {}
        answered: dict[str, list[Case]] = {}

        def lend(name: str) -> Any:
            if name not in answered:
                answered[name] = []
                for case in (case for case in cases if case.component == name):
                    outputs = reference.answer(case)
                    numbers.update({case.key(output): sample_of(array, case.seed) for output, array in outputs.items()})
                    digests = {output: digest_of(array) for output, array in outputs.items()}
                    answered[name].append(dataclasses.replace(case, outputs=digests))
            return reference.engine(name).module

        yield "pictures"
        images = original_images(checkpoint, drawings, lend)
        numbers |= {image_key(index): image for index, image in enumerate(images)}
        for name in reference.names:
            if name not in answered:
                yield name
                lend(name)
        golden = Golden(
            checkpoint=checkpoint_hash(checkpoint),
            reference={name: version for name, version in versions().items() if name in ("torch", "diffusers", "transformers")},
            cases=tuple(case for name in reference.names for case in answered[name]),
            drawings=drawings,
            tolerances=TOLERANCES,
        )
        write_golden(bundle, golden, numbers)


def opened(folder: Path, precision: Precision, *, allow_pickle: bool) -> Checkpoint:
    """The checkpoint with the weights that a bundle of this precision is made of."""
    return read_checkpoint(folder, name=folder.name, precision=precision, allow_pickle=allow_pickle)


def run_golden(job: GoldenJob) -> Generator[str, None, int]:
    """`make_golden` in its own process: yields what it yields, and returns the peak of its memory in bytes."""
    peak = 0
    messages = run_apart(
        __name__, dataclasses.asdict(job), what="reference outputs", failed=ExportError, killed=ProcessKilled, advice=_ADVICE
    )
    with contextlib.closing(messages):
        for message in messages:
            if "begin" in message:
                yield message["begin"]
            peak = message.get("peak", peak)
    return peak


def _module(checkpoint: Checkpoint, component: Component, scratch: Path) -> Any:
    """The network with its weights in float32. It is made without numbers, so that its memory is that of its weights."""
    import torch

    from sdexport.families.modules import WRAPPERS

    part = checkpoint.parts[component.part]
    stored = convert_pickles(part.files, scratch) if part.pickled else part.weights
    with torch.device("meta"), at_most(len(stored), where=component.name):
        module = WRAPPERS[component.wrapper](component.config).eval()
    state = module.state_dict()
    found = match_weights(
        {name.removeprefix(_OWN): tuple(each.shape) for name, each in state.items()}, stored, where=component.name
    )
    for name in state:
        state[name] = torch.from_numpy(found[name.removeprefix(_OWN)].read().astype(np.float32, copy=False))
    module.load_state_dict(state, assign=True)
    scratch.unlink(missing_ok=True)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:  # a table of positions, which the wrappers hand in themselves
                setattr(owner, name, torch.arange(buffer.shape[-1])[None])
    return module


def _work(job: Message, tell: Callable[[Message], None]) -> None:
    for name in make_golden(GoldenJob(**job)):
        tell({"begin": name})


if __name__ == "__main__":
    serve(_work, errors=(SdexportError, SdruntimeError), memory=EnvironmentFault(f"out of memory: {_ADVICE}"))
