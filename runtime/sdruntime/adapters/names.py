"""Find the weights that the keys of an adapter file mean.

Names are resolved backwards: each module of the model is spelled in every way that is in use, and the file's keys are looked up.
A key that no module has is left over. Every spelling is one of these, followed by the name of a tensor (`SUFFIXES`):

    unet.down_blocks.0.attentions.0.proj_in             diffusers and peft
    lora_unet_down_blocks_0_attentions_0_proj_in        kohya, A1111
    lora_unet_input_blocks_1_1_proj_in                  the same, numbered as in the original code
    diffusion_model.input_blocks.1.1.proj_in            ComfyUI
    unet.….attn1.processor.to_q_lora                    diffusers before 0.19
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sdruntime.adapters.kinds import ALPHA, DORA_SCALE, DOWN, FULL, MAGNITUDE, MID, UP
from sdruntime.bundle.roles import role

_BIAS = "bias."  # of a tensor that changes the module's bias

# ending of a key -> the tensor of a layer (sdruntime.adapters.kinds). Longer endings come first.
SUFFIXES: Mapping[str, str] = {
    f".{ending}": tensor
    for ending, tensor in {
        "lora_A.default.weight": DOWN,
        "lora_B.default.weight": UP,
        "lora_magnitude_vector.default.weight": MAGNITUDE,
        "lora_magnitude_vector.weight": MAGNITUDE,
        "lora_magnitude_vector": MAGNITUDE,
        "lora_A.weight": DOWN,
        "lora_B.weight": UP,
        "lora_down.weight": DOWN,
        "lora_up.weight": UP,
        "lora_mid.weight": MID,
        "lora_linear_layer.down.weight": DOWN,
        "lora_linear_layer.up.weight": UP,
        "lora_linear_layer.alpha": ALPHA,
        "lora.down.weight": DOWN,
        "lora.up.weight": UP,
        "lora.alpha": ALPHA,
        "hada_w1_a": "w1_a",
        "hada_w1_b": "w1_b",
        "hada_w2_a": "w2_a",
        "hada_w2_b": "w2_b",
        "hada_t1": "t1",
        "hada_t2": "t2",
        "lokr_w1_a": "k1_a",
        "lokr_w1_b": "k1_b",
        "lokr_w1": "k1",
        "lokr_w2_a": "k2_a",
        "lokr_w2_b": "k2_b",
        "lokr_w2": "k2",
        "lokr_t2": "t2_k",
        "diff": FULL,
        "diff_b": _BIAS + FULL,
        "w_norm": FULL,
        "b_norm": _BIAS + FULL,
        "dora_scale": DORA_SCALE,
        "alpha": ALPHA,
    }.items()
}
_PROCESSOR = {"_lora.down.weight": DOWN, "_lora.up.weight": UP, "_lora.alpha": ALPHA}  # after processor.to_q and the like

# The original layout of a UNet: its modules outside the blocks, by their names there, and those of a residual block.
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TEXT_PREFIX = "text_model."
_SELF_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_COMFY = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The keys of a file that change one weight: by the tensor of the layer. `stem`: what they begin with."""

    component: str
    weight: str
    shape: Shape
    stem: str
    keys: Mapping[str, str]


def split_key(key: str) -> tuple[str, str] | None:
    """Return what a key begins with, and the tensor that its ending names; None for an unknown ending."""
    for endings in (SUFFIXES, _PROCESSOR):
        for ending, tensor in endings.items():
            if key.endswith(ending):
                return key.removesuffix(ending) + ("" if endings is SUFFIXES else "_lora"), tensor
    return None


def resolve(keys: Iterable[str], components: Mapping[str, Mapping[str, Shape]]) -> tuple[list[Match], list[str]]:
    """Return the weights that the keys of a file change, and the keys that are left over.

    `components`: the model's text encoders and UNet, each with the shapes of its weights by their names in the checkpoint.
    """
    by_stem: dict[str, dict[str, str]] = {}
    unmatched = set()
    for key in keys:
        parts = split_key(key)
        if parts is None:
            unmatched.add(key)
        else:
            by_stem.setdefault(parts[0], {})[parts[1]] = key
    matches: list[Match] = []
    pair = any(role(component).takes_second_texts for component in components)
    for component, weights in components.items():
        original = original_names(weights) if role(component).kind == "denoiser" else {}
        for weight, shape in weights.items():
            module, _, kind = weight.rpartition(".")
            if kind != "weight":
                continue
            for stem in _stems(component, module, original.get(module), pair=pair):
                if stem in by_stem:
                    matches += _of_module(component, module, stem, by_stem.pop(stem), weights, shape, unmatched)
    unmatched.update(key for left in by_stem.values() for key in left.values())
    return matches, sorted(unmatched)


def _of_module(
    component: str,
    module: str,
    stem: str,
    tensors: Mapping[str, str],
    weights: Mapping[str, Shape],
    shape: Shape,
    unmatched: set[str],
) -> Iterator[Match]:
    """Yield what changes a module's weight and its bias; keys of a bias that it does not have become `unmatched`."""
    own = {tensor: key for tensor, key in tensors.items() if not tensor.startswith(_BIAS)}
    of_bias = {tensor.removeprefix(_BIAS): key for tensor, key in tensors.items() if tensor.startswith(_BIAS)}
    if own.keys() - {ALPHA}:
        yield Match(component=component, weight=f"{module}.weight", shape=shape, stem=stem, keys=own)
    elif not of_bias:
        unmatched.update(own.values())
    bias = f"{module}.bias"
    if of_bias and bias in weights:
        yield Match(component=component, weight=bias, shape=weights[bias], stem=stem, keys=of_bias)
    else:
        unmatched.update(of_bias.values())


def original_names(weights: Iterable[str]) -> dict[str, str]:
    """Return the names that the original code gives to the modules of a UNet: the numbers follow from the order of its blocks."""
    modules = {weight.rpartition(".")[0] for weight in weights}
    present = _ancestors(modules)
    places = {ours: theirs for theirs, ours in OUTER.items()} | dict(_blocks(present))
    names = {}
    for module in modules:
        parts = module.split(".")
        cut = next((cut for cut in range(len(parts), 0, -1) if ".".join(parts[:cut]) in places), 0)
        if not cut:
            continue
        place, rest = ".".join(parts[:cut]), parts[cut:]
        if ".resnets." in place and rest:
            rest = [RESNET.get(rest[0], rest[0]), *rest[1:]]
        names[module] = ".".join([places[place], *rest])
    return names


def _ancestors(modules: Iterable[str]) -> set[str]:
    present: set[str] = set()
    for module in modules:
        parts = module.split(".")
        present.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return present


def _blocks(present: set[str]) -> Iterator[tuple[str, str]]:
    """Yield our name and the original one of each residual block, attention and resampler."""
    index = 0
    for block in _counted(present, "down_blocks"):
        for layer, resnet in enumerate(_counted(present, f"{block}.resnets")):
            index += 1
            yield resnet, f"input_blocks.{index}.0"
            yield f"{block}.attentions.{layer}", f"input_blocks.{index}.1"
        if f"{block}.downsamplers" in present:
            index += 1
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
    middle = 0
    for layer, resnet in enumerate(_counted(present, "mid_block.resnets")):
        yield resnet, f"middle_block.{middle}"
        middle += 1
        if f"mid_block.attentions.{layer}" in present:
            yield f"mid_block.attentions.{layer}", f"middle_block.{middle}"
            middle += 1
    index = -1
    for block in _counted(present, "up_blocks"):
        child = 1
        for layer, resnet in enumerate(_counted(present, f"{block}.resnets")):
            index += 1
            yield resnet, f"output_blocks.{index}.0"
            yield f"{block}.attentions.{layer}", f"output_blocks.{index}.1"
            child = 2 if f"{block}.attentions.{layer}" in present else 1
        yield f"{block}.upsamplers.0.conv", f"output_blocks.{index}.{child}.conv"


def _counted(present: set[str], parent: str) -> Iterator[str]:
    index = 0
    while (child := f"{parent}.{index}") in present:
        yield child
        index += 1


def _stems(component: str, module: str, original: str | None, *, pair: bool) -> Iterator[str]:
    """Yield every spelling of a module. `pair`: the model has a second text encoder (SDXL)."""
    if role(component).kind == "denoiser":
        names = [module, *([original] if original else [])]
        for name in names:
            yield f"unet.{name}"
            yield f"diffusion_model.{name}"
            yield name
            for prefix in ("lora_unet", "lycoris_unet", "lycoris"):
                yield f"{prefix}_{name.replace('.', '_')}"
        head, _, last = module.removesuffix(".0").rpartition(".")
        if last.startswith("to_"):
            yield f"unet.{head}.processor.{last}_lora"
            yield f"{head}.processor.{last}_lora"
        return
    bare = module.removeprefix(_TEXT_PREFIX)
    kohya = {"text_encoder": "te1" if pair else "te", "text_encoder_2": "te2"}[component]
    for name in (_TEXT_PREFIX + bare, bare):
        yield f"{component}.{name}"
        yield f"text_encoders.{_COMFY[component]}.transformer.{name}"
        for prefix in ("lora", "lycoris"):
            yield f"{prefix}_{kohya}_{name.replace('.', '_')}"
        head, _, last = name.rpartition(".")
        if last in _SELF_ATTENTION:
            yield f"{component}.{head}.{_SELF_ATTENTION[last]}_lora"
