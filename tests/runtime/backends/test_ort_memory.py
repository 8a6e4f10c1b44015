"""The memory of an ONNX Runtime session: what its optimizer freed is returned to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WIDTH, LAYERS = 1024, 12
# weights in half precision, which ONNX Runtime converts to float32 when it opens the model; prints the MiB that were added
OPENING = """
import sys
from pathlib import Path
from types import SimpleNamespace
from sdruntime.backends.ort.build import library
from sdruntime.backends.ort.weights import open_session
from sdruntime.bundle.bundle import Bundle, file_spec
from sdruntime.system.memory import return_freed_memory

def private():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

folder, files, ort = Path(sys.argv[1]), ("model.onnx", "model.onnx.data"), library()
bundle = Bundle(folder, SimpleNamespace(files={name: file_spec(folder / name) for name in files}))
options = ort.SessionOptions()
options.intra_op_num_threads = 1
return_freed_memory()
before = private()
session = open_session(ort, bundle, (folder / files[0]).read_bytes(), files, options, ["CPUExecutionProvider"])
print(private() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_an_open_session_holds_its_weights_once(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import numpy as np

    random = np.random.default_rng(0)  # equal weights would share one copy
    nodes, weights = [], []
    for layer in range(LAYERS):
        values = random.standard_normal((WIDTH, WIDTH)).astype(np.float16)
        weights.append(onnx.numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(onnx.helper.make_node("Cast", [f"w{layer}"], [f"f{layer}"], to=onnx.TensorProto.FLOAT))
        nodes.append(onnx.helper.make_node("MatMul", [f"x{layer}", f"f{layer}"], [f"x{layer + 1}"]))
    of, to = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", WIDTH]) for name in ("x0", f"x{LAYERS}"))
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [of], [to], weights), opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    printed = subprocess.run([sys.executable, "-c", OPENING, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    in_float32 = 4 * LAYERS * WIDTH**2 >> 20
    assert in_float32 - 2 <= int(printed) <= in_float32 + 12, "as much again stays without return_freed_memory"
