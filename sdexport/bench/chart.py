"""Render a benchmark's document as Markdown tables, and as an SVG chart with a bar for each contestant in each column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from sdexport.bench.bench import WHOLE

COLOURS = ("#2c7fb8", "#d95f0e", "#31a354", "#756bb1", "#c51b8a", "#8c6d31", "#636363")
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 900, 190, 190, 22, 6, 102  # pixels
BUSY = 0.1  # fraction of all cores used by other processes; times are not reliable above it
CUT = 8.0  # longer bars are cut at this ratio, so that the others stay legible


def markdown(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines: what was measured and where, times with their ratio to the best, memory, cold start and failures."""
    contestants: Mapping[str, Any] = document["contestants"]
    if warning := busy_warning(document):
        yield from (f"**Warning: {warning}.**", "")
    yield f"### {_title(document)}"
    yield ""
    yield f"{_machine(document)}; {_versions(document)}"
    ran = {name: results for name, results in contestants.items() if "error" not in results}
    yield from ("", f"| | {' | '.join(ran)} |", "|---|" + "---:|" * len(ran))
    for column in columns_of(document):
        times = document["ratios"].get(column, {})
        cells = [_time(_column(results, column), times.get(name)) for name, results in ran.items()]
        yield f"| {column}: p50 (least to p95), rounds, ratio to the best | {' | '.join(cells)} |"
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "host outside the UNet, ms per step": lambda run: _number(run.get("host_outside_unet_per_step", {}).get("p50_ms")),
        "cold start to the first image, s": lambda run: f"{run['cold']['whole_s']:.2f}",
        "of it import, load, warm-up": lambda run: ", ".join(
            f"{run['cold'][part]:.2f}" for part in ("import_s", "load_s", "warmup_s")
        ),
        "peak memory, MB": lambda run: f"{run['peak_memory'] / 1e6:,.0f}",
        "device memory, MB": lambda run: f"{run['device_memory'] / 1e6:,.0f}" if "device_memory" in run else "",
        "engines, MB": lambda run: f"{run['engine_bytes'] / 1e6:,.1f}" if "engine_bytes" in run else "",
        "engine build, s": lambda run: f"{sum(run['build_s'].values()):.1f}" if "build_s" in run else "",
        "PSNR against the first, dB": lambda run: f"{run['psnr']:.1f}" if "psnr" in run else "",
    }
    for label, cell in rows.items():
        cells = [cell(results) for results in ran.values()]
        if any(cells):
            yield f"| {label} | {' | '.join(cells)} |"
    yield ""
    for name, results in contestants.items():
        if "error" in results:
            yield f"{name} did not run: {str(results['error']).splitlines()[0]}"
        for column, result in results.get("components", {}).items():
            if "error" in result:
                yield f"{name}, {column}: {str(result['error']).splitlines()[0]}"
    yield from (f"note: {warning}" for warning in document["warnings"])


def svg(document: Mapping[str, Any]) -> str:
    """Return the chart: each bar is as long as its ratio to the best (1), cut at `CUT`, and labelled with ratio and median."""
    columns: Mapping[str, Mapping[str, float]] = document["ratios"]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(document["contestants"])}
    longest = max((ratio for times in columns.values() for ratio in times.values()), default=1.0)
    unit = (WIDTH - LEFT - RIGHT) / min(longest, CUT)
    parts, y = [], TOP
    for column, times in columns.items():
        parts.append(_text(LEFT, y + 14, column, "group"))
        y += 24
        top = y
        for name, ratio in times.items():
            length = min(ratio, CUT) * unit
            result = _column(document["contestants"][name], column)
            label = f"{ratio:.2f} ×  ({_number(result['p50_ms'])} ms, n {result['n']})"
            about = f"data-component={quoteattr(column)} data-contestant={quoteattr(name)}"
            size = f'x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colours[name]}"'
            parts.append(f'<rect class="bar" {about} {size}/>')
            if ratio > CUT:
                x = LEFT + length - 24
                parts.append(f'<path class="cut" d="M{x:.1f} {y + BAR + 2} L{x + 10:.1f} {y - 2}"/>')
            parts.append(_text(LEFT - 8, y + 16, name, "name"))
            parts.append(_text(LEFT + length + 8, y + 16, label, "value"))
            y += BAR + GAP
        x = LEFT + unit
        parts.append(f'<line class="best" x1="{x:.1f}" y1="{top - 2}" x2="{x:.1f}" y2="{y - GAP + 2}"/>')
        y += 14
    head = [_text(16, 28, _title(document), "title"), _text(16, 50, _machine(document), "about")]
    head.append(_text(16, 68, _versions(document), "about"))
    if warning := busy_warning(document):
        head.append(_text(16, 12, f"Warning: {warning}.", "warning"))
    scale = f"time as a ratio to the best of each group (dashed: 1.00), cut at {CUT:g}; shorter is better"
    head.append(_text(16, 86, scale, "about"))
    style = (
        "text{font-family:sans-serif;font-size:13px;fill:#222}.title{font-size:17px;font-weight:bold}.about{font-size:12px;fill:#555}"
        ".group{font-weight:bold}.name{text-anchor:end}.best{stroke:#222;stroke-dasharray:3 3}"
        ".cut{stroke:#fff;stroke-width:4}.warning{font-size:12px;fill:#b00;font-weight:bold}"
    )
    body = "\n".join([f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>', *head, *parts])
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}">'
    return f"{opening}\n<style>{style}</style>\n{body}\n</svg>\n"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def busy_warning(document: Mapping[str, Any]) -> str:
    """Return a warning if the machine was busy before the benchmark began; empty if it was not."""
    busy = document["machine"]["busy"]
    if busy is None or busy <= BUSY:
        return ""
    return f"other processes used {busy:.0%} of this machine before the benchmark began: these times are not reliable"


def columns_of(document: Mapping[str, Any]) -> list[str]:
    """Return the measured components, then `WHOLE`."""
    components = [name for results in document["contestants"].values() for name in results.get("components", {})]
    return [*dict.fromkeys(components), WHOLE]


def _title(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    width, height = settings["size"]
    guided = f"guidance {settings['guidance']:g}" if settings["guidance"] > 1 else "no guidance"
    images = "1 image" if settings["batch"] == 1 else f"{settings['batch']} images"
    return (
        f"{document['bundle']['name']}, {document['bundle']['precision']}: {images} of {width}×{height}, "
        f"{settings['steps']} steps, {guided}"
    )


def _machine(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    load = "" if machine["load"] is None else f", load {machine['load']:g} at the end"
    busy = "" if machine["busy"] is None else f", {machine['busy']:.0%} busy at the start"
    return f"{machine['processor']}, {machine['cores']} cores, {gpus}{busy}{load}"


def _versions(document: Mapping[str, Any]) -> str:
    versions = {**document["versions"]}
    for results in document["contestants"].values():
        versions |= results.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _column(results: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    times: Mapping[str, Any] = results.get("end_to_end", {}) if column == WHOLE else results.get("components", {}).get(column, {})
    return times


def _time(times: Mapping[str, Any], ratio: float | None) -> str:
    if "p50_ms" not in times:
        return ""
    compared = "" if ratio is None else f", {ratio:.2f} ×"
    return f"{_number(times['p50_ms'])} ({_number(times['min_ms'])} to {_number(times['p95_ms'])}) ms, n {times['n']}{compared}"


def _number(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"
