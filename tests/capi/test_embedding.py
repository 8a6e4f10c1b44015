"""The interpreter inside a host: which one, how it is found, and what hosts do around it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from capi.building import HERE, INCLUDE, ROOT, Library, compiler, run

from sdruntime.pipeline import Pipeline

NO_PYTHON, NO_RUNTIME, FORKED = 17, 18, 11


@pytest.fixture
def host(library: Library) -> Path:
    return library.program("host.c")


def expected(bundle: Path, seed: int = 7) -> bytes:
    with Pipeline.open(bundle) as pipe:
        return pipe("a red cat", seed=seed, steps=3, sampler="ddim").images[0].tobytes()


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_the_picture_is_that_of_python_to_the_byte(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    run(host, f"isolation={isolation}", f"bundle={bundle}", f"out={tmp_path / 'rows'}")
    assert (tmp_path / "rows").read_bytes() == expected(bundle)


def environments() -> list[Path]:
    """Those that other tests have made beside the main one, each with NumPy, ONNX Runtime and another Python."""
    return sorted(
        path
        for path in ROOT.glob(".venv*")
        if (path / "lib").is_dir() and next(path.glob("lib/*/site-packages/onnxruntime"), None)
    )


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_one_binary_serves_every_python(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    found = [Path(sys.prefix), *environments()]
    versions = set()
    for each in found:
        config = (each / "pyvenv.cfg").read_text() if (each / "pyvenv.cfg").exists() else "version = 3.0"
        versions.add(re.findall(r"version(?:_info)? = (3\.\d+)", config)[0])
        out = tmp_path / "rows"
        env = {"SDRUNTIME_PYTHON": ""}
        run(
            host,
            f"isolation={isolation}",
            f"bundle={bundle}",
            "backend=onnxruntime",
            f"python={each}",
            f"out={out}",
            env=env,
            code=None,
        )
        if "cpu-fp16" and out.exists():
            assert len(out.read_bytes()) == len(expected(bundle))
    assert versions


def test_a_plugin_that_was_loaded_locally(library: Library, host: Path, bundle: Path, tmp_path: Path) -> None:
    plugin = library.folder / "plugin.so"
    link = (f"-L{library.folder}", "-lsdruntime", f"-Wl,-rpath,{library.folder}")
    run(compiler("cc"), "-D_GNU_SOURCE", "-shared", "-fPIC", f"-I{INCLUDE}", HERE / "host.c", "-o", plugin, *link)
    outer = library.folder / "outer"
    run(compiler("cc"), HERE / "plugin.c", "-o", outer, "-ldl")  # not linked with the library
    run(outer, plugin, "isolation=in-process", f"bundle={bundle}", f"out={tmp_path / 'rows'}")
    assert (tmp_path / "rows").read_bytes() == expected(bundle)


@pytest.mark.parametrize("gil", [False, True], ids=["without the GIL", "with the GIL"])
def test_a_host_that_is_python_already(library: Library, bundle: Path, gil: bool) -> None:
    program = f"""
import sys
from capi.binding import Library
lib = Library({str(library.path)!r}, gil={gil})
runtime = lib.open(bundle={str(bundle)!r}, threads=1)
job = lib.submit(runtime, prompt="a red cat", seed=7, steps=3, sampler="ddim", png=1)
lib.wait(job)
rows = lib.rgb(job)
assert lib.png(job)[:4] == b"\\x89PNG"
lib.close(runtime)
again = lib.open(bundle={str(bundle)!r}, threads=1)
lib.close(again)
import sdruntime.pipeline  # this interpreter's own
with sdruntime.pipeline.Pipeline.open({str(bundle)!r}) as pipe:
    assert rows == pipe("a red cat", seed=7, steps=3, sampler="ddim").images[0].tobytes()
print("same")
"""
    path = f"{ROOT}:{ROOT / 'runtime'}:{ROOT / 'tests'}"
    assert "same" in run(sys.executable, "-c", program, env={"PYTHONPATH": path, "SDRUNTIME_PYTHON": ""})


def status(printed: str, what: str) -> tuple[int, int]:
    [first] = re.findall(rf"^{what} (\d+) (\d+)", printed, flags=re.MULTILINE)[:1]
    return int(first[0]), int(first[1])


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_without_a_python_all_that_was_searched_is_told(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    env = {"SDRUNTIME_PYTHON": "", "PATH": str(tmp_path), "LD_LIBRARY_PATH": ""}
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", env=env, code=None)
    if "open 0" in printed:
        pytest.skip("the loader finds a libpython without help on this machine")
    assert status(printed, "open") == (3, NO_PYTHON)
    for place in (
        "sdr_open_params.python: not set",
        "SDRUNTIME_PYTHON: not set",
        "VIRTUAL_ENV: not set",
        "beside this library",
        "PATH: no python3",
    ):
        assert place in printed
    assert ("libpython3.12.so.1.0" in printed) == (isolation == "in-process")
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", env={"SDRUNTIME_PYTHON": "/nonexistent"}, code=1)
    assert status(printed, "open") == (3, NO_PYTHON)
    assert "SDRUNTIME_PYTHON: /nonexistent" in printed


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_without_the_runtime_the_folders_that_were_searched_are_told(
    host: Path, bundle: Path, tmp_path: Path, isolation: str
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    printed = run(
        host, f"isolation={isolation}", f"bundle={bundle}", f"python={tmp_path / 'bare'}", env={"PYTHONPATH": ""}, code=1
    )
    assert status(printed, "open") == (3, NO_RUNTIME)
    assert "No module named 'numpy'" in printed
    assert str(tmp_path / "bare" / "lib") in printed


def test_another_python_than_the_one_that_runs_is_refused(host: Path, library: Library, bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python3").symlink_to(sys.executable)
    (other / "pyvenv.cfg").write_text("home = /nonexistent/bin\nversion = 3.99.1\n")
    program = f"""
from capi.binding import Failed, Library
lib = Library({str(library.path)!r})
try:
    lib.open(bundle={str(bundle)!r}, python={str(other)!r})
except Failed as failed:
    print(failed.code, failed.reason, failed)
"""
    printed = run(sys.executable, "-c", program, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}:{ROOT / 'tests'}"})
    assert printed.startswith(f"3 {NO_PYTHON} ")
    assert "Python 3.99 was asked for" in printed


def test_a_child_of_fork_is_told_in_process(host: Path, bundle: Path) -> None:
    printed = run(host, "isolation=in-process", f"bundle={bundle}", "fork=1", code=None)
    assert status(printed, "child-describe") == (2, FORKED)
    assert re.findall(r"^open (\d+) (\d+)", printed, flags=re.MULTILINE) == [("0", "0"), ("2", str(FORKED))]
    assert "child ended with 0" in printed
    assert status(printed, "job") == (0, 0)  # the parent goes on


def test_a_host_that_forks_has_a_worker_in_both(host: Path, bundle: Path) -> None:
    printed = run(host, "isolation=process", f"bundle={bundle}", "fork=1")
    assert status(printed, "child-describe") == (2, FORKED)
    assert re.findall(r"^open (\d+) (\d+)", printed, flags=re.MULTILINE) == [("0", "0"), ("0", "0")]
    assert re.findall(r"^job (\d+)", printed, flags=re.MULTILINE) == ["0", "0"]
    assert "children 0" in printed


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_nothing_python_is_needed_to_load_the_library(library: Library, isolation: str) -> None:
    needed = run("readelf", "-d", "--dyn-syms", library.path)
    assert "libpython" not in needed
    assert not re.findall(r"\bUND\s+_?Py\w+", needed)
