"""Roles: one table says what a component is, and nothing else compares components' names."""

from __future__ import annotations

import ast

import pytest
from places import ROOT

from sdruntime.bundle.roles import ROLES, of_kind, role

SOURCES = [path for top in ("runtime/sdruntime", "sdexport") for path in sorted((ROOT / top).rglob("*.py"))]
# where the parts of a checkpoint are named, not a bundle's components
OF_CHECKPOINTS = ("sdexport/checkpoint/", "sdexport/families/", "sdexport/merging/", "sdexport/verification/original.py")


def compared(tree: ast.AST) -> list[int]:
    """Lines that compare something with the name of a component, or ask how it begins."""
    lines = []
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        names = set(ROLES) - {"step"}
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            parts, names = node.args, {name[:end] for name in names for end in range(3, len(name) + 1)}
        flat = [each for part in parts for each in (part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part])]
        values = [each.value for each in flat if isinstance(each, ast.Constant)]
        if names.intersection(value for value in values if isinstance(value, str)):
            lines.append(node.lineno)  # type: ignore[attr-defined]
    return lines


def test_nothing_compares_the_names_of_components() -> None:
    found = {}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if not name.startswith(OF_CHECKPOINTS) and (lines := compared(ast.parse(path.read_text(encoding="utf-8")))):
            found[name] = lines
    assert found == {}


def test_such_a_comparison_would_be_found() -> None:
    for code in ('name == "unet"', 'name not in ("vae_encoder", STEP)', 'name.startswith("text_encoder")'):
        assert compared(ast.parse(code)) == [1]


@pytest.mark.parametrize(("name", "kind"), [(name, each.kind) for name, each in ROLES.items()])
def test_components_are_found_by_their_kind(name: str, kind: str) -> None:
    assert name in of_kind([*ROLES, "other"], kind)  # type: ignore[arg-type]
    assert role(name).kind == kind
