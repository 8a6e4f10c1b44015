"""A ControlNet in one file: its config, from names and shapes and from the UNet's config, and its weights by diffusers' names.

Both layouts are read: that of the original code, also from a file that holds the whole model, and that of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sdexport.checkpoint.original import diffusers
from sdexport.checkpoint.original.expected import controlnet_weights
from sdexport.checkpoint.original.naming import Misfit, Tensors, check_fit, children, renamed, within
from sdexport.checkpoint.original.unet import down_blocks, inside, middle_block, old_name
from sdexport.checkpoint.pipelines import CONTROLNET
from sdruntime.adapters.names import OUTER

_WHOLE = "control_model."  # what the names begin with in a file of the whole model, and in many files of a ControlNet alone
_HINT = "input_hint_block"  # the convolutions of the control image; activations have the odd numbers
# names of other networks that control images: the first that some tensor's name holds
_OTHERS = {
    "lora_controlnet": "a ControlLoRA",
    "lllite_": "a ControlNet-LLLite",
    "task_embedding": "a ControlNet-Union in one file: use its diffusers folder",
    "control_add_embedding.": "a ControlNet-Union in one file: use its diffusers folder",
    "joint_blocks.": "a ControlNet for Stable Diffusion 3",
    "double_blocks.": "a ControlNet for Flux",
    "controlnet_blocks.": "a ControlNet for a transformer",
    "body.0.": "a T2I-Adapter (give its diffusers folder as --t2i-adapter)",
    "lora_": "a LoRA (--lora)",
    "difference": "a ControlNet that is stored as its difference from a model",
}
# settings that no weight shows, which a ControlNet takes over from its UNet
_OF_UNET = (
    *("flip_sin_to_cos", "freq_shift", "only_cross_attention", "downsample_padding", "mid_block_scale_factor", "act_fn"),
    *("norm_num_groups", "norm_eps", "num_attention_heads", "attention_head_dim", "upcast_attention"),
    *("resnet_time_scale_shift", "addition_time_embed_dim", "addition_embed_type_num_heads"),
)
# settings that the weights show, in one of several ways of writing them
_SHOWN = (
    *("down_block_types", "mid_block_type", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("transformer_layers_per_block", "use_linear_projection", "addition_embed_type", "projection_class_embeddings_input_dim"),
)


def read_controlnet(tensors: Tensors, unet: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the weights of a ControlNet for a UNet with this config.

    Raises ValueError for other networks, Misfit with the names and shapes that do not fit the others.
    """
    tensors = within(tensors, _WHOLE) or tensors
    for sign, other in _OTHERS.items():
        if name := next((name for name in tensors if sign in name), None):
            raise ValueError(f"not supported: {other} ({name:.80})")
    unknown: Iterable[str] = ()
    old: Callable[[str], str] = str
    if children(tensors, "zero_convs"):
        _, places = down_blocks(tensors)
        middle_block(tensors, places)
        places = OUTER | places | _places(tensors)
        tensors, unknown = renamed(tensors, places, inside)
        old = lambda name: old_name(name, places)  # noqa: E731
    elif not children(tensors, "controlnet_down_blocks"):
        raise ValueError("not a ControlNet: neither zero_convs.0.0.weight nor controlnet_down_blocks.0.weight is in the file")
    shown = diffusers.read_controlnet(tensors)
    fixed = {key: shown[key] for key in ("in_channels", "conditioning_channels", "conditioning_embedding_out_channels")}
    fixed["_class_name"] = CONTROLNET
    as_unet = {key: unet[key] for key in (*_OF_UNET, *_SHOWN) if key in unet} | fixed
    try:  # if the UNet's own way of writing its settings fits
        check_fit(as_unet, controlnet_weights(as_unet), tensors, unknown=unknown, old=old)
    except (Misfit, LookupError, TypeError, ValueError):
        config = {key: unet[key] for key in _OF_UNET if key in unet} | shown | fixed
        if isinstance(heads := config.get("attention_head_dim"), list) and len(heads) != len(shown["block_out_channels"]):
            config["attention_head_dim"] = heads[0]  # of a UNet of another family, which is reported where both are compared
        check_fit(config, controlnet_weights(config), tensors, unknown=unknown, old=old)
        return config, tensors
    return as_unet, tensors


def _places(tensors: Tensors) -> dict[str, str]:
    """Return the new names of the modules that a ControlNet has beside the UNet's."""
    last = max(children(tensors, _HINT), default=0)
    places = {f"{_HINT}.{2 * k}": f"controlnet_cond_embedding.blocks.{k - 1}" for k in range(1, last // 2)}
    places |= {f"{_HINT}.0": "controlnet_cond_embedding.conv_in", f"{_HINT}.{last}": "controlnet_cond_embedding.conv_out"}
    places |= {f"zero_convs.{k}.0": f"controlnet_down_blocks.{k}" for k in children(tensors, "zero_convs")}
    return places | {"middle_block_out.0": "controlnet_mid_block"}
