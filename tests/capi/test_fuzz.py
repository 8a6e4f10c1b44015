"""Compare the library's readers of JSON and of socket messages with Python's, on 20 000 documents and 3000 streams with damage.

The cases are the same in each run. The programs run under the sanitizers, which also end them if a false length makes them
allocate more than 4 MiB.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from capi.building import CAPI, TIMEOUT
from capi.conftest import Build

DOCUMENTS, STREAMS = 20_000, 3000
DEEPEST = 64
HEADER = struct.Struct("<IIQ")
LARGEST_JSON, LARGEST_BLOB = 64 << 20, 1 << 32
FILE = bytes(k % 251 for k in range(100_000))


@pytest.fixture(scope="module")
def fuzz(build: Build) -> Path:
    library = build("asan")
    objects = (library.folder / f"{name}.o" for name in ("json", "socket", "descriptor"))
    return library.program("fuzz.cpp", *objects, flags=(f"-I{CAPI / 'src'}",))


def run_cases(program: Path, mode: str, cases: Sequence[bytes]) -> list[bytes]:
    """Return the program's result for each case."""
    stdin = b"".join(struct.pack("<I", len(case)) + case for case in cases)
    limits = {"ASAN_OPTIONS": "max_allocation_size_mb=4", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        [program, mode], input=stdin, capture_output=True, check=False, timeout=TIMEOUT, env={**os.environ, **limits}
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode(errors="replace")[-6000:]
    results, at = [], 0
    while at < len(done.stdout):
        [size] = struct.unpack_from("<I", done.stdout, at)
        results.append(done.stdout[at + 4 : at + 4 + size])
        at += 4 + size
    before, after = results.pop().split()
    assert before == after, "descriptors were left open"
    assert len(results) == len(cases)
    return results


# ---- JSON

SEEDS = [
    {"event": "progress", "job": 4096, "step": 3, "steps": 20, "preview": [4, 64, 64]},
    {
        "event": "done",
        "job": 2**64 - 1,
        "seed": 2**63,
        "timings": {"queued": 0.0, "encode": 1.5e-7, "total": 12.25},
        "warnings": ["ä"],
    },
    {"event": "failed", "job": -1, "code": 130, "message": 'cancelled\n\t"at" \\ step \u0001 \u20ac \U0001f600 /'},
    {
        "event": "ready",
        "describe": {"components": {"unet": None, "vae": {"backend": "x"}}, "sizes": [[64, 64], []], "ok": [True, False]},
    },
    {"op": "submit", "request": {"prompt": "", "guidance": 7.5, "rescale": -0.0, "seed": -(2**63)}, "empty": {}},
    [[[[[[1, [2.5e300, [-3e-300, [{"a": [{"b": {}}]}]]]]]]]]],
]
TOKENS = (
    "null true false NaN Infinity -Infinity -0 -0.0 01 +1 1. .5 1e 1e+ 1e5 1E-5 1e308 1e309 -1e400 1e-400 -1e-400 4.9e-324 0.1e1"
    " 18446744073709551615 18446744073709551616 -9223372036854775808 -9223372036854775809 123456789012345678901234567890 - //"
    r' "" "\u0000" "\ud800" "\udc00" "\ud83d\ude00" "\uD83D\u0041" "\ud83d\ue000" "\u12" "\x" "\/" "\b\f"'
    ' {} [] {"a":1,"a":2} [1,] {"a"} {"a":} {,} [,]'
).split()
PIECES = [
    *(token.encode() for token in TOKENS),
    *(b"[" * depth + b"]" * depth for depth in (DEEPEST - 8, DEEPEST, DEEPEST + 1, DEEPEST + 2, 500)),
    *(b'{"a":' * depth + b"1" + b"}" * depth for depth in (DEEPEST, DEEPEST + 1)),
    *rb'" \ "\ "\u "\ud83 "\ud83d "\ud83d\ "\ud83d\ude0 tru - [ {"a" {"a":'.split(),
    *(b"\0", b"\x1f", b"\x7f", b" \t\r\n", b"\x0b"),
    *(b"\xef\xbb\xbf", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"),
    *("é€😀".encode(), b"9" * 400, b"0." + b"3" * 400, b"1" + b"0" * 5000),
]


def damaged(chance: random.Random, document: bytes) -> bytes:
    """Return the document with one to three random changes."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(document) + 1)
        end = min(len(document), at + chance.choice((0, 1, 1, 2, 5, 30, len(document))))
        middle = chance.choice(
            (b"", bytes([chance.randrange(256)]), chance.choice(PIECES), chance.choice(PIECES), document[at:end] * 2)
        )
        document = document[:at] + middle + document[end:]
    return document


def documents() -> list[bytes]:
    chance = random.Random(1)
    seeds = [
        json.dumps(seed, ensure_ascii=ascii_only, indent=indent).encode()
        for seed in SEEDS
        for ascii_only in (True, False)
        for indent in (None, 1)
    ]
    cases = [*seeds, *PIECES, b"", *(b'{"a":' + piece + b"}" for piece in PIECES), *(b"[" + piece + b"]" for piece in PIECES)]
    return cases + [damaged(chance, chance.choice(seeds)) for _ in range(DOCUMENTS - len(cases))]


def strictly(document: bytes) -> Any:
    """Read JSON with Python, but reject what RFC 8259 excludes or leaves to the implementation. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError("out of range")
        return float(text)

    def whole(text: str) -> float:
        return int(text) if len(text) < 25 and -(2**63) <= int(text) < 2**64 else finite(text)

    def refuse(text: str) -> Any:
        raise ValueError(text)

    def check(value: Any, depth: int) -> None:
        if depth > DEEPEST:
            raise ValueError("deep")
        if isinstance(value, str):
            value.encode()  # unpaired surrogate: UnicodeEncodeError, a ValueError
        for inner in (*value.keys(), *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner, depth + 1)

    try:
        value = json.loads(document.decode(), object_pairs_hook=once, parse_float=finite, parse_int=whole, parse_constant=refuse)
    except RecursionError:
        raise ValueError("deep") from None
    check(value, 0)
    return value


def test_json_is_read_like_strict_python(fuzz: Path) -> None:
    cases = documents()
    valid = 0
    for document, result in zip(cases, run_cases(fuzz, "json", cases), strict=True):
        try:
            expected = strictly(document)
        except ValueError:
            assert result.startswith(b"!JSON, byte "), (document, result)
            continue
        valid += 1
        assert result.startswith(b"="), (document, result)
        assert repr(json.loads(result[1:])) == repr(expected), (document, result)
    assert len(cases) == DOCUMENTS
    assert DOCUMENTS // 20 < valid < DOCUMENTS // 2  # the damage is neither too weak nor too strong to test anything


# ---- frames


def expected_of(stream: bytes) -> bytes:
    """Return the expected result for a stream. Its first byte selects the descriptors that are sent along."""
    sizes = {"s": len(FILE), "u": len(FILE), "2": len(FILE), "-": 10, "n": 0, "d": 0}
    file, stream = sizes.get(chr(stream[0])), stream[1:]
    lines = []
    while len(stream) >= HEADER.size:
        size, flags, blob_size = HEADER.unpack_from(stream)
        if size > LARGEST_JSON or blob_size > LARGEST_BLOB or flags > 1:
            return "".join(lines).encode() + b"bad"
        body, stream = stream[HEADER.size :][:size], stream[HEADER.size + size :]
        if len(body) < size:
            break
        if flags:
            if file is None or file < blob_size:
                return "".join(lines).encode() + b"bad"
            blob = FILE[:blob_size]
        else:
            blob, stream = stream[:blob_size], stream[blob_size:]
            if len(blob) < blob_size:
                break
        file = None
        lines.append(f"{size}:{sum(body)} {blob_size}:{sum(blob)}\n")
    return "".join(lines).encode() + b"end"


def streams() -> list[bytes]:
    chance = random.Random(2)
    false_sizes = [
        0,
        1,
        16,
        99_999,
        100_000,
        100_001,
        1 << 20,
        LARGEST_JSON,
        LARGEST_JSON + 1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 1,
        2**60,
        2**64 - 1,
    ]
    cases = []
    for _ in range(STREAMS):
        stream = b""
        for _ in range(chance.randrange(4)):
            body, blob = chance.randbytes(chance.choice((0, 2, 300))), chance.randbytes(chance.choice((0, 1, 5000)))
            shared = chance.random() < 0.3
            announced = chance.choice((0, 10, 11, 70_000, len(FILE), len(FILE) + 1)) if shared else len(blob)
            stream += HEADER.pack(len(body), shared, announced) + body + (b"" if shared else blob)
        damage = chance.randrange(6)
        if damage == 0:
            stream = stream[: chance.randrange(len(stream) + 1)]
        elif damage == 1:
            stream = chance.randbytes(chance.randrange(40)) + stream
        elif damage == 2 and stream:
            at = chance.randrange(len(stream))
            stream = stream[:at] + chance.randbytes(1) + stream[at + 1 :]
        elif damage == 3:
            stream += HEADER.pack(
                chance.choice(false_sizes) & 0xFFFFFFFF, chance.choice((0, 1, 2, 3, 2**31)), chance.choice(false_sizes)
            ) + chance.randbytes(2000)
        cases.append(chance.choice(b"    ssu2-nd").to_bytes(1, "little") + stream)
    return cases


def test_frames_are_read_or_rejected(fuzz: Path) -> None:
    cases = streams()
    results = run_cases(fuzz, "frames", cases)
    for case, result in zip(cases, results, strict=True):
        assert result == expected_of(case), (case[:64], len(case))
    assert 100 < sum(result.endswith(b"bad") for result in results) < STREAMS - 100
