"""A mask, and the settings that have no field of their own: the image equals Python's byte for byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capi.building import HERE, ROOT, Library, run

from sdruntime import Pipeline, Request

PROMPT, SEED = "a red cat", 7
MASKED: dict[str, Any] = {"mask_blur": 1.5, "mask_fill": "zeros", "overlay": True, "image_guidance": 2}
PADDED: dict[str, Any] = {"mask_padding": 4, "emphasis": "ignore", "prompt_syntax": "a1111"}
OWN: dict[str, Any] = {"steps": 2, "guidance": [3.0, 1.0]}
LARGER: dict[str, Any] = {"hires": 2, "hires_steps": 4, "hires_resize": "lanczos", "prompt_syntax": "a1111"}

PROGRAM = """
import ctypes, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from capi.binding import Failed, Library

lib = Library(sys.argv[2])
image, mask = np.load(sys.argv[4])["image"], np.load(sys.argv[4])["mask"]
wide = np.zeros((*mask.shape[:1], mask.shape[1] + 5), np.uint8)
wide[:, :-5] = mask
runtime = lib.open(bundle=sys.argv[3], threads=1, isolation=int(sys.argv[6]))
part = {"image": image.ctypes.data, "image_width": image.shape[1], "image_height": image.shape[0], "strength": 0.8}
part |= {"mask": wide.ctypes.data, "mask_stride": wide.strides[0]}
common = {"prompt": "a red cat", "seed": 7, "steps": 3, "sampler": "ddim"}
images = {}
for name, settings in json.loads(sys.argv[7]).items():
    own = {"model_defaults": 1} if name == "own" else {}
    job = lib.submit(runtime, **common, **own, **({} if name in ("larger", "own") else part), settings=json.dumps(settings))
    lib.wait(job)
    result = lib.result(job)
    images[name] = np.frombuffer(lib.rgb(job), np.uint8).reshape(result.height, result.width, 3)
np.savez(sys.argv[5], **images)
for wrong in ({"settings": '{"steps": 3}'}, {"settings": "[]"}, {"mask": wide.ctypes.data}, part | {"mask_stride": 3}):
    try:
        lib.submit(runtime, **common, **wrong)
    except Failed as failed:
        print(failed.code, failed)
job = lib.submit(runtime, **common, settings='{"mask_blurr": 3, "hires": 99}')
try:
    lib.wait(job)
except Failed as failed:
    print(failed.code, failed)
lib.close(runtime)
"""


@pytest.mark.parametrize("isolation", [0, 1])
def test_a_mask_and_further_settings(library: Library, bundle: Path, tmp_path: Path, isolation: int) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (64, 128, 3), dtype=np.uint8)
    mask = np.zeros((64, 128), np.uint8)
    mask[10:40, 20:60] = 255
    np.savez(tmp_path / "given.npz", image=image, mask=mask)
    common: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "steps": 3, "sampler": "ddim"}
    all_settings = {"masked": MASKED, "padded": PADDED, "larger": LARGER, "own": OWN}
    shared = library.folder / "libsdruntime.so"
    printed = run(
        *(sys.executable, "-c", PROGRAM, HERE.parent, shared, bundle, tmp_path / "given.npz", tmp_path / "found.npz"),
        *(str(isolation), json.dumps(all_settings)),
        env={"SDRUNTIME_PYTHON": sys.prefix if isolation else "", "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"},
    )
    found = np.load(tmp_path / "found.npz")
    with Pipeline.open(bundle) as pipe:
        for name, settings in all_settings.items():
            part = {} if name in ("larger", "own") else {"image": image, "mask": mask, "strength": 0.8}
            [expected] = pipe([Request(**{**common, **part, **settings})]).pixels
            np.testing.assert_array_equal(found[name], expected)
    assert found["padded"].shape == image.shape
    assert found["larger"].shape == tuple(2 * side for side in pipe.model.default_size) + (3,)
    lines = printed.splitlines()
    assert lines[:4] == [
        '2 settings: "steps" is not accepted here: set its field in sdr_job_params',
        "2 settings: expected a JSON object",
        "2 mask: it marks a part of an image: set image too",
        "2 mask_stride 3 is less than the 128 bytes of a row",
    ]
    assert "mask_blurr" in lines[4]
