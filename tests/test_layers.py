"""One arrow: an entry of a folder imports only from those before it in the folder's row, and sdruntime never from sdexport."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from sdruntime.backends.registry import BACKENDS

ORDER = {
    "sdruntime": "errors arrays system sampling bundle adapters backends engines pipeline serving verification cli __main__",
    "sdruntime.system": "events memory document files jetson nvtx process processor sizes cuda owner durable cache",
    "sdruntime.sampling": (
        "noise_schedule schedules grids prediction samplers own_sigmas table compile executor noise guidance kept control job"
    ),
    "sdruntime.sampling.schedules": "ratios published",
    "sdruntime.sampling.samplers": ("keys protocol sampler integrals ddim pndm kdiffusion dpm unipc deis sa consistency forms"),
    "sdruntime.sampling.noise": "cpu cuda image",
    "sdruntime.sampling.samplers.kdiffusion": "slopes dpm_ancestral restart",
    "sdruntime.sampling.samplers.forms": "flow edm",
    "sdruntime.bundle": (
        "roles limits audit records dimensions model manifest tasks interface sampler_step lending bundle changes"
    ),
    "sdruntime.bundle.changes": "lock change staging",
    "sdruntime.adapters": "safetensors kinds names blocks file lora embedding base sets describe",
    "sdruntime.backends": "base onnx_file fake ort ov trt registry",
    "sdruntime.backends.base": "building weights engine feeds subpixel session backend",
    "sdruntime.backends.onnx_file": "wire external graph inputs initializers stored",
    "sdruntime.backends.fake": "build engine backend",
    "sdruntime.backends.ort": "attention weights subpixel replacing session build engine backend",
    "sdruntime.backends.ov": "subpixel inputs constants replacing build engine backend",
    "sdruntime.backends.trt": "library inspection binding build worker replacing engine frame loop backend",
    "sdruntime.engines": "shapes finite adapted memory choose building speed pool",
    "sdruntime.pipeline": ("images text vae requests control denoise loras texts tasks metadata result jobs stream pipeline"),
    "sdruntime.pipeline.requests": "keywords ranges control image_prompt request unused tags",
    "sdruntime.pipeline.metadata": "write read",
    "sdruntime.pipeline.tasks": (
        "canvas start inpainting pix2pix depth upscaling image_prompt t2i_adapter choose passes sizes tables micro_conditions"
    ),
    "sdruntime.pipeline.images": "pixels blur compose resampling png imagefile maps depth",
    "sdruntime.pipeline.vae": "latents preview resize tiles tile_size",
    "sdruntime.pipeline.text": "added_tokens tokenizer prompt segments editing emphasis chunks wording embeddings conditioning",
    "sdruntime.serving": "batcher message blob channel describe service capi worker metrics job room triton_server http",
    "sdruntime.serving.http": "problem settings guard images submission jobs openai a1111 page operations app protocol server",
    "sdruntime.serving.http.page": "capabilities files",
    "sdruntime.serving.triton_server": "tensors repository metrics model",
    "sdruntime.verification": "tolerance npz metrics inputs golden report html verify build",
    "sdruntime.cli": "terminal progress terminal_images previews describe outputs commands arguments parser",
    "sdruntime.cli.commands": "build capi inspect lora png_info serve triton verify generate sampling",
    "sdexport": "errors checkpoint families precision trace verification build merging recipes bench cli __main__",
    "sdexport.checkpoint": "card defaults pipelines configs opening tree tokenizer weights source hub folder original "
    "overrides checkpoint",
    "sdexport.checkpoint.configs": "keys tables controlnet t2i_adapter misfits",
    "sdexport.checkpoint.weights": "bounds safetensors files names loras torch_file ip_adapter embeddings writing",
    "sdexport.checkpoint.weights.torch_file": "inert tensors archive sequence file",
    "sdexport.checkpoint.original": "expected naming standard unet vae diffusers controlnet text layout tokenizer file",
    "sdexport.families": "components modules",
    "sdexport.precision": "numbers rewrite activations probe rounding audit describe",
    "sdexport.trace": (
        "versions data_file sampler_step residuals features image_prompt optional_inputs cache to_onnx component process"
    ),
    "sdexport.verification": "layers walk bisect original preview image_prompt golden verify",
    "sdexport.build": "events files provenance export",
    "sdexport.merging": "methods weights merge",
    "sdexport.recipes": "recipe interpreter run",
    "sdexport.bench": "timing subject diffusers runners contestant bench chart",
    "sdexport.cli": "following progress reporting bench build merge engines inspect verify main",
}
ROOTS = {"sdruntime": ROOT / "runtime", "sdexport": ROOT}
MOST_ENTRIES = 15
LONG, TOO_LONG = 400, 600  # lines: where a file probably holds two ideas, and where it does


def modules(package: str, root: Path) -> dict[str, Path]:
    """The files of a package by dotted name; a package's own `__init__` by its name with `.__init__`."""
    paths = sorted((root / package).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def imported(path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import of one of our packages, late ones too; a package means its `__init__`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if {name, f"{name}.__init__"} & known else str(node.module) for name in whole]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ROOTS:
                yield node.lineno, f"{name}.__init__" if f"{name}.__init__" in known else name


def faults(package: str, root: Path) -> list[str]:
    found, own = [], modules(package, root)
    for name, path in own.items():
        for line, other in imported(path, set(own)):
            where = f"{name}:{line}"
            if not other.startswith(f"{package}."):
                if package == "sdruntime":
                    found.append(f"{where}: sdruntime imports {other}")
                continue
            ours, theirs = name.split("."), other.split(".")
            common = next(k for k, pair in enumerate(zip([*ours, ""], [*theirs, ""], strict=False)) if pair[0] != pair[1])
            order = ORDER[".".join(ours[:common])].split()
            above, below = theirs[common], ours[common]
            if above != "__init__" and below != "__init__" and order.index(above) > order.index(below):
                found.append(f"{where}: {below} imports {above}, which is after it")
    return found


@pytest.mark.parametrize("package", ROOTS)
def test_entries_import_only_from_those_before_them(package: str) -> None:
    assert faults(package, ROOTS[package]) == []


@pytest.mark.parametrize("folder", ORDER)
def test_the_row_of_a_folder_names_its_entries(folder: str) -> None:
    package = folder.split(".")[0]
    place = ROOTS[package].joinpath(*folder.split("."))
    entries = {path.stem for path in place.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert sorted(entries - {"__init__"}) == sorted(ORDER[folder].split())


@pytest.mark.parametrize("package", ROOTS)
def test_every_folder_has_a_row(package: str) -> None:
    assert {name.rpartition(".")[0] for name in modules(package, ROOTS[package])} == {
        folder for folder in ORDER if folder.split(".")[0] == package
    }


OF_ONE_BACKEND = {  # sdexport measures graphs with ONNX Runtime, whatever a bundle's engines are, and takes TensorRT's apart
    "sdexport.__init__": {"ort"},
    "sdexport.verification.layers": {"ort", "trt"},
    "sdexport.verification.walk": {"ort", "trt"},
}


# onnx_file reads the bundle's own models, which every backend starts from
SHARED = tuple(f"sdruntime.backends.{name}" for name in ("base", "onnx_file", "registry"))


def test_nothing_above_the_backends_imports_from_one_of_them() -> None:
    found: dict[str, set[str]] = {}
    known = {name: path for package, root in ROOTS.items() for name, path in modules(package, root).items()}
    for name, path in known.items():
        for _, other in imported(path, set(known)):
            shared = other.startswith(SHARED)
            if other.startswith("sdruntime.backends.") and not shared and not name.startswith("sdruntime.backends."):
                found.setdefault(name, set()).add(other.split(".")[2])
    assert found == OF_ONE_BACKEND


def test_nothing_above_the_backends_compares_a_backend_s_name() -> None:
    found = []
    for package, root in ROOTS.items():
        for name, path in modules(package, root).items():
            if name.startswith("sdruntime.backends."):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
                if any(isinstance(each, ast.Constant) and each.value in list(BACKENDS) for each in operands):
                    found.append(f"{name}:{node.lineno}")
    assert found == []


def test_no_source_folder_is_crowded() -> None:
    tops = (ROOT / "runtime" / "sdruntime", ROOT / "sdexport", ROOT / "runtime" / "capi" / "src")
    folders = [*tops, *(path for top in tops for path in top.rglob("*/") if path.name != "__pycache__")]
    entries = {folder: [path for path in folder.iterdir() if path.name != "__pycache__"] for folder in folders}
    assert {str(folder.relative_to(ROOT)): len(paths) for folder, paths in entries.items() if len(paths) > MOST_ENTRIES} == {}


def test_an_import_upwards_is_found(tmp_path: Path) -> None:
    planted = tmp_path / "sdruntime" / "system"
    planted.mkdir(parents=True)
    for path in (planted / "__init__.py", planted / "cuda.py", planted.parent / "errors.py", planted.parent / "__init__.py"):
        path.write_text("")
    (planted / "sizes.py").write_text("def late():\n    from sdruntime.system.cuda import Cuda\n    import sdexport.build\n")
    (planted.parent / "errors.py").write_text("import sdruntime.system.sizes\n")
    assert [fault.split(": ", 1)[1] for fault in faults("sdruntime", tmp_path)] == [
        "errors imports system, which is after it",
        "sizes imports cuda, which is after it",
        "sdruntime imports sdexport.build",
    ]


@pytest.mark.filterwarnings("default")
def test_files_are_short() -> None:
    paths = [path for top in ("sdexport", "runtime", "tests", "examples", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    assert len(paths) > 30
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    for path, length in lengths.items():
        if TOO_LONG >= length > LONG:
            warnings.warn(f"{path}: {length} lines", UserWarning, stacklevel=1)
    assert {path: length for path, length in lengths.items() if length > TOO_LONG} == {}
