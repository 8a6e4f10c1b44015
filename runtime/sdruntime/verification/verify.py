"""Check a bundle against its reference outputs: every engine that this machine can run, and its ONNX in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import CPU, Engine, EngineOptions, Shared
from sdruntime.backends.registry import OFFERED, backend, is_hidden
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.limits import any_shape
from sdruntime.bundle.manifest import EngineSpec, Manifest
from sdruntime.bundle.roles import of_kind, role
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.engines.choose import Machine, misfit
from sdruntime.engines.finite import checked_rows
from sdruntime.engines.shapes import dims_in_pixels, shapes_in_pixels
from sdruntime.errors import LibraryMissing, NotFinite, SdruntimeError, VerificationFailed
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.system import processor
from sdruntime.system.process import Message, serve
from sdruntime.verification.golden import (
    DOCUMENT,
    Case,
    Digest,
    Golden,
    digest_of,
    image_key,
    read_golden,
    sample_of,
)
from sdruntime.verification.metrics import Difference, image_psnr, ssim
from sdruntime.verification.report import Check, ImageCheck, Report
from sdruntime.verification.tolerance import Tolerance, tolerance_name

ONNX = "onnxruntime"
ITS_ONNX = "its ONNX, ONNX Runtime"  # the title of the bundle's own ONNX in a report
Reference = Callable[[Case], Mapping[str, Array]]


def verify(
    folder: Path | str | Bundle, *, options: EngineOptions | None = None, against: Reference | None = None
) -> Iterator[Check | ImageCheck]:
    """Yield a Check for each output and an ImageCheck for each image. Skipped checks have a reason.

    `against` returns the whole outputs of a case, to compare with instead of the stored samples. Raises BundleError for a bundle
    without reference outputs, and LibraryMissing if no installed library can run any engine.
    """
    bundle = folder if isinstance(folder, Bundle) else Bundle.open(folder)
    golden, numbers = read_golden(bundle)
    options = options or EngineOptions()
    machine = Machine.here(options.device, {ONNX, *(engine.backend for engine in bundle.manifest.engines)})
    work = _Verification(bundle, golden, numbers, machine, options, against)
    own = [onnx_spec(bundle.manifest, name, machine.libraries[ONNX].version or "0") for name in work.components]
    built = [engine for engine in bundle.manifest.engines if not is_hidden(engine.backend) and engine.component != STEP]
    reasons = [work.misfit(engine) for engine in (*own, *built)]
    if all(reasons) and bundle.manifest.precision != "bf16":
        raise LibraryMissing(f"nothing on this machine can run this bundle: {'; '.join(sorted(set(map(str, reasons))))}")
    for component in work.components:
        for engine in (*own, *built):
            if engine.component == component:
                yield from work.engine(engine)
    yield from work.images(ITS_ONNX, ONNX, own)
    for name in OFFERED:
        if group := [engine for engine in bundle.manifest.engines if engine.backend == name]:
            yield from work.images(name, name, group)


def subjects(bundle: Bundle) -> int:
    """Return the number of engines and pipelines that `verify` reports on."""
    manifest = bundle.manifest
    engines = [engine for engine in manifest.engines if not is_hidden(engine.backend)]
    components = sum(name != STEP for name in manifest.components) + sum(engine.component != STEP for engine in engines)
    return components + 1 + len({engine.backend for engine in engines})


def check_engine(bundle: Bundle, engine: EngineSpec) -> str:
    """Check one engine against the reference outputs, for a build.

    Return why it could not run on this machine, or "" if it did or if the bundle has no reference outputs for it. Raises
    VerificationFailed.
    """
    if DOCUMENT not in bundle.manifest.files or is_hidden(engine.backend) or engine.component == STEP:
        return ""
    golden, numbers = read_golden(bundle)
    options = EngineOptions()
    work = _Verification(bundle, golden, numbers, Machine.here(options.device, {engine.backend}), options, None)
    checks = list(work.engine(engine))
    if faults := [f"{check.title}: {check.reason}" for check in checks if check.status == "fail"]:
        raise VerificationFailed(f"{bundle.folder}: engine {engine.name} is not added", faults)
    return "; ".join(f"{engine.name} was not verified: {check.reason}" for check in checks if check.status == "skip")


def report_of(bundle: Bundle, results: Iterable[Check | ImageCheck], *, reference: str = "") -> Report:
    """Return the report of these checks, with the limits that were applied, the time and the machine."""
    results = list(results)
    golden = read_golden(bundle)[0]
    versions = ", ".join(f"{name} {version}" for name, version in golden.reference.items())
    checks = tuple(result for result in results if isinstance(result, Check))
    here = Machine.here(names={ONNX, *(engine.backend for engine in bundle.manifest.engines if not is_hidden(engine.backend))})
    applied = dict.fromkeys(check.tolerance for check in checks if check.difference is not None) or [bundle.manifest.precision]
    return Report(
        bundle=bundle.folder.name,
        model=bundle.manifest.model.name,
        precision=bundle.manifest.precision,
        reference=reference or f"its reference outputs ({versions})",
        checks=checks,
        pictures=tuple(result for result in results if isinstance(result, ImageCheck)),
        limits={name: golden.tolerances[name] for name in applied},
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine={
            "processor": processor.name(),
            **{f"gpu {index}": device.name for index, device in enumerate(here.devices)},
            "system": f"{platform.system()} {platform.machine()}",
            **{name: f"{name} {library.version}" for name, library in here.libraries.items() if library.version},
        },
    )


def onnx_spec(manifest: Manifest, component: str, version: str) -> EngineSpec:
    """Return a component's own ONNX as an engine of ONNX Runtime on the CPU, for any shape."""
    spec = manifest.components[component]
    return EngineSpec(
        component=component,
        backend=ONNX,
        version=version,
        target=CPU,
        precision=manifest.precision,
        files=spec.files,
        profiles=(any_shape(spec.dimensions),),
    )


def label(engine: EngineSpec) -> str:
    """Return the title of an engine in a report: its name, or ITS_ONNX."""
    return engine.name if engine.files[0].startswith("engines/") else ITS_ONNX


@dataclass(frozen=True, slots=True)
class _Verification:
    bundle: Bundle
    golden: Golden
    numbers: Mapping[str, Array]
    machine: Machine
    options: EngineOptions
    against: Reference | None

    @property
    def components(self) -> list[str]:
        return [name for name in self.bundle.manifest.components if name != STEP]

    def misfit(self, engine: EngineSpec) -> str | None:
        return misfit(engine, self.machine)

    def engine(self, spec: EngineSpec) -> Iterator[Check]:
        """Check the outputs of one engine in every case that it admits."""
        check = functools.partial(
            Check, component=spec.component, engine=label(spec), precision=spec.precision, tolerance=tolerance_name(spec)
        )
        if why_not := self.misfit(spec):
            yield check(status="skip", reason=why_not)
            return
        cases = [case for case in self.golden.cases if case.component == spec.component]
        fitting = [case for case in cases if spec.admits(**{name: size for name, size in case.dims.items() if name != "batch"})]
        if not fitting:
            model = self.bundle.manifest.model
            sizes = " or ".join(dims_in_pixels(spec.component, model, case.dims) for case in cases)
            built = shapes_in_pixels(spec, model)
            yield check(status="skip", reason=f"built for {built}; the reference outputs are for {sizes}")
            return
        shared = Shared()
        try:
            opened = backend(spec.backend).open_engine(self.bundle, spec, self.options, shared)
            with opened as engine:
                for case in fitting:
                    yield from self.case(engine, case)
        except SdruntimeError as error:
            yield check(status="fail", reason=str(error))
        finally:
            shared.close()

    def case(self, engine: Engine, case: Case) -> Iterator[Check]:
        """Check the outputs of one engine in one case."""
        tolerance = self.golden.tolerances[tolerance_name(engine.spec)]
        try:
            outputs = checked_rows(
                engine, case.feeds(engine.component), lambda row: f"case {case.name}, row {row}", self.bundle.folder
            )
        except NotFinite as error:
            yield _checked(engine.spec, case, "", None, [str(error)])
            return
        whole = None if self.against is None else self.against(case)
        for name, digest in case.outputs.items():
            ours, stored = outputs[name], self.numbers[case.key(name)]
            if ours.shape != digest.shape:
                yield _checked(engine.spec, case, name, None, [f"shape {list(ours.shape)}, not {list(digest.shape)}"])
                continue
            pair = (sample_of(ours, case.seed), stored) if whole is None else (ours, whole[name])
            difference = Difference.of(*pair, digest.largest)
            faults = [*component_faults(difference, tolerance), *digest_faults(digest_of(ours), digest, tolerance)]
            yield _checked(engine.spec, case, name, difference, faults)

    def images(self, title: str, backend_name: str, group: list[EngineSpec]) -> Iterator[ImageCheck]:
        """Generate the reference images with these engines of one backend, and check them."""
        usable = [engine for engine in group if not self.misfit(engine)]
        if why_not := self._why_no_images(group, usable):
            yield ImageCheck(engines=title, status="skip", reason=why_not)
            return
        limits = min((self.golden.tolerances[tolerance_name(engine)] for engine in usable), key=lambda kind: kind.picture_psnr)
        manifest = dataclasses.replace(self.bundle.manifest, engines=tuple(usable))
        try:
            with Pipeline.open(Bundle(self.bundle.folder, manifest), backend=backend_name, options=self.options) as pipe:
                images = pipe([reference.request(self.bundle.manifest) for reference in self.golden.drawings]).pixels
        except SdruntimeError as error:
            yield ImageCheck(engines=title, status="fail", reason=str(error))
            return
        for index, (reference, image) in enumerate(zip(self.golden.drawings, images, strict=True)):
            stored = self.numbers[image_key(index)].astype(np.uint8)
            psnr, similarity = image_psnr(image, stored), ssim(image, stored)
            bounds = (("PSNR", psnr, limits.picture_psnr), ("SSIM", similarity, limits.ssim))
            reason = "; ".join(f"{name} {value:.4g}, under {least:g}" for name, value, least in bounds if value < least)
            yield ImageCheck(
                engines=title,
                prompt=reference.prompt,
                status="fail" if reason else "pass",
                psnr=psnr,
                ssim=similarity,
                reason=reason,
                drawn=image,
                stored=stored,
            )

    def _why_no_images(self, group: list[EngineSpec], usable: list[EngineSpec]) -> str | None:
        """Return why the reference images cannot be generated with these engines, or None if they can."""
        needed = {component for component in self.components if not role(component).late}
        if lacking := sorted(needed - {engine.component for engine in usable}):
            faults = [fault for engine in group if engine.component in lacking and (fault := self.misfit(engine))]
            return faults[0] if faults else f"no engine of {', '.join(lacking)}"
        (width, height), factor = self.golden.drawings[0].size, self.bundle.manifest.model.vae_factor
        for component in of_kind(self.components, "denoiser", "VAE decoder"):
            engines = [engine for engine in usable if engine.component == component]
            if not any(engine.admits(width=width // factor, height=height // factor) for engine in engines):
                return f"no engine of {component} takes images of {width}x{height}"
        return None


def component_faults(difference: Difference, tolerance: Tolerance) -> Iterator[str]:
    """Yield the limits of an output that a difference exceeds."""
    if difference.relative > tolerance.relative:
        yield f"largest error {difference.relative:.2e} of the largest value, over {tolerance.relative:.0e}"
    if difference.psnr < tolerance.psnr:
        yield f"PSNR {difference.psnr:.1f} dB, under {tolerance.psnr:g}"
    if difference.cosine < tolerance.cosine:
        yield f"cosine {difference.cosine:.7f}, under {tolerance.cosine:g}"


def digest_faults(actual: Digest, expected: Digest, tolerance: Tolerance) -> Iterator[str]:
    """Yield the statistics of an output that are farther from the expected ones than the tolerance."""
    limit = tolerance.digest * expected.largest
    for part in ("mean", "std", "min", "max"):
        ours, reference = getattr(actual, part), getattr(expected, part)
        if abs(ours - reference) > limit:
            yield f"{part} {ours:.6g}, not {reference:.6g} to {limit:.1g}"
    if abs(actual.norm - expected.norm) > tolerance.digest * expected.norm:
        yield f"norm {actual.norm:.6g}, not {expected.norm:.6g}"


def _checked(spec: EngineSpec, case: Case, output: str, difference: Difference | None, faults: list[str]) -> Check:
    return Check(
        component=spec.component,
        engine=label(spec),
        precision=spec.precision,
        tolerance=tolerance_name(spec),
        case=case.name,
        output=output,
        status="fail" if faults else "pass",
        difference=difference,
        reason="; ".join(faults),
    )


def _work(job: Message, send: Callable[[Message], None]) -> Message:
    """Verify a bundle for a build, and return the report's faults and the number of checks that ran. Sends its progress."""
    bundle = Bundle.open(job["bundle"])
    golden, _ = read_golden(bundle)
    total, results = sum(len(case.outputs) for case in golden.cases) + len(golden.drawings), []
    for result in verify(bundle, options=EngineOptions(low_memory=True)):
        results.append(result)
        send({"done": len(results), "total": total})
    report = report_of(bundle, results)
    return {"ran": report.ran, "faults": report.faults()}


if __name__ == "__main__":
    serve(_work, errors=(SdruntimeError,), memory=LibraryMissing("out of memory: free some, or build with --no-verify"))
