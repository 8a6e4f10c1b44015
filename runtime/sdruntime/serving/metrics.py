"""Counters, gauges and histograms in the text format of Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Labels = tuple[str, ...]  # the values, in the order of the metric's names
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


@dataclass(slots=True, eq=False)
class Metric:
    """A counter or a gauge, with a number for each combination of labels. `read`: where a gauge's numbers come from."""

    name: str
    what: str
    kind: Literal["counter", "gauge"]
    labels: Sequence[str] = ()
    read: Callable[[], Mapping[Labels, float]] | None = None
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, *labels: str, by: float = 1.0) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + by

    def lines(self) -> Iterator[str]:
        for labels, value in sorted((self.read() if self.read else self.values).items()):
            yield f"{self.name}{_braces(self.labels, labels)} {_number(value)}"


@dataclass(slots=True, eq=False)
class Histogram:
    """How often a number was at most each of the bounds, for each combination of labels."""

    name: str
    what: str
    labels: Sequence[str] = ()
    bounds: Sequence[float] = SECONDS
    kind: Literal["histogram"] = "histogram"
    counts: dict[Labels, list[int]] = field(default_factory=dict)  # of each bound, and beyond the last
    sums: dict[Labels, float] = field(default_factory=dict)

    def observe(self, value: float, *labels: str) -> None:
        counts = self.counts.setdefault(labels, [0] * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, value)] += 1
        self.sums[labels] = self.sums.get(labels, 0.0) + value

    def lines(self) -> Iterator[str]:
        for labels, counts in sorted(self.counts.items()):
            total = 0
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_braces((*self.labels, 'le'), (*labels, bound))} {total}"
            braces = _braces(self.labels, labels)
            yield f"{self.name}_sum{braces} {_number(self.sums[labels])}"
            yield f"{self.name}_count{braces} {total}"


def exposition(metrics: Sequence[Metric | Histogram]) -> str:
    """Return all metrics as text."""
    lines = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.what}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    return "\n".join(lines) + "\n"


def _braces(names: Sequence[str], values: Labels) -> str:
    escaped = (value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in values)
    pairs = ",".join(f'{name}="{value}"' for name, value in zip(names, escaped, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def _number(value: float) -> str:
    return f"{value:.12g}"
