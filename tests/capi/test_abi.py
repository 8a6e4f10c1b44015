"""Compatibility with programs compiled earlier: the layout of the structs, and older and newer headers."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import pytest
from capi.binding import HEADER, STRUCTS, JobParams, fields
from capi.building import HERE, INCLUDE, STAND_IN, Library, run

from sdruntime.pipeline.requests.ranges import NUMBERS

FIRST = HERE / "abi1" / "sdruntime.h"
GOLDEN = HERE / "abi.json"


def layout(library: Library, include: Path, name: str, tmp_path: Path) -> dict[str, dict[str, int]]:
    """Return struct -> field -> offset in bytes, and "sizeof", as the C compiler computes them."""
    lines = []
    for struct in STRUCTS:
        lines.append(f'printf("{struct} sizeof %zu\\n", sizeof({struct}));')
        lines += [f'printf("{struct} {field} %zu\\n", offsetof({struct}, {field}));' for _, field in fields(struct)]
    source = tmp_path / "layout.c"
    body = "\n".join(lines)
    source.write_text(f'#include <stdio.h>\n#include "sdruntime/sdruntime.h"\nint main(void) {{\n{body}\nreturn 0;\n}}\n')
    offsets: dict[str, dict[str, int]] = {}
    for line in run(library.program(source, name=name, include=include)).splitlines():
        struct, field, number = line.split()
        offsets.setdefault(struct, {})[field] = int(number)
    return offsets


def include_of(folder: Path, header: str) -> Path:
    """Write a header to an include folder, and return the folder."""
    (folder / "sdruntime").mkdir()
    (folder / "sdruntime" / "sdruntime.h").write_text(header)
    return folder


def test_sizes_and_offsets_are_unchanged(library: Library, tmp_path: Path) -> None:
    """Valid for 64-bit machines. Add a new field at the end of its struct, then to abi.json; existing offsets never change."""
    assert layout(library, INCLUDE, "layout", tmp_path) == json.loads(GOLDEN.read_text())


def test_the_defaults_of_a_job_are_those_of_a_request(library: Library) -> None:
    params = JobParams()
    ctypes.CDLL(str(library.folder / "libsdruntime.so")).sdr_job_params_init(ctypes.byref(params), ctypes.sizeof(params))
    comments = dict(
        re.findall(
            r"(\w+);\s*/\*([^*]*)\*/",
            HEADER.read_text(encoding="utf-8").split("struct sdr_job_params {")[1].split("} sdr_job_params")[0],
        )
    )
    for name in ("steps", "seed", "guidance", "rescale", "strength"):
        assert getattr(params, name) == NUMBERS[name]
        assert f"{NUMBERS[name]:g}" in re.findall(r"\d+(?:\.\d+)?", comments[name])
    assert (params.negative, params.sampler, params.schedule, params.width, params.height) == (None, None, None, 0, 0)


def test_todays_structs_begin_with_the_fields_of_the_first_header(library: Library, tmp_path: Path) -> None:
    first = FIRST.read_text(encoding="utf-8")
    for struct in set(STRUCTS) - {"sdr_control"}:  # since ABI 1.3
        [body] = re.findall(rf"typedef struct {struct} \{{(.*?)\}} {struct};", first, flags=re.DOTALL)
        plain = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
        original = re.findall(r"^\s*(.+?[ *])(\w+);", plain, flags=re.MULTILINE)
        assert len(original) >= 7
        assert fields(struct)[: len(original)] == original


@pytest.mark.parametrize("which", ["first", "newer"])
def test_a_program_with_another_header_runs(library: Library, empty_bundle: Path, tmp_path: Path, which: str) -> None:
    if which == "first":
        include, flags = include_of(tmp_path, FIRST.read_text(encoding="utf-8")), ()
    else:
        header, count = re.subn(r"^\} (sdr_\w+);", r"    uint64_t newer;\n} \1;", HEADER.read_text("utf-8"), flags=re.MULTILINE)
        assert count == len(STRUCTS)
        newer = re.sub(r"(#define SDR_ABI_MINOR) (\d+)", lambda match: f"{match[1]} {int(match[2]) + 1}", header)
        include, flags = include_of(tmp_path, newer), ("-DNEWER",)
    program = library.program("abi.c", name=f"abi-{which}", flags=flags, include=include)
    assert run(program, empty_bundle, STAND_IN) == "0 faults\n"


def test_a_host_compiled_with_the_first_header_generates(library: Library, empty_bundle: Path, tmp_path: Path) -> None:
    include = include_of(tmp_path, FIRST.read_text(encoding="utf-8"))
    host = library.program("host.c", name="host-first", include=include)
    printed = run(host, "isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "jobs=4", "rounds=2")
    assert printed.count("\njob 0 0") == 8
