"""The public API: `__all__`, what it loads, what the documents use of it, and what a type checker sees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import sdruntime

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]


def of_the_type_checker() -> set[str]:
    tree = ast.parse(Path(sdruntime.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_every_public_name_can_be_imported_and_no_other_is_offered() -> None:
    assert sdruntime.__all__ == sorted(of_the_type_checker())
    for name in sdruntime.__all__:
        assert getattr(sdruntime, name).__name__ == name
    assert set(sdruntime.__all__) <= set(dir(sdruntime))
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = sdruntime.Pipelin  # type: ignore[attr-defined]


def test_every_error_is_public() -> None:
    from sdruntime import errors

    kinds = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.SdruntimeError)}
    assert kinds - set(sdruntime.__all__) == {"BufferTooSmall"}  # of the C library alone


def test_the_package_alone_loads_the_standard_library_alone() -> None:
    code = "import sys; before = set(sys.modules); import sdruntime; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in ast.literal_eval(done.stdout)}
    assert loaded - set(sys.stdlib_module_names) == {"sdruntime"}


def test_documents_import_public_names() -> None:
    used = set()
    for path in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "sdruntime":
                    assert node.module == "sdruntime", f"{path.name}: from {node.module}"
                    used |= {alias.name for alias in node.names}
    assert {"Pipeline", "Request", "Batcher", "Bundle", "EngineOptions"} <= used <= set(sdruntime.__all__)


def test_docs_api_has_a_section_of_each_class() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in sdruntime.__all__ if f"`{name}`" not in text and f"## {name}" not in text] == []
