"""What the strict TensorRT's classes do up to a network: logger, ONNX parser, the network and its layers.

A behaviour is made with the module that it belongs to (`trt`), and has the member names of the real class.
"""

from __future__ import annotations

import functools
import sys
import weakref
from pathlib import Path
from typing import Any

from trt.fake_plan import Shape, Tensor, tensor_from_onnx
from trt.strict import Strictness

_NO_IMPORTER = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
_LAYERS = {"Conv": "CONVOLUTION", "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX", "Cast": "CAST"}


def called_back(trt: Any, name: str, method: str, instance: Any, *args: Any) -> Any:
    """Call what the user's subclass of `name` has in place of `method`. As in the real library, what it raises is printed and
    lost, Ctrl-C too, and counts as False."""
    trt.used.add((name, method))
    try:
        return getattr(instance, method)(*args)
    except Strictness:
        raise
    except BaseException as error:
        print(f"[ERROR] Exception caught in {method}(): {type(error).__name__}: {error}", file=sys.stderr)
        return False


def report(trt: Any, logger: Any, severity: str, text: str) -> None:
    """Say something to the user's logger, as the library does."""
    called_back(trt, "ILogger", "log", logger, trt.enum("ILogger.Severity", severity), text)


class Logger:
    """`trt.Logger`; one's own is a subclass of ILogger."""

    def __init__(self, trt: Any, min_severity: Any = None) -> None:
        self.min_severity = min_severity or trt.enum("ILogger.Severity", "WARNING")

    def log(self, severity: Any, msg: str) -> None:
        if int(severity) <= int(self.min_severity):
            print(f"[TRT] {msg}")


class Dims:
    """A shape. It equals lists and tuples, and no other Dims: so is the real one."""

    def __init__(self, trt: Any, shape: Any = ()) -> None:
        self.shape: Shape = tuple(int(size) for size in shape)
        if len(self.shape) > 8:
            raise ValueError(f"Input length {len(self.shape)}. Max expected length is 8")

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, arg0: Any) -> Any:
        if not isinstance(arg0, slice) and not -len(self.shape) <= arg0 < len(self.shape):
            raise IndexError("Out of bounds")
        return self.shape[arg0]

    def __eq__(self, arg0: object) -> bool:
        return self.shape == tuple(arg0)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return str(self.shape)

    __hash__ = None  # type: ignore[assignment]
    __str__ = __repr__


def dims(trt: Any, shape: Shape) -> Any:
    return trt.make("Dims", Dims(trt, shape))


class ParserError:
    def __init__(self, trt: Any, code: str, desc: str, node: int = -1, name: str = "", operator: str = "") -> None:
        self._code, self._desc = trt.enum("ErrorCode", code), desc
        self._node, self._name, self._operator = node, name, operator

    def code(self) -> Any:
        return self._code

    def desc(self) -> str:
        return self._desc

    def file(self) -> str:
        return "ModelImporter.cpp"

    def line(self) -> int:
        return 1

    def func(self) -> str:
        return "parse"

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def local_function_stack(self) -> list[str]:
        return []


class OnnxParser:
    """Reads the ONNX. Operators of other domains than ONNX's own are unsupported, and Attention where the version has none."""

    def __init__(self, trt: Any, network: Any, logger: Any) -> None:
        self._trt, self._network, self._logger = trt, weakref.ref(network), logger  # the real one keeps no reference either
        self._errors: list[ParserError] = []

    def parse_from_file(self, model: str) -> bool:
        if not Path(model).is_file():
            return self._fail("INVALID_VALUE", f"Input file cannot be found, or is not a regular file: {model}")
        return self.parse(Path(model).read_bytes(), model)

    def parse(self, model: Any, path: str | None = None) -> bool:
        import onnx

        network = self._network()
        if network is None:
            raise Strictness("the network was deleted before its parser: the real one crashes")
        try:
            proto = onnx.load_model_from_string(bytes(model))
        except Exception:  # protobuf's own errors
            return self._fail("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model.")
        if not proto.graph.output:
            return self._fail("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model.")
        if path is not None:
            try:
                onnx.load_external_data_for_model(proto, str(Path(path).parent))
            except Exception as error:
                return self._fail("INVALID_GRAPH", f"Failed to open file with external data: {error}")
        unknown = () if "IAttention" in self._trt.surface_.classes else ("Attention",)
        nodes = list(enumerate(proto.graph.node))
        faults = [(k, node) for k, node in nodes if node.domain not in ("", "ai.onnx") or node.op_type in unknown]
        for k, node in faults:
            self._fail("INVALID_NODE", _NO_IMPORTER, k, node.name, node.op_type)
        if faults:
            return False
        network._behaviour.fill(proto)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._trt.make("ParserError", self._errors[index])

    def clear_errors(self) -> None:
        self._errors.clear()

    def _fail(self, code: str, desc: str, node: int = -1, name: str = "", operator: str = "") -> bool:
        self._errors.append(ParserError(self._trt, code, desc, node, name, operator))
        report(self._trt, self._logger, "ERROR", f"In node {node} with name: {name} and operator: {operator}: {code}: {desc}")
        return False


class NetworkTensor:
    def __init__(self, trt: Any, tensor: Tensor, network: Network) -> None:
        self._tensor, self._network, self.name = tensor, network, tensor.name
        self.shape, self.dtype = dims(trt, tensor.dims), trt.enum("DataType", tensor.dtype)
        self.is_network_input, self.is_shape_tensor = tensor in network.inputs, False

    @property
    def is_network_output(self) -> bool:
        return self._tensor in self._network.outputs

    def get_dimension_name(self, index: int) -> str | None:
        dim = self._tensor.shape[index]
        return dim if isinstance(dim, str) else None


class Attention:
    def __init__(self) -> None:
        self.decomposable = False


class Layer:
    """A layer. `attention` is there for the first of the two that an Attention becomes, seen as IAttentionInputLayer."""

    def __init__(self, network: Network, kind: str, node: Any, attention: Any = None) -> None:
        self._network, self._inputs, self._outputs = network, list(node.input), list(node.output)
        self.name, self.type, self.attention = node.name, network._trt.enum("LayerType", kind), attention

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_input(self, index: int) -> Any:
        return self._network.tensor(self._inputs[index])

    def get_output(self, index: int) -> Any:
        return self._network.tensor(self._outputs[index])


class Network:
    def __init__(self, trt: Any, logger: Any, flags: int) -> None:
        self._trt, self._logger, self.flags, self.name = trt, logger, flags, ""
        self.onnx: bytes | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Layer] = []
        self.attentions: list[Any] = []
        self.refittable: set[str] = set()

    def fill(self, proto: Any) -> None:
        if self.onnx is not None:
            raise Strictness("two models were parsed into one network")
        weights = {tensor.name for tensor in proto.graph.initializer}
        self.onnx = proto.SerializeToString(deterministic=True)
        self.inputs = [tensor_from_onnx(value) for value in proto.graph.input if value.name not in weights]
        self.outputs = [tensor_from_onnx(value) for value in proto.graph.output]
        for node in proto.graph.node:
            if node.op_type == "Attention":
                attention = self._trt.make("IAttention", Attention())
                self.attentions.append(attention)
                self.layers.append(Layer(self, "ATTENTION_INPUT", node, attention))
                self.layers.append(Layer(self, "ATTENTION_OUTPUT", node))
            else:
                self.layers.append(Layer(self, _LAYERS.get(node.op_type, "ELEMENTWISE"), node))

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, index: int) -> Any:
        return self._item("ITensor", [NetworkTensor(self._trt, tensor, self) for tensor in self.inputs], index)

    def get_output(self, index: int) -> Any:
        return self._item("ITensor", [NetworkTensor(self._trt, tensor, self) for tensor in self.outputs], index)

    def get_layer(self, index: int) -> Any:
        return self._item("ILayer", self.layers, index)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, arg0: int) -> Any:
        if not 0 <= arg0 < len(self.layers):
            raise IndexError("Out of bounds")
        return self.get_layer(arg0)

    def tensor(self, name: str) -> Any:
        """By name; None for an optional one that is not there."""
        return self._trt.make("ITensor", NetworkTensor(self._trt, self._tensors[name], self)) if name in self._tensors else None

    def mark_weights_refittable(self, name: str) -> bool:
        import onnx

        known = {tensor.name for tensor in onnx.load_model_from_string(self.onnx).graph.initializer}
        self.refittable |= {name} & known
        return name in known

    def mark_output(self, tensor: Any) -> None:
        if tensor.is_network_output:
            raise Strictness(f"{tensor.name} is an output already")
        self._end_with([*self.outputs, self._tensors[tensor.name]])

    def unmark_output(self, tensor: Any) -> None:
        self._end_with([each for each in self.outputs if each.name != tensor.name])

    def _end_with(self, outputs: list[Tensor]) -> None:
        import onnx

        self.outputs = outputs
        proto = onnx.load_model_from_string(self.onnx)
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=tensor.name) for tensor in outputs)
        self.onnx = proto.SerializeToString(deterministic=True)

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Those that are no weights, by name."""
        import onnx

        graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(self.onnx)).graph
        return {value.name: tensor_from_onnx(value) for value in (*graph.input, *graph.value_info, *graph.output)}

    def _item(self, name: str, items: list[Any], index: int) -> Any:
        if not 0 <= index < len(items):
            report(self._trt, self._logger, "ERROR", f"Parameter check failed, condition: index {index} < {len(items)}")
            return None
        return self._trt.make(name, items[index])


NETWORK: dict[str, type] = {"Logger": Logger, "Dims": Dims, "OnnxParser": OnnxParser}
