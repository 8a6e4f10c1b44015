from __future__ import annotations

import pytest

from sdruntime.errors import SettingError
from sdruntime.pipeline.text.editing import MOST_TEXTS, schedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no editing", [(0, "no editing")]),
        ("", [(0, "")]),
        ("[b:c:0.5]", [(0, "b"), (5, "c")]),
        ("x [b:1] y", [(0, "x  y"), (1, "x b y")]),
        ("[b:1.0]", [(0, "")]),
        ("[a:b:0]", [(0, "b")]),
        ("[a:b:-2]", [(0, "b")]),
        ("[a:b:.25]", [(0, "a"), (2, "b")]),
        ("[a:b:99999999999999999999]", [(0, "a")]),
        ("[a:b:1e999]", [(0, "a")]),
        ("[a::4]z", [(0, "az"), (4, "z")]),
        ("[a: 3 ]", [(0, ""), (3, "a")]),
        ("[:3]", [(0, "")]),
        ("[a:3:4]", [(0, "a"), (4, "3")]),
        ("[(a:1.2):(b):2]", [(0, "(a:1.2)"), (2, "(b)")]),
        ("a [[[b]]:2]", [(0, "a "), (2, "a [[b]]")]),
        ("p[q:[r:s:3]:1]t", [(0, "pqt"), (1, "prt"), (3, "pst")]),
        ("([b:3]:1.2)", [(0, "(:1.2)"), (3, "(b:1.2)")]),
        (r"[a\]:3]", [(0, ""), (3, r"a\]")]),
    ],
)
def test_editing_over_ten_steps(text: str, expected: list[tuple[int, str]]) -> None:
    assert schedule(text, 10) == expected


def test_alternation() -> None:
    assert [text for _, text in schedule("[fe|]male", 4)] == ["female", "male", "female", "male"]
    assert [text for _, text in schedule("[a|b||(c:1.1)]", 6)] == ["a", "b", "", "(c:1.1)", "a", "b"]
    assert schedule("[a|a]", 10) == [(0, "a")]
    assert schedule("[[a|b]:2]", 5) == [(0, ""), (2, "a"), (3, "b"), (4, "a")]
    assert schedule("[a|b]", 1) == [(0, "a")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a:b:0.5]", [(0, "b")]),  # done in the first pass
        ("[a:b:1.0]", [(0, "b")]),
        ("[a:b:1.5]", [(0, "a"), (5, "b")]),  # shares above 1 are of the second pass
        ("[a:b:20]", [(0, "b")]),  # numbers of steps count from the beginning of the first
        ("[a:b:23]", [(0, "a"), (3, "b")]),
        ("[a|b]", [(k, "ab"[k % 2]) for k in range(10)]),
    ],
)
def test_the_texts_of_a_second_pass_are_those_of_the_web_ui(text: str, expected: list[tuple[int, str]]) -> None:
    assert schedule(text, 10, passed=20) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("a [unbalanced", "a] b", "[a:3", "[a:b]", "[a:b:c:3]", "(a:b:c)", "[(b:3]", "[a):3]", "[b]:3]", "[[a:b]:3]", "[a:x3]"),
        *("a | b [c:5]", "(a|b)", "[a|b:3]", "[a|b", "[c:5]\\", "[c:5]\\\n"),  # a bar that is no alternation turns editing off
    ],
)
def test_what_is_no_form_of_editing_stays_as_it_is(text: str) -> None:
    assert schedule(text, 10) == [(0, text)]


def test_editing_inside_of_brackets_without_meaning() -> None:
    assert schedule("((a][:b:c [d:3]", 10) == [(0, "((a][:b:c "), (3, "((a][:b:c d")]
    assert schedule("[a:[b|c]", 3) == [(0, "[a:b"), (1, "[a:c"), (2, "[a:b")]


def test_a_prompt_of_too_many_texts_is_refused() -> None:
    with pytest.raises(SettingError, match=rf"changes to more than {MOST_TEXTS} texts in 1,000 steps: use fewer"):
        schedule("[a|b|c|d|e|f|g] [a|b|c|d|e] [a|b|c|d|e|f|g|h|i|j|k]", 1000)
    assert len(schedule("[a|b] [a|b|c]", 1000)) == 1000


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("(" * 32768 + ")" * 32768, 1),
        ("[" * 32768 + "a" + "]" * 32767, 1),
        ("[" * 16384 + "a" + ":1]" * 16383, 2),
        ("[a|" * 21845, 1),
        ("[" * 16384 + "a" + "|b]" * 16384, 2),
        ("[a:1]" * 13107, 2),
        ("[" + "|" * 65000 + "]", 1),
        ("\\[" * 32768, 1),
    ],
)
def test_64_kib_of_brackets_take_linear_time(text: str, texts: int) -> None:
    """Quadratic time would be minutes here, and recursion an error."""
    assert len({text for _, text in schedule(text, 200)}) == texts
