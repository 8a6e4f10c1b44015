"""The interpreter inside a host: how it is found, which versions work, and hosts with an interpreter of their own or fork()."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from capi.building import HERE, INCLUDE, ROOT, Library, compiler, run
from capi.conftest import FIXTURE
from environments import ENVIRONMENTS, Environment, python_of

from sdruntime.pipeline.pipeline import Pipeline

NO_PYTHON, NO_RUNTIME, FORKED = 17, 18, 11


@pytest.fixture
def host(library: Library) -> Path:
    return library.program("host.c")


def expected(bundle: Path, seed: int = 7) -> bytes:
    """Return the RGB8 rows that the Python pipeline generates."""
    with Pipeline.open(bundle) as pipe:
        return pipe("a red cat", seed=seed, steps=3, sampler="ddim").pixels[0].tobytes()


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_the_image_equals_pythons_byte_for_byte(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    run(host, f"isolation={isolation}", f"bundle={bundle}", f"out={tmp_path / 'rows'}")
    assert (tmp_path / "rows").read_bytes() == expected(bundle)


OWN = Environment(python="own", pins=())


@pytest.fixture(scope="module", params=[OWN, *ENVIRONMENTS], ids=lambda environment: environment.name)
def environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, str], bytes]:
    """Return, for one Python: its virtual environment, a bundle with its engines, its versions, and its own RGB8 rows."""
    python = Path(sys.executable) if request.param == OWN else python_of(request.param)
    folder = tmp_path_factory.mktemp("environment")
    variables = {"PYTHONPATH": str(ROOT / "runtime") if request.param == OWN else ""}
    bundle = Path(shutil.copytree(FIXTURE, folder / "bundle"))
    run(python, "-m", "sdruntime", "build", bundle, "--backend", "onnxruntime", env=variables)
    program = f"""
import json, platform
import numpy, onnxruntime
from sdruntime.pipeline.pipeline import Pipeline
with Pipeline.open({str(bundle)!r}) as pipe:
    rows = pipe("a red cat", seed=7, steps=3, sampler="ddim").pixels[0].tobytes()
open({str(folder / "rows")!r}, "wb").write(rows)
print(json.dumps({{"python": platform.python_version(), "numpy": numpy.__version__, "onnxruntime": onnxruntime.__version__}}))
"""
    versions = json.loads(run(python, "-c", program, env=variables))
    return python.parents[1], bundle, versions, (folder / "rows").read_bytes()


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_one_binary_works_with_every_python(
    host: Path, environment: tuple[Path, Path, dict[str, str], bytes], tmp_path: Path, isolation: str
) -> None:
    venv, bundle, versions, rows = environment
    variables = {"SDRUNTIME_PYTHON": "", "PYTHONPATH": str(ROOT / "runtime") if str(venv) == sys.prefix else ""}
    words = (f"isolation={isolation}", f"bundle={bundle}", f"python={venv}", f"out={tmp_path / 'rows'}")
    printed = run(host, *words, env=variables)
    [described] = re.findall(r"^describe (.*)$", printed, flags=re.MULTILINE)
    assert json.loads(described)["versions"].items() >= versions.items(), versions
    assert len(rows) == 64 * 64 * 3
    assert (tmp_path / "rows").read_bytes() == rows


def test_a_plugin_that_is_loaded_with_rtld_local(library: Library, host: Path, bundle: Path, tmp_path: Path) -> None:
    plugin = library.folder / "plugin.so"
    link = (f"-L{library.folder}", "-lsdruntime", f"-Wl,-rpath,{library.folder}")
    run(compiler("cc"), "-D_GNU_SOURCE", "-shared", "-fPIC", f"-I{INCLUDE}", HERE / "host.c", "-o", plugin, *link)
    outer = library.folder / "outer"
    run(compiler("cc"), HERE / "plugin.c", "-o", outer, "-ldl")  # not linked with the library
    run(outer, plugin, "isolation=in-process", f"bundle={bundle}", f"out={tmp_path / 'rows'}")
    assert (tmp_path / "rows").read_bytes() == expected(bundle)


@pytest.mark.parametrize("isolation", [0, 1], ids=["in-process", "process"])
@pytest.mark.parametrize("gil", [False, True], ids=["without the GIL", "with the GIL"])
def test_a_host_that_is_written_in_python(library: Library, bundle: Path, gil: bool, isolation: int) -> None:
    """Its callbacks are Python functions, which need the GIL while a call waits."""
    program = f"""
import ctypes
from capi.binding import PROGRESS, Library
lib = Library({str(library.path)!r}, gil={gil})
steps = []
callback = PROGRESS(lambda user, job, progress: steps.append(job) or 0)
runtime = lib.open(bundle={str(bundle)!r}, threads=1, isolation={isolation})
settings = dict(prompt="a red cat", seed=7, steps=3, sampler="ddim", png=1, progress=ctypes.cast(callback, ctypes.c_void_p))
job = lib.submit(runtime, **settings)
lib.wait(job)
assert steps == [job.value] * 3
rows = lib.rgb(job)
assert lib.png(job)[:4] == b"\\x89PNG"
lib.close(runtime)
again = lib.open(bundle={str(bundle)!r}, threads=1, isolation={isolation})
lib.close(again)
import sdruntime.pipeline.pipeline  # this interpreter's own
with sdruntime.pipeline.pipeline.Pipeline.open({str(bundle)!r}) as pipe:
    assert rows == pipe("a red cat", seed=7, steps=3, sampler="ddim").pixels[0].tobytes()
print("same")
"""
    path = f"{ROOT}:{ROOT / 'runtime'}:{ROOT / 'tests'}"
    worker = sys.prefix if isolation else ""  # in process it is the host's own
    assert "same" in run(sys.executable, "-c", program, env={"PYTHONPATH": path, "SDRUNTIME_PYTHON": worker})


def status(printed: str, what: str) -> tuple[int, int]:
    """Return the code and reason of the first status of one call."""
    [first] = re.findall(rf"^{what} (\d+) (\d+)", printed, flags=re.MULTILINE)[:1]
    return int(first[0]), int(first[1])


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_without_a_python_the_places_searched_are_listed(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    for name in ("libpython3.so", *(f"libpython3.{minor}.so.1.0" for minor in range(8, 30))):
        (tmp_path / name).write_text("not a library")
    env = {"SDRUNTIME_PYTHON": "", "PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", env=env, code=1)
    assert status(printed, "open") == (3, NO_PYTHON)
    unset = [f"{name}: not set" for name in ("sdr_open_params.python", "SDRUNTIME_PYTHON", "VIRTUAL_ENV")]
    for place in (*unset, "beside this library", "PATH: no python3"):
        assert place in printed
    assert ("libpython3.12.so.1.0" in printed) == (isolation == "in-process")
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", env={"SDRUNTIME_PYTHON": "/nonexistent"}, code=1)
    assert status(printed, "open") == (3, NO_PYTHON)
    assert "SDRUNTIME_PYTHON: /nonexistent" in printed


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_without_the_runtime_the_folders_searched_are_listed(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", f"python={bare}", env={"PYTHONPATH": ""}, code=1)
    assert status(printed, "open") == (3, NO_RUNTIME)
    assert "No module named 'numpy'" in printed
    assert str(bare / "lib") in printed
    assert "as sdr_open_params.python or SDRUNTIME_PYTHON" in printed


def test_another_python_than_the_running_one_is_rejected(host: Path, library: Library, bundle: Path, tmp_path: Path) -> None:
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
    assert "Python 3.99 was requested" in printed


def test_a_child_of_fork_fails_in_process(host: Path, bundle: Path) -> None:
    printed = run(host, "isolation=in-process", f"bundle={bundle}", "fork=1", code=None)
    assert status(printed, "child-describe") == (2, FORKED)
    assert re.findall(r"^open (\d+) (\d+)", printed, flags=re.MULTILINE) == [("0", "0"), ("2", str(FORKED))]
    assert "child ended with 0" in printed
    assert status(printed, "job") == (0, 0)  # the parent continues


def test_with_a_worker_a_child_of_fork_opens_its_own_runtime(host: Path, bundle: Path) -> None:
    printed = run(host, "isolation=process", f"bundle={bundle}", "fork=1")
    assert status(printed, "child-describe") == (2, FORKED)
    assert re.findall(r"^open (\d+) (\d+)", printed, flags=re.MULTILINE) == [("0", "0"), ("0", "0")]
    assert re.findall(r"^job (\d+)", printed, flags=re.MULTILINE) == ["0", "0"]
    assert "children 0" in printed


def test_the_library_loads_without_python(library: Library) -> None:
    needed = run("readelf", "-d", "--dyn-syms", library.path)
    assert "libpython" not in needed
    assert not re.findall(r"\bUND\s+_?Py\w+", needed)
