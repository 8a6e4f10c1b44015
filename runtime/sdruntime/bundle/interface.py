"""The input and output tensors that the pipeline expects of a bundle's components.

Keep equal to `sdexport.families.components`, which writes them. A dimension in capitals has the same size everywhere in a bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sdruntime.bundle.dimensions import divisor_of
from sdruntime.bundle.manifest import ComponentSpec, Manifest, TensorSpec
from sdruntime.bundle.roles import IMAGE_ENCODER, PREVIEW, of_kind, role
from sdruntime.bundle.tasks import GUIDANCE, INPUTS, NOISE_LEVEL, SCORED, SIZES, TIME_IDS, guidance_width, task_of, time_ids_width

TOKEN_VECTORS = "token_vectors"  # of a text encoder, optional: the vector at each position whose id is outside the vocabulary
LOGVAR = "latent_logvar"  # of the VAE's posterior; a tiny VAE has none
# of a ControlNet, beside what the UNet takes: an image in [0, 1], and a factor for each of its residuals
CONTROL_IMAGE, CONTROL_SCALES = "controlnet_cond", "conditioning_scale"
CONTROL_TYPE = "control_type"  # of a ControlNet-Union: 1 for the type of the image, 0 for the others
FEATURE = "feature_"  # of a T2I-Adapter, and an optional input of its UNet: feature_0, feature_1 …
# of a UNet with an IP-Adapter, optional: tokens of images, what is added to their attention before the softmax (0, or NO_TOKEN
# for none), and how much they count
IMAGE_TOKENS, IMAGE_BIAS, IMAGE_SCALE = "image_tokens", "image_bias", "image_scale"
NO_TOKEN = -10_000.0
# also of it: above 0, if each image has an attention of its own, which counts where its mask is, in place of one for all; and the
# masks at the size of the latents divided by 1, 2, …, for the layers of that size
IMAGE_MASKED = "image_masked"
IMAGE_MASKS: Mapping[int, str] = {1 << k: f"image_mask_{1 << k}" for k in range(4)}
PRESENCE = "presence"  # of the image encoder of an IP-Adapter: 1, or 0 for the tokens of no image
Shape = tuple[int | str, ...]
Tensors = Mapping[str, Shape]


def sides_over(divisor: int) -> tuple[str, str]:
    """Return the sides of latents divided by a number."""
    return ("height", "width") if divisor == 1 else (f"height/{divisor}", f"width/{divisor}")


_LATENT: Shape = ("batch", "C", "height", "width")
_ENCODED: Shape = ("batch", "C", "latent_height", "latent_width")
_VAE: Mapping[str, tuple[Tensors, Tensors]] = {
    "vae_decoder": ({"latent_sample": _LATENT}, {"sample": ("batch", 3, "image_height", "image_width")}),
    "vae_encoder": ({"sample": ("batch", 3, "height", "width")}, {"latent_mean": _ENCODED, LOGVAR: _ENCODED}),
}
_IDS: Tensors = {"input_ids": ("batch", "T")}
_UNET: Tensors = {"sample": _LATENT, "timestep": ("batch",)}
_POOLED: Shape = ("batch", "P")
PLAIN: Mapping[str, tuple[Tensors, Tensors]] = {
    **_VAE,
    "text_encoder": (_IDS, {"last_hidden_state": ("batch", "T", "D")}),
    "unet": ({**_UNET, "encoder_hidden_states": ("batch", "sequence", "D")}, {"out_sample": _LATENT}),
}
XL: Mapping[str, tuple[Tensors, Tensors]] = {
    **_VAE,
    "text_encoder": (_IDS, {"hidden_states": ("batch", "T", "D1")}),
    "text_encoder_2": (_IDS, {"hidden_states": ("batch", "T", "D2"), "text_embeds": _POOLED}),
    "unet": (
        {**_UNET, "encoder_hidden_states": ("batch", "sequence", "D"), "text_embeds": _POOLED, TIME_IDS: ("batch", SIZES)},
        {"out_sample": _LATENT},
    ),
}


_OPTIONAL_INPUTS: Tensors = {TOKEN_VECTORS: ("batch", "T", "W")}  # of a text encoder; W: its own width
_OPTIONAL: Mapping[str, tuple[Tensors, Tensors]] = {
    PREVIEW: _VAE["vae_decoder"],
    IMAGE_ENCODER: ({"pixel_values": ("batch", 3, "Side", "Side"), PRESENCE: ("batch",)}, {IMAGE_TOKENS: ("batch", "N", "D")}),
}
IMAGE_PROMPT: Tensors = {
    IMAGE_TOKENS: ("batch", "Tokens", "D"),
    IMAGE_BIAS: ("batch", "Tokens"),
    IMAGE_SCALE: ("batch",),
    IMAGE_MASKED: ("batch",),
    **{name: ("batch", *sides_over(divisor), "Images") for divisor, name in IMAGE_MASKS.items()},
}


def interface_faults(manifest: Manifest) -> Iterator[str]:
    """Yield a fault for each component or tensor that is missing, unknown to the pipeline, or of the wrong type or shape."""
    known: dict[str, int | str] = {"C": manifest.model.latent_channels}
    optional = {name: tensors for name, tensors in _OPTIONAL.items() if name in manifest.components}
    required = XL if manifest.model.family == "sdxl" else PLAIN
    for name, (inputs, outputs) in {**required, **optional}.items():
        component = manifest.components.get(name)
        if component is None:
            part = role(name)
            if part.kind == "text encoder" and not part.takes_second_texts and of_kind(manifest.components, part.kind):
                continue  # SDXL's refiner reads texts with the second encoder alone
            yield f"components: {name} is missing"
            continue
        denoiser = role(name).kind == "denoiser"
        if denoiser and (task := task_of(component)):
            inputs = {**inputs, **{tensor: ("batch", count, *_LATENT[2:]) for tensor, count in INPUTS.get(task, {}).items()}}
        if denoiser and task_of(component) == "upscaling":
            inputs = {**inputs, NOISE_LEVEL: ("batch",)}
        if denoiser and time_ids_width(component) == SCORED and TIME_IDS in inputs:
            inputs = {**inputs, TIME_IDS: ("batch", SCORED)}
        if denoiser and guidance_width(component) is not None:
            inputs = {**inputs, GUIDANCE: ("batch", "G")}
        if role(name).kind == "VAE encoder" and not has_posterior(component):
            outputs = {tensor: shape for tensor, shape in outputs.items() if tensor != LOGVAR}
        yield from _faults(f"{name}.inputs", inputs, component.inputs, known, complete=True)
        if role(name).kind == "text encoder" and component.optional_inputs:
            widths = known.copy()  # each encoder has its own width
            yield from _faults(f"{name}.optional_inputs", _OPTIONAL_INPUTS, component.optional_inputs, widths, complete=True)
        yield from _faults(f"{name}.outputs", outputs, component.outputs, known, complete=False)
    for name in of_kind(manifest.components, "denoiser"):
        yield from _image_prompt_faults(manifest, known)
        yield from _control_faults(manifest, required[name][0], known)
        yield from _adapter_faults(manifest, known)


def _control_faults(manifest: Manifest, inputs: Tensors, known: dict[str, int | str]) -> Iterator[str]:
    """Yield a fault for each tensor of a ControlNet that does not fit the UNet. `inputs`: the UNet's, without its task's."""
    residuals, factor = residuals_of(manifest.components["unet"]), manifest.model.vae_factor
    for name in of_kind(manifest.components, "ControlNet"):
        component = manifest.components[name]
        image: Shape = ("batch", 3, f"height*{factor}", f"width*{factor}")
        expected: dict[str, Shape] = {**inputs, CONTROL_IMAGE: image, CONTROL_SCALES: ("batch", len(residuals))}
        if (types := control_types(component)) is not None:
            expected[CONTROL_TYPE] = ("batch", types)
        yield from _faults(f"{name}.inputs", expected, component.inputs, known, complete=True)
        pooled = is_pooled(component)
        outputs = {tensor.name: (*tensor.shape[:2], 1, 1) if pooled else tensor.shape for tensor in residuals}
        yield from _faults(f"{name}.outputs", outputs, component.outputs, known, complete=True)


def _adapter_faults(manifest: Manifest, known: dict[str, int | str]) -> Iterator[str]:
    """Yield a fault for each tensor of a T2I-Adapter that does not fit the UNet. Its sides are those of the image."""
    features, factor = features_of(manifest.components["unet"]), manifest.model.vae_factor
    expected: dict[str, Shape] = {
        tensor.name: (*tensor.shape[:2], *sides_over(factor * divisor_of(tensor.shape[-1]))) for tensor in features
    }
    for name in of_kind(manifest.components, "T2I-Adapter"):
        component = manifest.components[name]
        channels = next((tensor.shape[1:2] for tensor in component.inputs if tensor.name == CONTROL_IMAGE), (3,))
        image: Shape = ("batch", 1 if channels == (1,) else 3, "height", "width")  # grey or RGB
        yield from _faults(f"{name}.inputs", {CONTROL_IMAGE: image}, component.inputs, known, complete=True)
        yield from _faults(f"{name}.outputs", expected, component.outputs, known, complete=True)


def _image_prompt_faults(manifest: Manifest, known: dict[str, int | str]) -> Iterator[str]:
    """Yield a fault for each tensor of an IP-Adapter that the UNet lacks or has in another shape."""
    unet = manifest.components["unet"]
    if takes_image_prompt(unet) or IMAGE_ENCODER in manifest.components:
        tensors = tuple(tensor for tensor in unet.optional_inputs if tensor.name in IMAGE_PROMPT)
        sized = {tensor.name for tensor in tensors} & set(IMAGE_MASKS.values())  # a UNet attends at some of these sizes
        expected = {name: shape for name, shape in IMAGE_PROMPT.items() if name in sized or name not in IMAGE_MASKS.values()}
        yield from _faults("unet.optional_inputs", expected, tensors, known, complete=True)
        count, per_image, images = (known.get(dim) for dim in ("Tokens", "N", "Images"))
        if isinstance(per_image, int) and isinstance(images, int) and count != per_image * images:
            yield f"unet.optional_inputs: {IMAGE_TOKENS} has {count} tokens, expected {per_image} for each of {images} images"
        if IMAGE_ENCODER not in manifest.components:
            yield f"components: {IMAGE_ENCODER} is missing"


def residuals_of(unet: ComponentSpec) -> tuple[TensorSpec, ...]:
    """Return the residuals of ControlNets that a UNet takes."""
    return tuple(tensor for tensor in unet.optional_inputs if is_residual(tensor.name))


def is_residual(name: str) -> bool:
    """Return whether an optional input of a UNet is a residual of ControlNets."""
    return name not in IMAGE_PROMPT and not name.startswith(FEATURE)


def features_of(unet: ComponentSpec) -> tuple[TensorSpec, ...]:
    """Return the features of T2I-Adapters that a UNet takes."""
    return tuple(tensor for tensor in unet.optional_inputs if tensor.name.startswith(FEATURE))


def pixels_of_cell(adapter: ComponentSpec) -> int:
    """Return how many pixels make a side of a cell of a T2I-Adapter's first feature: an image must have whole cells."""
    return divisor_of(adapter.outputs[0].shape[-1])


def takes_image_prompt(unet: ComponentSpec) -> bool:
    """Return whether a UNet has an IP-Adapter."""
    return any(tensor.name == IMAGE_TOKENS for tensor in unet.optional_inputs)


def is_pooled(controlnet: ComponentSpec) -> bool:
    """Return whether a ControlNet's residuals are means over the image (diffusers' global_pool_conditions)."""
    return all(tensor.shape[2:] == (1, 1) for tensor in controlnet.outputs)


def control_types(controlnet: ComponentSpec) -> int | None:
    """Return how many types of images a ControlNet-Union reads; None for a ControlNet that reads one."""
    widths = [tensor.shape[1] for tensor in controlnet.inputs if tensor.name == CONTROL_TYPE and len(tensor.shape) == 2]
    return widths[0] if widths and isinstance(widths[0], int) else None


def has_posterior(encoder: ComponentSpec) -> bool:
    """Return whether a VAE's encoder returns a distribution, of which an image takes a draw."""
    return any(tensor.name == LOGVAR for tensor in encoder.outputs)


def _faults(
    where: str, expected: Tensors, tensors: tuple[TensorSpec, ...], known: dict[str, int | str], *, complete: bool
) -> Iterator[str]:
    """Yield a fault for each difference. `known` collects the capital dimensions. `complete`: no other tensors are allowed."""
    by_name = {tensor.name: tensor for tensor in tensors}
    if complete:
        yield from (f"{where}: {name} is not a tensor of the pipeline" for name in by_name if name not in expected)
    for name, shape in expected.items():
        tensor = by_name.get(name)
        if tensor is None:
            yield f"{where}: {name} is missing"
        elif tensor.dtype != ("int32" if name == "input_ids" else "float32") or not _fits(tensor.shape, shape, known):
            dims = ", ".join(str(known.get(str(dim), dim)) for dim in shape)
            yield f"{where}: {name} is {tensor.dtype} [{', '.join(map(str, tensor.shape))}], expected [{dims}]"


def _fits(shape: Shape, expected: Shape, known: dict[str, int | str]) -> bool:
    if len(shape) != len(expected):
        return False
    return all(
        size == (known.setdefault(dim, size) if isinstance(dim, str) and dim[0].isupper() else dim)
        for size, dim in zip(shape, expected, strict=True)
    )
