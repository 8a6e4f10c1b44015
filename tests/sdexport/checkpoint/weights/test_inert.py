"""A pickle is read as data, and no pickle takes more than a bounded time or memory."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hostile import Planted

from sdexport.checkpoint.weights.torch_file.inert import Call, Name, read_pickle


def deep(count: int, last: bytes) -> bytes:
    return b"\x80\x02}N" + b"\x85" * count + last


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (deep(200_000, b"K\x01s."), None),  # the hash of such a key would overflow the stack
        (deep(200_000, b"0."), None),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),  # Python's own memo would take 64 GB
        (b"\x80\x02}" + b"2" * 100_000 + b".", None),
        (b"\x80\x02X\xff\xff\xff\xff.", "cut off"),
        (b"\x80\x04\x8d" + b"\xff" * 8, "cut off"),
        (b"\x80\x02cos", "cut off"),
        (b"\x80\x02.", "nothing is on its stack"),
        (b"\x80\x02}K\x01e.", "no mark"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02h\x07.", "it has no object 7"),
        (b"\x80\x02\x82\x01.", "unknown operation 0x82"),  # EXT1
        (b"\x80\x02I12\n.", "unknown operation 0x49"),  # of protocol 0
    ],
)
def test_pickles_that_harm_the_reader(data: bytes, text: str | None) -> None:
    if text is None:
        read_pickle(data)
        return
    with pytest.raises(ValueError, match=text):
        read_pickle(data)


def test_the_work_on_a_pickle_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdexport.checkpoint.weights.torch_file.inert.MOST_OPERATIONS", 1000)
    read_pickle(b"\x80\x02" + b"N0" * 498 + b"N.")
    with pytest.raises(ValueError, match="more than the 1,000 operations"):
        read_pickle(b"\x80\x02" + b"N0" * 500 + b"N.")


def test_names_and_calls_are_data() -> None:
    value = read_pickle(pickle.dumps([os.system, Planted(Path("x")), 1 + 2j], 4)).value
    assert isinstance(value[0], Name)
    assert value[0].name == f"{os.name}.system"
    assert isinstance(value[1], Call)
    assert value[1].arguments == ("touch x",)
    assert (value[2].name, value[2].arguments) == ("builtins.complex", (1.0, 2.0))


@pytest.mark.parametrize(
    "value", [None, True, 0, 255, 65535, -1, 2**31, -(2**31), 2**62, -(2**70), 0.1, "é\n", b"b", (1,), [1, [2]]]
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_of_pickle(value: Any, protocol: int) -> None:
    if isinstance(value, bytes) and protocol == 2:
        value = "b"  # protocol 2 has bytes as a call
    whole = {"x": (value, value, {"y": [value]})}
    assert read_pickle(pickle.dumps(whole, protocol)).value == whole
