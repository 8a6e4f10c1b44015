"""One arrow: within a package a file imports only from files above it, late imports too, and sdruntime never from sdexport."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import ROOT

LAYERS = {
    "sdruntime": """
        errors
        files
        lending
        document
        limits
        owner
        durable
        record
        process
        cache
        processor
        manifest
        step
        lock
        bundle
        change
        staging
        schedule
        path
        predict
        samplers
        table
        run
        noise
        npz
        guidance
        added
        tokenizer
        prompt
        image
        imagefile
        annotate
        engine
        tolerance
        guard
        plan
        cuda
        shapes
        backends
        choose
        speed
        engines
        build
        request
        metadata
        result
        condition
        latent
        job
        denoise
        loop
        interface
        pipeline
        batcher
        golden
        metrics
        report
        page
        verify
        jetson
        describe
        channel
        message
        service
        capi
        progress
        command
        outputs
        check
        generate
        __main__
    """.split(),
    "sdexport": """
        errors
        toml
        recipe
        stored
        weight_files
        weights
        unpickle
        hub
        card
        tree
        configs
        opening
        bounds
        tokenizer
        checkpoint
        components
        modules
        original
        to_onnx
        precision
        measure
        rounding
        audit
        probe
        cache
        job
        process
        golden
        bisect
        verify
        step
        build
        interpreter
        engines
        describe
        timing
        reference
        drawers
        contestant
        subject
        bench
        chart
        progress
        command
        check
        cli
        __main__
    """.split(),
}
FOLDERS = {"sdruntime": ROOT / "runtime" / "sdruntime", "sdexport": ROOT / "sdexport"}


def layer(package: str, path: Path) -> str:
    return path.relative_to(FOLDERS[package]).with_suffix("").parts[0]


def imported(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of one of our packages."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = node.module == package and (FOLDERS[package] / f"{alias.name}.py").exists()
                found.append((node.lineno, whole if is_module or node.module == package else str(node.module)))
    return [(line, module) for line, module in found if module.split(".")[0] in LAYERS]


def faults(package: str, path: Path) -> list[str]:
    here, order = layer(package, path), LAYERS[package]
    found = []
    for line, module in imported(ast.parse(path.read_text(encoding="utf-8")), package):
        other, *rest = module.split(".")
        if other != package:
            if package == "sdruntime":
                found.append(f"{path.name}:{line}: sdruntime imports {module}")
        elif rest and rest[0] in order and rest[0] != here and order.index(rest[0]) > order.index(here):
            found.append(f"{path.name}:{line}: {here} imports {rest[0]}, which is below it")
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_files_import_only_from_above(package: str) -> None:
    paths = [path for path in FOLDERS[package].rglob("*.py") if path.name != "__init__.py" or path.parent != FOLDERS[package]]
    unplaced = {layer(package, path) for path in paths} - set(LAYERS[package])
    assert not unplaced, f"no place in the list of layers: {sorted(unplaced)}"
    assert [fault for path in sorted(paths) for fault in faults(package, path)] == []


def test_every_layer_exists() -> None:
    for package, order in LAYERS.items():
        missing = [
            name for name in order if not ((FOLDERS[package] / name).is_dir() or (FOLDERS[package] / f"{name}.py").exists())
        ]
        assert missing == []


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "errors.py"
    planted.write_text("def late():\n    from sdruntime.pipeline.pipeline import Pipeline\n    import sdexport.build.export\n")
    monkeypatch.setitem(FOLDERS, "sdruntime", tmp_path)
    assert len(faults("sdruntime", planted)) == 2


def test_no_file_passes_400_lines() -> None:
    paths = [
        path for folder in ("sdexport", "runtime", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(paths) > 30
    assert [
        f"{path.name}: {lines}" for path in paths if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    ] == []
