"""The parts of the documentation that follow from the code, between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

python docs/generate.py           rewrite them
python docs/generate.py --check   exit with 1 if one is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sdruntime.serving.triton_server.tensors import INPUTS, OUTPUTS, TensorRow
from sdruntime.verification.report import limit_name
from sdruntime.verification.tolerance import TOLERANCES

ROOT = Path(__file__).resolve().parent.parent


def limits() -> str:
    """Return the limits of every precision as a table."""
    lines = [
        "| precision | component: PSNR | cosine | largest error, relative | image: PSNR | SSIM |",
        "|---|---|---|---|---|---|",
    ]
    for name, held in TOLERANCES.items():
        relative = f"{held.relative:.0e}".replace("e-0", "e-") if held.relative < 1 else "–"
        lines.append(
            f"| {limit_name(name)} | {held.psnr:g} dB | {held.cosine:g} | {relative} | {held.picture_psnr:g} dB | {held.ssim:g} |"
        )
    return "\n".join(lines)


_MODELS = {
    "shapes": "the trained example",
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sd2_v": "Stable Diffusion 2.x, v-prediction",
    "sdxl": "Stable Diffusion XL",
}
_TASKS = {
    "inpainting": "inpainting, nine channels",
    "": "inpainting, four channels",
    "instruct_pix2pix": "InstructPix2Pix",
    "depth": "image to image, with depth",
    "upscaling": "upscaling",
    "refining": "refiner, image to image",
}


def models() -> str:
    """Return which images are compared with diffusers', from the parameters of the tests, as a table."""
    sys.path.insert(0, str(ROOT / "tests"))
    from integration import test_fidelity, test_fidelity_configs, test_tasks, test_tensorrt_rtx

    # the trained example has a test of its own there
    built = {"shapes", *(str(name) for name, _, _ in (*test_tensorrt_rtx.FULL, *test_tensorrt_rtx.FAST))}

    def engines(kind: str, task: str = "") -> str:
        if task:
            return "UNet: fp16" if (task, kind) in test_tensorrt_rtx.TASKS else "–"
        names = {"fp32": kind, "fp16": f"{kind}_fp16", "bf16": f"{kind}_bf16"}
        return ", ".join(precision for precision, name in names.items() if name in built) or "–"

    rows = []
    every, few = len(test_fidelity.SAMPLERS), len(test_fidelity.FROM_IMAGE)
    for kind in test_fidelity.CHECKPOINTS:
        xl = "XL" if kind == "sdxl" else ""
        rows.append((kind, "text to image", f"StableDiffusion{xl}Pipeline", every, every, engines(kind)))
        most = every - len(test_fidelity.UNLIKE)
        rows.append((kind, "image to image", f"StableDiffusion{xl}Img2ImgPipeline", few, most, engines(kind)))
    for task, kind, pipeline in (*test_tasks.ROWS, *test_tasks.MORE_ROWS):
        quick = len(test_tasks.SHORT) if (task, kind, pipeline) in test_tasks.ROWS else 0
        rows.append((kind, _TASKS[task], pipeline, quick, len(test_tasks.SAMPLERS), engines(kind, task)))
    task, kind, pipeline = test_tasks.DISTILLED
    rows.append((kind, "text to image, latent consistency", pipeline, 1, 1, engines(kind, task)))
    lines = [
        "| model | task | diffusers' pipeline | `make test` | `make test-full` | TensorRT-RTX |",
        "|---|---|---|---|---|---|",
    ]
    for name, others in test_fidelity_configs.MODELS.values():
        rows.append((name, "text to image", "StableDiffusionXLPipeline", 0, 1 + len(others), "–"))
    lines += [f"| {_MODELS.get(kind, kind)} | {' | '.join(map(str, row))} |" for kind, *row in rows]
    return "\n".join(lines)


def tensors(rows: Sequence[TensorRow]) -> str:
    """Return tensors of the Triton model as a table."""
    lines = ["| tensor | type | shape | |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.dtype} | {'×'.join(map(str, row.dims)).replace('-1', 'n')} | {row.what} |" for row in rows]
    return "\n".join(lines)


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "docs/verification.md": {"limits": limits},
    "docs/models.md": {"models": models},
    "docs/triton.md": {"triton-inputs": lambda: tensors(INPUTS), "triton-outputs": lambda: tensors(OUTPUTS)},
}


def generated(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with its generated parts replaced. Raises ValueError if the page lacks the markers of a part."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page or end not in page:
            raise ValueError(f"{begin} or {end} is missing")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{part()}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> int:
    check, stale = "--check" in sys.argv[1:], False
    for path, parts in PARTS.items():
        page = (ROOT / path).read_text(encoding="utf-8")
        new = generated(page, parts)
        if new != page and check:
            stale = True
            print(f"{path} is out of date: run python docs/generate.py", file=sys.stderr)
        elif new != page:
            (ROOT / path).write_text(new, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
