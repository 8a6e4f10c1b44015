"""A mask, a depth map, and the settings that have no field of their own: the image equals Python's byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
from capi.building import HERE, ROOT, Library, run

from sdruntime import Lora, Pipeline, Request
from sdruntime.backends.onnx_file.stored import weight_tensors
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines

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
deep, mask_alone = {"depth": wide.ctypes.data}, {"mask": wide.ctypes.data}
for wrong in (deep, part | deep, {"settings": '{"steps": 3}'}, {"settings": "[]"}, mask_alone, part | {"mask_stride": 3}):
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
    assert lines[:6] == [
        "2 depth: it is that of an image: set image too",
        "2 depth of 0x0: expected width and height from 1 to 16384",
        '2 settings: "steps" is not accepted here: set its field in sdr_job_params',
        "2 settings: expected a JSON object",
        "2 mask: it marks a part of an image: set image too",
        "2 mask_stride 3 is less than the 128 bytes of a row",
    ]
    assert "mask_blurr" in lines[6]


ADAPTED = """
import ctypes, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from capi.binding import Failed, Library

lib = Library(sys.argv[2])
options = {"lora_dir": sys.argv[4]}
runtime = lib.open(bundle=sys.argv[3], threads=1, isolation=int(sys.argv[6]), options=json.dumps(options))
images = []
for text in sys.argv[7:]:
    document = json.loads(text)
    try:
        job = lib.submit(runtime, prompt=document.pop("prompt"), seed=7, steps=2, settings=json.dumps(document))
        lib.wait(job)
    except Failed as failed:
        print(failed.code, failed)
        continue
    result = lib.result(job)
    images.append(np.frombuffer(lib.rgb(job), np.uint8).reshape(result.height, result.width, 3))
np.save(sys.argv[5], images)
lib.close(runtime)
"""


@pytest.mark.parametrize("isolation", [0, 1])
def test_loras(library: Library, bundle: Path, tmp_path: Path, isolation: int) -> None:
    pytest.importorskip("safetensors")
    opened = Bundle.open(bundle)
    shapes = {name: {key: each.shape for key, each in weight_tensors(opened, name).items()} for name in ("text_encoder", "unet")}
    file = loras.write(tmp_path / "style.safetensors", loras.kohya(shapes))
    plain: dict[str, Any] = {"prompt": PROMPT}
    listed = plain | {"loras": [{"path": str(file), "scale": 0.7, "text_scale": 0.2}]}
    tagged: dict[str, Any] = {"prompt": f"{PROMPT}<lora:style:0.2:0.7>", "prompt_syntax": "a1111"}
    wrong = plain | {"loras": [{"path": str(tmp_path / "absent.safetensors")}]}, plain | {"loras": [{"path": "a", "scale": 1e9}]}
    printed = run(
        *(sys.executable, "-c", ADAPTED, HERE.parent, library.folder / "libsdruntime.so", bundle, tmp_path),
        *(tmp_path / "images.npy", str(isolation), *map(json.dumps, (plain, listed, tagged, *wrong, plain))),
        env={"SDRUNTIME_PYTHON": sys.prefix if isolation else "", "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"},
    )
    images = np.load(tmp_path / "images.npy")
    with Pipeline.open(bundle) as pipe:
        common: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "steps": 2}
        expected = [pipe([Request(**common, loras=used)]).pixels[0] for used in ((), (Lora(file, 0.7, 0.2),))]
    without, given, named, again = images
    np.testing.assert_array_equal([without, given, named, again], [expected[0], expected[1], expected[1], expected[0]])
    assert (without != given).any()
    absent, beyond = printed.splitlines()
    assert absent.startswith("2 ")
    assert f"LoRA {tmp_path / 'absent.safetensors'}" in absent
    assert "lora a: scale 1000000000.0: expected a number from -100 to 100" in beyond


DEEP = """
import ctypes, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from capi.binding import Library

lib = Library(sys.argv[2])
given = np.load(sys.argv[4])
image, depth = given["image"], np.zeros((7, 16), np.uint8)
depth[:, :9] = given["depth"]
runtime = lib.open(bundle=sys.argv[3], threads=1, isolation=int(sys.argv[6]))
job = lib.submit(
    runtime,
    prompt="a red cat",
    seed=7,
    steps=3,
    **{"image": image.ctypes.data, "image_width": image.shape[1], "image_height": image.shape[0], "strength": 0.8},
    **{"depth": depth.ctypes.data, "depth_width": 9, "depth_height": 7, "depth_stride": 16},
)
lib.wait(job)
result = lib.result(job)
np.save(sys.argv[5], np.frombuffer(lib.rgb(job), np.uint8).reshape(result.height, result.width, 3))
lib.close(runtime)
"""


CONTROLLED = """
import ctypes, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from capi.binding import Control, Failed, Library

lib = Library(sys.argv[2])
runtime = lib.open(bundle=sys.argv[3], threads=1)
pixels = np.zeros((7, 16, 3), np.uint8)


def submit(count=1, **fields):
    control = Control()
    lib.c.sdr_control_init(ctypes.byref(control), ctypes.c_size_t(ctypes.sizeof(control)))
    for name, value in ({"image": pixels.ctypes.data, "width": 9, "height": 7, "stride": pixels.strides[0]} | fields).items():
        setattr(control, name, value)
    several = (ctypes.c_void_p * count)(*[ctypes.addressof(control)] * count)
    try:
        lib.wait(lib.submit(runtime, prompt="a cat", steps=1, controls=ctypes.addressof(several), control_count=count))
    except Failed as failed:
        print(failed.code, failed)


submit(net=b"edges")
submit(scale=99.0)
submit(scale=float("nan"))
submit(fit=b"stretch")
submit(image=None)
submit(width=0)
submit(stride=26)
submit(reserved=1)
submit(struct_size=8)
submit(17)
lib.close(runtime)
"""


def test_images_for_controlnets(library: Library, bundle: Path) -> None:
    """The bundle has none, so that the first is refused where its name is read."""
    printed = run(
        *(sys.executable, "-c", CONTROLLED, HERE.parent, library.folder / "libsdruntime.so", bundle),
        env={"SDRUNTIME_PYTHON": sys.prefix, "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"},
    )
    unnamed, *others = printed.splitlines()
    assert "ControlNet" in unnamed
    assert others == [
        "2 control: scale 99.0 is outside 0 to 10",
        "2 control: scale is not a finite number",
        "2 submit: controls[0].fit: 'stretch' is not one of resize, crop, exact",
        "2 control: image is NULL",
        "2 control of 0x7: expected width and height from 1 to 16384",
        "2 control: stride 26 is less than the 27 bytes of a row",
        "2 sdr_control.reserved is not 0: call sdr_control_init first",
        "2 sdr_control.struct_size is 8; expected 72 to 4096: call sdr_control_init first",
        "2 control_count 17: at most 16",
    ]


@pytest.mark.parametrize("isolation", [0, 1])
def test_a_depth_map_of_any_size(library: Library, bundle: Path, tmp_path: Path, isolation: int) -> None:
    """The UNet adds the depth to its latents here."""
    folder = with_depth(Path(shutil.copytree(bundle, tmp_path / "bundle")))
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (64, 128, 3), dtype=np.uint8)
    depth = random.integers(0, 256, (7, 9), dtype=np.uint8)
    np.savez(tmp_path / "given.npz", image=image, depth=depth)
    run(
        *(sys.executable, "-c", DEEP, HERE.parent, library.folder / "libsdruntime.so", folder, tmp_path / "given.npz"),
        *(tmp_path / "found.npy", str(isolation)),
        env={"SDRUNTIME_PYTHON": sys.prefix if isolation else "", "PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"},
    )
    with Pipeline.open(folder) as pipe:
        common: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "steps": 3, "image": image, "strength": 0.8}
        expected, other = (pipe([Request(**common, depth=each)]).pixels[0] for each in (depth, depth[::-1]))
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)
    assert (expected != other).any()


def with_depth(folder: Path) -> Path:
    """Give the UNet of a bundle an input `depth`, which is added to the latents, and build its engines again."""
    onnx = pytest.importorskip("onnx")
    path = folder / "unet" / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["deep_sample" if name == "sample" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["sample", "depth"], ["deep_sample"]))
    dims = ["batch", 1, "height", "width"]
    model.graph.input.append(onnx.helper.make_tensor_value_info("depth", onnx.TensorProto.FLOAT, dims))
    path.write_bytes(model.SerializeToString())
    manifest = folder / "manifest.json"
    document = json.loads(manifest.read_text())
    document["engines"] = []
    document["components"]["unet"]["inputs"].append({"name": "depth", "dtype": "float32", "shape": dims})
    written = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    document["files"] = {name: file for name, file in document["files"].items() if not name.startswith("engines/")}
    document["files"]["unet/model.onnx"] = written
    manifest.write_text(json.dumps(document))
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime")):
        pass
    return folder
