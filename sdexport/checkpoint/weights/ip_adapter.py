"""Read an IP-Adapter (arXiv 2308.06721): a projection of an image's embedding to tokens, and the weights that attend to them.

The tensors get diffusers' names. In the file, the layers of the UNet have odd numbers, in diffusers' order: the blocks downwards,
those upwards, the middle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdexport.checkpoint.weights.safetensors import StoredTensor, read_header
from sdexport.checkpoint.weights.torch_file.file import REFUSED_PICKLE, is_torch_file
from sdexport.errors import CheckpointError
from sdruntime.errors import plain

Tensors = Mapping[str, StoredTensor]
PROJECTION = "projection."  # of the names of its weights in the component image_encoder
_TOKENS = 4  # of a plain adapter
_HEAD = 64  # width of a head of the resampler
_DEPTH = 4  # blocks of the resampler
_PLACES = ("down_blocks", "up_blocks", "mid_block")
_TO_K = ".attn2.to_k.weight"
_CROSS = "CrossAttn"  # in the type of a block of a UNet with cross-attentions


@dataclass(frozen=True, slots=True, kw_only=True)
class IpAdapter:
    """An adapter. `projection`: its settings, "kind" (plain, plus, full), "tokens" (0: one for each position of the image
    encoder), "input" and "width", and of plus "hidden" and "heads". `image`: the weights of the projection, by name. `layers`:
    the two weights of each cross-attention, to_k and to_v, in the file's order.
    """

    path: Path
    projection: Mapping[str, Any]
    image: Tensors
    layers: tuple[tuple[StoredTensor, StoredTensor], ...]

    def weights(self, unet: Tensors) -> dict[str, StoredTensor]:
        """Return the weights for a UNet, by name. Raises CheckpointError for the adapter of another model."""
        places = attentions(unet)
        ours = [tuple(tensor.shape for tensor in pair) for pair in self.layers]
        width = self.projection["width"]
        theirs = [((unet[f"{place}.to_k.weight"].shape[0], width),) * 2 for place in places]
        if any(unet[f"{place}.to_k.weight"].shape[1:] != (width,) for place in places):
            widths = sorted({unet[f"{place}.to_k.weight"].shape[1] for place in places})
            raise CheckpointError(
                self.path,
                [f"its tokens are {width} wide, those of the UNet {', '.join(map(str, widths))}: it is for another base model"],
            )
        if ours != theirs:
            at = next((k for k, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            what = f"{len(ours)} layers, the UNet has {len(theirs)}" if at is None else f"layer {at + 1} of another width"
            raise CheckpointError(self.path, [f"the adapter has {what}: it is for another base model"])
        return {
            name(place, letter): tensor
            for place, pair in zip(places, self.layers, strict=True)
            for letter, tensor in zip("kv", pair, strict=True)
        }


def name(place: str, letter: str) -> str:
    """Return the name of an adapter's weight for the attention at `place` of the UNet: "k" or "v"."""
    return f"{place}.processor.to_{letter}_ip.0.weight"


def attentions(names: Iterable[str]) -> list[str]:
    """Return the cross-attentions of a UNet in the order in which an adapter has them, from the names of its weights."""
    places = [weight.removesuffix(".to_k.weight") for weight in names if weight.endswith(_TO_K)]
    return sorted(
        places, key=lambda place: (_PLACES.index(place.split(".")[0]), [int(number) for number in re.findall(r"\.(\d+)", place)])
    )


def divisor(place: str, levels: int) -> int:
    """Return by which number the latents' sides are divided for the attention at `place` of a UNet with so many levels."""
    blocks, *numbers = place.split(".")
    level = levels - 1 if blocks == "mid_block" else int(numbers[0])
    return 1 << (levels - 1 - level if blocks == "up_blocks" else level)


def attention_divisors(config: Mapping[str, Any]) -> list[int]:
    """Return the `divisor` of each size of the cross-attentions of a UNet, from its config."""
    kinds = {"down_blocks": config["down_block_types"], "up_blocks": config["up_block_types"]}
    places = [f"{blocks}.{k}" for blocks, types in kinds.items() for k, kind in enumerate(types) if _CROSS in kind]
    middle = ["mid_block"] if _CROSS in (config["mid_block_type"] or "") else []
    return sorted({divisor(place, len(kinds["down_blocks"])) for place in (*places, *middle)})


def read_ip_adapter(path: Path) -> IpAdapter:
    """Read a .safetensors file. Raises CheckpointError with what is wrong, also for kinds that are not supported."""
    try:
        if is_torch_file(path):
            other = "use the adapter's .safetensors file"
            raise CheckpointError(path, [f"{REFUSED_PICKLE.split(':', maxsplit=1)[0]}: {other}"])
        tensors = read_header(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(path, [f"--ip-adapter: {plain(error)}"]) from error
    image = {key.removeprefix("image_proj."): tensor for key, tensor in tensors.items() if key.startswith("image_proj.")}
    layers = {key.removeprefix("ip_adapter."): tensor for key, tensor in tensors.items() if key.startswith("ip_adapter.")}
    if not image or not layers:
        raise CheckpointError(path, ["not an IP-Adapter: it has no tensors image_proj.… and ip_adapter.…"])
    if fault := _unsupported(image, layers):
        raise CheckpointError(path, [f"{fault}, which is not supported"])
    try:
        numbers = sorted({int(key.split(".")[0]) for key in layers})
        pairs = tuple((layers[f"{number}.to_k_ip.weight"], layers[f"{number}.to_v_ip.weight"]) for number in numbers)
        projection, named = _projection(image)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(path, [f"not an IP-Adapter of a known kind: {plain(error)}"]) from error
    renamed = {PROJECTION + key: tensor for key, tensor in named.items()}
    return IpAdapter(path=path, projection=projection, image=renamed, layers=pairs)


def _unsupported(image: Tensors, layers: Tensors) -> str:
    if any(key.startswith("perceiver_resampler.") for key in image) or ("proj.2.weight" in image and "norm.weight" in image):
        return "an IP-Adapter FaceID: it takes the embedding of a face recogniser"
    return "an IP-Adapter with a LoRA" if any("lora" in key for key in layers) else ""


def _projection(image: Tensors) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the settings of a projection, and its weights by diffusers' names."""
    if "proj.weight" in image:
        rows, width = image["proj.weight"].shape
        settings = {"kind": "plain", "tokens": _TOKENS, "input": width, "width": rows // _TOKENS}
        return settings, {re.sub(r"^proj\.", "image_embeds.", key): tensor for key, tensor in image.items()}
    if "proj.3.weight" in image:
        settings = {
            "kind": "full",
            "tokens": 0,
            "input": image["proj.0.weight"].shape[0],
            "width": image["proj.3.weight"].shape[0],
        }
        names = {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"}
        return settings, {names[key.rpartition(".")[0]] + "." + key.rpartition(".")[2]: tensor for key, tensor in image.items()}
    hidden, width = image["proj_in.weight"].shape
    query = next(key for key in image if re.fullmatch(r"layers\.0\.(0|attn)\.to_q\.weight", key))
    settings = {
        "kind": "plus",
        "tokens": image["latents"].shape[1],
        "input": width,
        "width": image["proj_out.weight"].shape[0],
        "hidden": hidden,
        "heads": image[query].shape[0] // _HEAD,
    }
    if {key.split(".")[1] for key in image if key.startswith("layers.")} != {str(layer) for layer in range(_DEPTH)}:
        raise ValueError(f"its resampler has not {_DEPTH} layers")
    return settings, dict(_resampler(image))


def _resampler(image: Tensors) -> Iterator[tuple[str, StoredTensor]]:
    inner = {"0.norm1": "ln0", "0.norm2": "ln1", "1.0": "ff.0", "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2"}
    for key, tensor in image.items():
        match = re.fullmatch(r"layers\.(\d)\.(.+)\.(weight|bias)", key)
        if match is None:
            yield key, tensor
            continue
        layer, place, last = match.groups()
        if place.endswith("to_kv"):
            for index, letter in enumerate("kv"):
                yield f"layers.{layer}.attn.to_{letter}.{last}", tensor.rows(index, 2)
        elif place in inner or place.startswith(("ln", "ff.")):
            yield f"layers.{layer}.{inner.get(place, place)}.{last}", tensor
        elif place.endswith(("to_q", "to_out", "to_k", "to_v")):
            yield f"layers.{layer}.attn.{place.rpartition('.')[2].replace('to_out', 'to_out.0')}.{last}", tensor
        else:
            raise ValueError(f"{key:.60} is not a weight of a resampler")
