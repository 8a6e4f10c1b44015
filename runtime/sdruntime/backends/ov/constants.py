"""Copy the constants of an OpenVINO model that its CPU plugin reads in place while the compiled model is in use.

When the plugin compiles a model, it packs the weights of convolutions and matrix products into its own memory, in the layouts of
its kernels. It may read every other constant (biases, embedding tables, norms) in place on every call, even in a mapped file. It
packs no weights in the bodies of an If.
"""

from __future__ import annotations

from typing import Any

_PACKED = {"Convolution": 1, "MatMul": 1}  # operation: index of the input that is packed


def own_constants(ov: Any, model: Any) -> None:
    """Replace the model's constants by copies, except those that are packed when it is compiled."""
    _copy_constants(ov, model, packs=True)


def _copy_constants(ov: Any, model: Any, *, packs: bool) -> None:
    """Copy the constants of a model or of the body of an If; `packs`: not those that are packed."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "If":
            for body in (node.get_then_body(), node.get_else_body()):
                _copy_constants(ov, body, packs=False)
        if node.get_type_name() == "Constant" and not (packs and _packed(node.output(0))):
            copy = ov.op.Constant(node.get_tensor_view(), shared_memory=False)
            copy.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(copy.output(0))


def _packed(output: Any) -> bool:
    """Return whether all readers of an output pack it, directly or after a Convert from half precision."""
    users = [(target.get_node(), target.get_index()) for target in output.get_target_inputs()]
    return bool(users) and all(
        _packed(user.output(0)) if user.get_type_name() == "Convert" else _PACKED.get(user.get_type_name()) == index
        for user, index in users
    )
