"""Constants of a graph of OpenVINO's that its CPU plugin reads where they lie, for as long as the compiled model is used.

While it compiles, it packs the weights of convolutions and matrix products into memory of its own, in layouts of its kernels.
Every other constant (biases, tables of embeddings, norms) may be read where it lies with every call, in a mapped file too.
"""

from __future__ import annotations

from typing import Any

_PACKED = {"Convolution": 1, "MatMul": 1}  # operation: the input that it packs


def own_constants(ov: Any, model: Any) -> None:
    """Give the model copies of its constants, except of those that are packed when it is compiled."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and not _packed(node.output(0)):
            own = ov.op.Constant(node.get_tensor_view(), shared_memory=False)
            own.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(own.output(0))


def _packed(output: Any) -> bool:
    """Whether it is read by operations that pack it alone, directly or widened from half precision."""
    users = [(each.get_node(), each.get_index()) for each in output.get_target_inputs()]
    return bool(users) and all(
        _packed(user.output(0)) if user.get_type_name() == "Convert" else _PACKED.get(user.get_type_name()) == index
        for user, index in users
    )
