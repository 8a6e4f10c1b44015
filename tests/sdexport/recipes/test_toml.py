"""The lines of keys and items, against the document that tomllib reads from the same text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdexport.errors import RecipeError
from sdexport.recipes.toml import Where, lines_of, read_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = '''\
# a comment with = and [table]
title = "a = b # no comment"      # a comment
'quoted key' = 'C:\\path = "x"'
"es\\u0063aped" = 1
dotted.key.deep = 2
dotted . "other part" = 3
many = [
  1,          # ] = 2
  "two = ]",
  [ 3, [4,
    5] ],
  { a = 6, b.c = [7, 8] }, ]
text = """
[not.a.table]
key = "value" \\""" still
"""
raw = \'\'\'
= [[ ]] \'\'\'\'\'
when = 1979-05-27 07:32:00Z
real = -1.5e+3
inline = { x = 1, y = { z = "}" }, "," = [] }

[table]
key = true
  [ table . "sub.table" ]  # indented
  key = inf

[[engines]]
backend = "one"
[engines.options]
level = 3
[[engines.parts]]
name = "first"
[[engines.parts]]
name = "second"
[engines.parts.more]
deep = 0x10

[[ engines ]]
[engines.components.unet]
batch = [
]
[[engines.parts]]
name = "third"
'''


def places(value: Any, where: Where = ()) -> Iterator[Where]:
    """Every key and every item of a document."""
    if where:
        yield where
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*where, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*where, index))


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n"), "", "\n\n", "# end", "a=1", "a=[1,2]#x", "[a]", "a = ''''''"])
def test_every_key_and_item_has_a_line_and_nothing_else_has(text: str) -> None:
    assert set(lines_of(text)) == set(places(tomllib.loads(text)))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("where", "line"),
    [
        (("title",), "title ="),
        (("quoted key",), "'quoted key'"),
        (("escaped",), '"es'),
        (("dotted", "key", "deep"), "dotted.key.deep"),
        (("dotted", "other part"), "dotted . "),
        (("many",), "many = ["),
        (("many", 0), "  1,"),
        (("many", 1), '  "two'),
        (("many", 2, 1, 1), "    5]"),
        (("many", 3, "b", "c", 1), "  { a = 6"),
        (("when",), "when ="),
        (("inline", "y", "z"), "inline ="),
        (("table",), "[table]"),
        (("table", "sub.table", "key"), "  key = inf"),
        (("engines",), "[[engines]]"),
        (("engines", 0, "options", "level"), "level = 3"),
        (("engines", 0, "parts", 1), '[[engines.parts]]\nname = "second"'),
        (("engines", 0, "parts", 1, "more", "deep"), "deep = 0x10"),
        (("engines", 1), "[[ engines ]]"),
        (("engines", 1, "components", "unet", "batch"), "batch = [\n]"),
        (("engines", 1, "parts", 0, "name"), 'name = "third"'),
    ],
)
def test_the_line_is_the_one_on_which_it_begins(where: Where, line: str, ending: str) -> None:
    assert TEXT.count("\n" + line) == 1
    expected = TEXT.index("\n" + line)
    assert lines_of(TEXT.replace("\n", ending))[where] == TEXT.count("\n", 0, expected) + 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"a = 1\nb = = 2\n", ":2:5: not TOML: "),
        (b"a = 1\na = 2\n", ":2:6: not TOML: Cannot overwrite a value"),
        (b'a = 1\n\nb = """\n', ":4:1: not TOML: "),
        (b"a = '\xff'", "not UTF-8, from byte 5 on"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_toml_is_told_with_line_and_column(data: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        read_toml(file)
    assert str(file) in caught.value.faults[0]
    assert told in caught.value.faults[0]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not readable: No such file"):
        read_toml(tmp_path / "a.toml")
