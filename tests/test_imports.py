"""What is loaded when: sdruntime brings numpy and the standard library, and either --help brings nothing heavy."""

from __future__ import annotations

import subprocess
import sys

from places import ROOT

HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "polygraphy",
    "huggingface_hub",
    "rich",
    "PIL",
}
LIST_MODULES = "import sys; print('\\n'.join(sorted({name.split('.')[0] for name in sys.modules})))"


def loaded(code: str) -> set[str]:
    """The top-level modules that `code` loads, beyond what a bare interpreter of this environment has loaded at its start."""
    bare, full = (
        subprocess.run([sys.executable, "-c", part], capture_output=True, text=True, check=True)
        .stdout.split("\n--\n")[-1]
        .split()
        for part in (LIST_MODULES, f"{code}; print('\\n--'); {LIST_MODULES}")
    )
    return set(full) - set(bare)


def third_party(modules: set[str]) -> set[str]:
    return {name for name in modules if name not in sys.stdlib_module_names and not name.startswith("__")}


def test_sdruntime_loads_numpy_and_the_standard_library_only() -> None:
    assert third_party(loaded("import sdruntime.pipeline.pipeline, sdruntime.engines.building")) == {
        "numpy",
        "sdruntime",
    }


def test_sdruntime_help_loads_no_engine_library() -> None:
    code = "import sdruntime.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass"
    assert third_party(loaded(f"exec({code!r})")) <= {"numpy", "sdruntime"}


def test_sdexport_help_loads_click_and_nothing_heavy() -> None:
    code = "from sdexport.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    found = third_party(loaded(f"exec({code!r})"))
    assert not found & HEAVY
    assert found <= {"click", "sdexport", "sdruntime", "numpy", "typing_extensions", "_typeshed"}


def test_a_heavy_import_would_be_found() -> None:
    assert "onnxruntime" in third_party(loaded("import onnxruntime"))


def test_sdruntime_never_names_polygraphy() -> None:
    """Its loader lets an engine run code."""
    sources = (ROOT / "runtime" / "sdruntime").rglob("*.py")
    assert [path for path in sources if "polygraphy" in path.read_text(encoding="utf-8").lower()] == []
