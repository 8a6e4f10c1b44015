"""A tiny random IP-Adapter for a tiny checkpoint, in the layout of the published ones, with its image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

AdapterKind = Literal["plain", "plus", "full"]
SIDE, PATCH, WIDTH, EMBEDDING = 32, 8, 32, 24  # of the image encoder
TOKENS = 4  # of the kind plus: queries of its resampler


def write_ip_adapter(folder: Path, checkpoint: Path, kind: AdapterKind = "plain", *, seed: int = 21) -> Path:
    """Write adapter.safetensors and image_encoder/ for the UNet of a checkpoint; return the file."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            projection_dim=EMBEDDING,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
        )
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    encoder.eval().save_pretrained(folder / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", low_cpu_mem_usage=False)
    width: int = unet.config["cross_attention_dim"]
    tensors = {f"image_proj.{name}": tensor for name, tensor in _projection(kind, width).items()}
    cross = [name for name in unet.attn_processors if "attn2" in name]  # in diffusers' order, which the numbers follow
    for number, name in enumerate(cross):
        rows = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(rows, width) * 0.5
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def _projection(kind: AdapterKind, width: int) -> dict[str, Any]:
    import torch

    def linear(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns) / columns**0.5

    def norm(name: str, size: int) -> dict[str, Any]:
        return {f"{name}.weight": 1 + 0.1 * torch.randn(size), f"{name}.bias": 0.1 * torch.randn(size)}

    def biased(name: str, rows: int, columns: int) -> dict[str, Any]:
        return {f"{name}.weight": linear(rows, columns), f"{name}.bias": 0.1 * torch.randn(rows)}

    if kind == "plain":
        return {**biased("proj", 4 * width, EMBEDDING), **norm("norm", width)}
    if kind == "full":
        return {**biased("proj.0", WIDTH, WIDTH), **biased("proj.2", width, WIDTH), **norm("proj.3", width)}
    hidden = 64
    projection = {"latents": torch.randn(1, TOKENS, hidden) / 8}
    projection |= {**biased("proj_in", hidden, WIDTH), **biased("proj_out", width, hidden), **norm("norm_out", width)}
    for layer in range(4):
        attention, feed = f"layers.{layer}.0", f"layers.{layer}.1"
        projection |= {**norm(f"{attention}.norm1", hidden), **norm(f"{attention}.norm2", hidden), **norm(f"{feed}.0", hidden)}
        projection |= {
            f"{attention}.to_q.weight": linear(64, hidden),
            f"{attention}.to_kv.weight": linear(128, hidden),
            f"{attention}.to_out.weight": linear(hidden, 64),
            f"{feed}.1.weight": linear(4 * hidden, hidden),
            f"{feed}.3.weight": linear(hidden, 4 * hidden),
        }
    return projection
