"""What torch makes of a component's inputs: diffusers' and transformers' own loading and calling, none of sdexport's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def outputs(checkpoint: Path, component: str, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """The component's outputs by their ONNX names. SDXL's text encoders are recognised by the second one beside them."""
    import torch

    tensors = {name: torch.from_numpy(np.array(feed)) for name, feed in feeds.items()}
    with torch.no_grad():
        if component.startswith("text_encoder"):
            found = _text(checkpoint, component, tensors)
        elif component == "unet":
            found = _unet(checkpoint, tensors)
        else:
            found = _vae(checkpoint, component, tensors)
    return {name: tensor.numpy() for name, tensor in found.items()}


def _text(checkpoint: Path, component: str, feeds: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
    encoder = kind.from_pretrained(checkpoint / component).eval()
    output = encoder(feeds["input_ids"].long(), output_hidden_states=True)
    if not (checkpoint / "text_encoder_2").exists():
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        layers = torch.stack([norm(state) for state in output.hidden_states[:-1]], dim=1)
        return {"last_hidden_state": output.last_hidden_state, "layers": layers}
    pooled = {"text_embeds": output.text_embeds} if component == "text_encoder_2" else {}
    return {"hidden_states": output.hidden_states[-2], "layers": torch.stack(output.hidden_states[:-2], dim=1)} | pooled


def _unet(checkpoint: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", low_cpu_mem_usage=False).eval()
    added = {name: feeds[name] for name in ("text_embeds", "time_ids") if name in feeds}
    output = unet(feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"], added_cond_kwargs=added or None)
    return {"out_sample": output.sample}


def _vae(checkpoint: Path, component: str, feeds: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", low_cpu_mem_usage=False).eval()
    if component == "vae_decoder":
        return {"sample": vae.decode(feeds["latent_sample"]).sample}
    posterior = vae.encode(feeds["sample"]).latent_dist
    return {"latent_mean": posterior.mean, "latent_logvar": posterior.logvar}
