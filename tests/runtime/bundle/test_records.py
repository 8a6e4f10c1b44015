from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from sdruntime.bundle.records import json_from_record, json_from_text, record_from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    kind: Literal["a", "b"]
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size {self.size} is not positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...]
    pair: tuple[int, str]
    by_name: Mapping[str, tuple[float, ...]]
    mixed: tuple[int | str, ...] = ()
    note: str | None = None
    anything: Any = None


GOOD = {
    "name": "oak",
    "leaves": [{"kind": "a", "size": 3}, {"kind": "b"}],
    "pair": [1, "x"],
    "by_name": {"k": [1, 2.5]},
    "mixed": [1, "n"],
}


def read(document: Any) -> tuple[Any, list[str]]:
    faults: list[str] = []
    return record_from_json(Tree, document, where="", faults=faults), faults


def test_a_record_survives_the_way_to_json_and_back() -> None:
    tree, faults = read(GOOD)
    assert faults == []
    assert tree.leaves == (Leaf(kind="a", size=3), Leaf(kind="b"))
    assert tree.by_name == {"k": (1.0, 2.5)}
    assert tree.mixed == (1, "n")
    assert read(json_from_record(tree)) == (tree, [])


def test_every_fault_is_told_at_once_under_its_path() -> None:
    bad = {
        "leaves": [{"kind": "c"}, {"kind": "a", "size": 0}, {"kind": "a", "size": True, "colour": 1}],
        "pair": [1],
        "by_name": {"k": [1, "two"]},
        "note": 3,
    }
    _, faults = read(bad)
    assert sorted(fault.split(":")[0] for fault in faults) == [
        "by_name.k[1]",
        "leaves[0].kind",
        "leaves[1]",
        "leaves[2].colour",
        "leaves[2].size",
        "name",
        "note",
        "pair",
    ]
    assert "leaves[1]: size 0 is not positive" in faults


def test_infinity_is_read_but_is_no_number_of_a_record() -> None:
    assert json_from_text('{"lambda_min_clipped": -Infinity}') == {"lambda_min_clipped": -math.inf}
    _, faults = read(GOOD | {"by_name": {"k": [math.inf]}})
    assert faults == ["by_name.k[0]: expected a number, got Infinity"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "1e999"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "property name"),
    ],
)
def test_json_that_is_not_strict_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_from_text(text)


def even(value: int | str) -> None:
    if int(value) % 2:
        raise ValueError(f"{value} is odd")


Even = Annotated[int | str, even]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    one: Even = 0
    some: Even | tuple[Even, ...] = 0
    off: Literal[False] | Leaf | None = None


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"one": 2, "some": [4, "6"], "off": False}, []),
        ({"one": 3, "some": "5"}, ["one: 3 is odd", "some: 5 is odd"]),
        ({"some": [2, 3, True]}, ["some[1]: 3 is odd", "some[2]: expected a whole number or text, got true"]),
        ({"some": 1.5}, ["some: expected a whole number or text or a list, got 1.5"]),
        ({"off": True}, ["off: expected false or an object, got true"]),
        ({"off": 0}, ["off: expected false or an object, got 0"]),
        ({"off": {"kind": "a", "size": 0}}, ["off: size 0 is not positive"]),
        ({"off": {"sort": "a"}}, ["off.sort: unknown key", "off.kind: missing"]),
    ],
)
def test_a_checked_value_and_a_choice_of_forms(document: dict[str, Any], expected: list[str]) -> None:
    faults: list[str] = []
    record = record_from_json(Checked, document, where="", faults=faults)
    assert faults == expected
    assert faults or record == Checked(one=2, some=(4, "6"), off=False)
