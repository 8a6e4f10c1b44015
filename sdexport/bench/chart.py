"""A benchmark's document as Markdown tables, and as an image: SVG, a bar for each contestant in each column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from sdexport.bench.bench import WHOLE

COLOURS = ("#2c7fb8", "#d95f0e", "#31a354", "#756bb1", "#c51b8a", "#8c6d31", "#636363")
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 900, 190, 190, 22, 6, 102  # pixels
BUSY = 0.1  # of all cores: above it times are not reliable
CUT = 8.0  # a ratio beyond it has a bar that is cut there, so that the others stay legible


def markdown(document: Mapping[str, Any]) -> Iterator[str]:
    """Line by line: what was measured and where, times with their ratio to the best, memory and start, what failed."""
    told: Mapping[str, Any] = document["contestants"]
    if warning := busy_warning(document):
        yield from (f"**Warning: {warning}.**", "")
    yield f"### {_title(document)}"
    yield ""
    yield f"{_machine(document)}; {_versions(document)}"
    ran = {name: each for name, each in told.items() if "error" not in each}
    yield from ("", f"| | {' | '.join(ran)} |", "|---|" + "---:|" * len(ran))
    for column in columns_of(document):
        times = document["ratios"].get(column, {})
        cells = [_time(_column(each, column), times.get(name)) for name, each in ran.items()]
        yield f"| {column}: p50 (least to p95), rounds, ratio to the best | {' | '.join(cells)} |"
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "host outside the UNet, ms a step": lambda each: _number(each.get("host_outside_unet_per_step", {}).get("p50_ms")),
        "cold start to the first image, s": lambda each: f"{each['cold']['whole_s']:.2f}",
        "of it import, load, warm-up": lambda each: ", ".join(
            f"{each['cold'][part]:.2f}" for part in ("import_s", "load_s", "warmup_s")
        ),
        "peak memory, MB": lambda each: f"{each['peak_memory'] / 1e6:,.0f}",
        "device memory, MB": lambda each: f"{each['device_memory'] / 1e6:,.0f}" if "device_memory" in each else "",
        "engines, MB": lambda each: f"{each['engine_bytes'] / 1e6:,.1f}" if "engine_bytes" in each else "",
        "building them, s": lambda each: f"{sum(each['build_s'].values()):.1f}" if "build_s" in each else "",
        "PSNR against the first, dB": lambda each: f"{each['psnr']:.1f}" if "psnr" in each else "",
    }
    for label, cell in rows.items():
        cells = [cell(each) for each in ran.values()]
        if any(cells):
            yield f"| {label} | {' | '.join(cells)} |"
    yield ""
    for name, each in told.items():
        if "error" in each:
            yield f"{name} did not run: {str(each['error']).splitlines()[0]}"
        for column, found in each.get("components", {}).items():
            if "error" in found:
                yield f"{name}, {column}: {str(found['error']).splitlines()[0]}"
    yield from (f"note: {warning}" for warning in document["warnings"])


def svg(document: Mapping[str, Any]) -> str:
    """Bars as long as the ratio to the best, which is 1, each with its ratio and its median time; cut at `CUT`."""
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
            found = _column(document["contestants"][name], column)
            label = f"{ratio:.2f} ×  ({_number(found['p50_ms'])} ms, n {found['n']})"
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
    """Why the times are not to be trusted, where the machine was busy before the benchmark began; else nothing."""
    busy = document["machine"]["busy"]
    if busy is None or busy <= BUSY:
        return ""
    return f"other processes used {busy:.0%} of this machine before the benchmark began: these times are not reliable"


def columns_of(document: Mapping[str, Any]) -> list[str]:
    """The components that were measured, and the whole."""
    components = [name for each in document["contestants"].values() for name in each.get("components", {})]
    return [*dict.fromkeys(components), WHOLE]


def _title(document: Mapping[str, Any]) -> str:
    settings = document["settings"]
    width, height = settings["size"]
    guided = f"guidance {settings['guidance']:g}" if settings["guidance"] > 1 else "no guidance"
    pictures = "1 image" if settings["batch"] == 1 else f"{settings['batch']} images"
    return (
        f"{document['bundle']['name']}, {document['bundle']['precision']}: {pictures} of {width}×{height}, "
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
    for each in document["contestants"].values():
        versions |= each.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _column(told: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = told.get("end_to_end", {}) if column == WHOLE else told.get("components", {}).get(column, {})
    return found


def _time(found: Mapping[str, Any], ratio: float | None) -> str:
    if "p50_ms" not in found:
        return ""
    compared = "" if ratio is None else f", {ratio:.2f} ×"
    return f"{_number(found['p50_ms'])} ({_number(found['min_ms'])} to {_number(found['p95_ms'])}) ms, n {found['n']}{compared}"


def _number(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"
