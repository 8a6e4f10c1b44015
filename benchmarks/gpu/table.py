"""A run of the benchmark as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdexport.bench.diffusers import COMPILED, EAGER


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    gpu, versions = document["gpu"], document["versions"]
    yield f"## {gpu['name']} (compute capability {gpu['capability']}, driver {gpu['driver'] or '?'} for CUDA {gpu['cuda']})"
    yield ""
    yield ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    for name, each in document["backends"].items():
        if each["missing"]:
            yield f"\n{name}: did not run: {each['missing']}"
    if document["diffusers"] != "in the race":
        yield f"\ndiffusers: {document['diffusers']}"
    for model, told in document["models"].items():
        yield from ("", f"### {model}", "")
        if "error" in told:
            yield f"failed: {told['error']}"
        yield from _components(told)
        yield from _loops(told)
        yield from _cases(told)
        yield from _queue(told)
        yield from (f"note: {text}" for text in told.get("notes", []))


def _components(told: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, each in told["backends"].items():
        if "error" in each:
            yield f"{name} failed: {each['error']}"
        for component, measured in each.get("components", {}).items():
            for one in measured:
                device = f"{_ms(one.get('device'))} | {_ms(one.get('device'), 'p95_ms')}"
                call = f"{_ms(one['call'])} | {_ms(one['call'], 'p95_ms')}"
                rows.append(f"| {name} | {component} | {one['dims'].get('batch', '')} | {device} | {call} |")
    if rows:
        yield "| backend | component | rows | device p50 | p95 | call p50 | p95, ms |"
        yield from ("|---|---|---|---|---|---|---|", *rows, "")


def _loops(told: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, each in told["backends"].items():
        for loop, one in each.get("loops", {}).items():
            outside = one.get("outside_unet_ms", "")
            rows.append(f"| {name}, {loop} | {one['wall_ms']} | {outside} | {one['cpu_ms']} | {one['waits_per_step']:g} |")
        for way, times in each.get("pictures", {}).items():
            what = times.get("error") or f"a whole picture in {_ms(times)} ms (p95 {_ms(times, 'p95_ms')})"
            yield f"{name}, {way}: {what}"
    if rows:
        yield ""
        yield "| loop | a step, ms | of it outside the UNet | host's work, ms | waits of the host |"
        yield from ("|---|---|---|---|---|", *rows, "")


def _cases(told: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for case in told.get("cases", []):
        for name, one in case["contestants"].items():
            times = f"{_ms(one)} | {_ms(one, 'p95_ms')}" if "p50_ms" in one else f"{one.get('error', 'not run')} | "
            ratios = case["times_as_fast"].get(name, {})
            against = " | ".join(_times(ratios.get(rival)) for rival in (EAGER, COMPILED))
            rows.append(f"| {case['steps']} | {case['batch']} | {name} | {times} | {against} | {one.get('psnr', '')} |")
    if rows:
        yield "| steps | pictures | drawn by | p50, ms | p95, ms | against eager | against compiled | PSNR, dB |"
        yield from ("|---|---|---|---|---|---|---|---|", *rows, "")


def _queue(told: Mapping[str, Any]) -> Iterator[str]:
    for name, one in told.get("queue", {}).items():
        together, row = _ms(one["together"]), _ms(one["in a row"])
        ratio = _times(one["times_as_fast"])
        yield f"{one['jobs']} jobs of {one['steps']} steps, {name}: together {together} ms, in a row {row} ms: {ratio}"


def _ms(times: Mapping[str, Any] | None, key: str = "p50_ms") -> str:
    if not times or key not in times:
        return ""
    return f"{times[key]:.3g}" if times[key] < 100 else f"{times[key]:.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"
