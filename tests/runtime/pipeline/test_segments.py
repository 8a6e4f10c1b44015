from __future__ import annotations

import pytest

from sdruntime.errors import SettingError
from sdruntime.pipeline.text.segments import BREAK, LARGEST_WEIGHT, Segment, segments


def parsed(text: str) -> list[tuple[str, float]]:
    return [(segment.text, round(segment.weight, 6)) for segment in segments(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"back\\slash\z", [(r"back\slashz", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(a:1.2)[b](c:-0.5)", [("a", 1.2), ("b", 0.909091), ("c", -0.5)]),
        ("[[x]] y) z]", [("x", 0.826446), (" y) z]", 1)]),
        ("time: (12:30:1.5), ratio 3:4", [("time: ", 1), ("12:30", 1.5), (", ratio 3:4", 1)]),
        ("(a:1.2", [("a:1.2", 1.1)]),
        ("(a : 1.2 )", [("a ", 1.2)]),
        ("a:1.2)", [("a:1.2)", 1)]),
        ("(nested (deep:2) in:0.5) out", [("nested ", 0.5), ("deep", 1), (" in", 0.5), (" out", 1)]),
        (r"a \(b:1.2\) (c)", [("a (b:1.2) ", 1), ("c", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.909091)]),
        ("(a:1.", [("a:1.", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", 0.909091), ("c", 1)]),
        ("a (b BREAK c:1.3) d", [("a ", 1), ("b", 1.3), ("BREAK", -1.3), ("c", 1.3), (" d", 1)]),
        ("aBREAK BREAKs", [("aBREAK BREAKs", 1)]),
    ],
)
def test_emphasis_is_read_as_the_web_ui_reads_it(text: str, expected: list[tuple[str, float]]) -> None:
    assert parsed(text) == expected


def test_break_takes_the_white_space_beside_it() -> None:
    assert segments("a,  BREAK\n b") == [Segment("a,"), BREAK, Segment("b")]
    assert segments("BREAK BREAK") == [Segment(""), BREAK, Segment(""), BREAK, Segment("")]


@pytest.mark.parametrize("text", ["(x:1.2.3)", "(x:.)", "(a (b:...) c)"])
def test_a_weight_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"the weight ':.*\)' in the prompt: expected a number, such as \(a red fox:1\.2\)"):
        segments(text)


@pytest.mark.parametrize("text", ["(x:1001)", "(x:-99999)", "(" * 80 + "x", f"(x:{'9' * 500})", f"((x:{'9' * 500}):0)"])
def test_a_weight_beyond_the_limit_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"the weight .* of 'x' in the prompt: expected -1,000 to 1,000"):
        segments(text)
    assert parsed(f"(x:{LARGEST_WEIGHT})") == [("x", 1000)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(" * 65536, 1),
        ("[a" * 32768, 7792),  # weights underflow to 0 in the end, where they merge
        ("(" * 32767 + "a:1" + ")" * 32766, None),
        ("[" * 32768 + "a" + "]" * 32767, 1),
        (" " * 65536, 1),
        ("\\" * 65536, 1),
        ("(a:" + "1" * 65532 + ")", None),
        ("(a:1" + " " * 65532, 1),
        ("BREAK " * 10922, 21845),
    ],
)
def test_64_kib_of_brackets_take_linear_time(text: str, expected: int | None) -> None:
    """Quadratic time would be minutes here, and recursion an error."""
    if expected is None:
        with pytest.raises(SettingError):
            segments(text)
    else:
        assert len(segments(text)) == expected
