"""Settings of networks that do not fit each other, and what follows from several of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdexport.checkpoint.configs.controlnet import as_list
from sdexport.checkpoint.configs.tables import IMAGE_PROJECTION, UNET
from sdexport.checkpoint.pipelines import SCORE
from sdruntime.bundle.tasks import SCORED, SIZES, task_for


def preview_misfits(preview: Mapping[str, Any], vae: Mapping[str, Any]) -> Iterator[str]:
    """Yield a fault for each setting of a tiny VAE that does not let its decoder show the latents of `vae`."""
    if preview["latent_channels"] != vae["latent_channels"]:
        yield (
            f"preview_vae/config.json: latent_channels {preview['latent_channels']}, but the VAE has {vae['latent_channels']}: "
            "use the tiny VAE of this model's family"
        )
    if preview["scaling_factor"] != 1:
        factor = preview["scaling_factor"]
        yield f"preview_vae/config.json: scaling_factor {factor}, but a decoder of previews takes the UNet's latents, so 1"


def image_encoder_misfits(encoder: Mapping[str, Any]) -> Iterator[str]:
    """Yield a fault if an IP-Adapter's projection does not take what the image encoder returns."""
    projection = encoder[IMAGE_PROJECTION]
    key = "projection_dim" if projection["kind"] == "plain" else "hidden_size"
    if encoder[key] != projection["input"]:
        yield (
            f"image_encoder/config.json: {key} {encoder[key]}, but the IP-Adapter was trained with an image encoder of "
            f"{projection['input']}: give that one (--image-encoder DIR)"
        )
    if encoder["image_size"] % encoder["patch_size"]:
        side, patch = encoder["image_size"], encoder["patch_size"]
        yield f"image_encoder/config.json: image_size {side} is not a multiple of patch_size {patch}"
    if encoder["hidden_size"] % encoder["num_attention_heads"]:
        yield f"image_encoder/config.json: hidden_size {encoder['hidden_size']} is not a multiple of num_attention_heads"


def misfits(configs: Mapping[str, Mapping[str, Any]], *, scored: bool) -> Iterator[str]:
    """Yield a fault for each pair of settings that do not fit each other.

    `configs` has the settings of each part as `read_config` returns them. `scored`: the UNet takes an aesthetic score.
    """
    unet, vae, xl = configs["unet"], configs["vae"], "text_encoder_2" in configs
    yield from _unet_misfits(unet)
    yield from _vae_misfits(vae)
    added, expected = unet["addition_embed_type"], "text_time" if xl else None
    if added != expected:
        yield f"unet/config.json: addition_embed_type is {added!r}, but this pipeline's is {expected!r}"
    if scored and not xl:
        yield f"model_index.json: {SCORE} is true, but only pipelines of Stable Diffusion XL take a score"
    try:
        task = task_for(unet["in_channels"], vae["latent_channels"])
        if task in ("depth", "upscaling") and xl:
            what = "takes a depth map" if task == "depth" else "enlarges an image"
            yield f"unet/config.json: in_channels {unet['in_channels']}: no pipeline of Stable Diffusion XL {what}"
        if (task == "upscaling") != (unet["num_class_embeds"] is not None):
            yield (
                f"unet/config.json: in_channels {unet['in_channels']}, but num_class_embeds is {unet['num_class_embeds']}: the "
                "UNet of an upscaling model takes the image to enlarge (3 channels) and the level of its noise, others neither"
            )
    except ValueError as error:
        yield f"unet/config.json: {error}"
    if unet["out_channels"] != vae["latent_channels"]:
        yield (
            f"unet/config.json: out_channels {unet['out_channels']}, but the VAE has latent_channels {vae['latent_channels']}: "
            "they must be equal"
        )
    for key in ("latents_mean", "latents_std"):
        if vae.get(key) is not None and len(vae[key]) != vae["latent_channels"]:
            yield f"vae/config.json: {key} has {len(vae[key])} numbers for {vae['latent_channels']} latent channels"
    encoders = [part for part in ("text_encoder", "text_encoder_2") if part in configs]
    width = sum(configs[part]["hidden_size"] for part in encoders)
    for required in {text_width(unet)} if unet["encoder_hid_dim"] else set(as_list(unet["cross_attention_dim"])):
        if required != width:
            key = "encoder_hid_dim" if unet["encoder_hid_dim"] else "cross_attention_dim"
            yield f"unet/config.json: {key} {required}, but the text's embedding is {width} wide ({' and '.join(encoders)})"
    for part in encoders:
        if configs[part]["hidden_size"] % configs[part]["num_attention_heads"]:
            yield f"{part}/config.json: hidden_size is not a multiple of num_attention_heads"
        if xl and configs[part]["num_hidden_layers"] < 2:
            yield f"{part}/config.json: num_hidden_layers is less than 2: SDXL takes the output of the last layer but one"
    if xl and added == expected:
        ids = SCORED if scored else SIZES
        times, stated = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
        pooled = configs["text_encoder_2"]["projection_dim"]
        computed = None if times is None or pooled is None else ids * times + pooled
        if pooled is None:
            yield "text_encoder_2/config.json: projection_dim is null: SDXL takes the projected text"
        elif computed is None or computed != stated:
            yield (
                f"unet/config.json: projection_class_embeddings_input_dim is {stated}, but {ids} * addition_time_embed_dim "
                f"{times} + text_encoder_2's projection_dim {pooled} is {computed}"
            )


def _unet_misfits(unet: Mapping[str, Any]) -> Iterator[str]:
    lists = [key for key, entry in UNET.read.items() if entry.per_block and isinstance(unet[key], list)]
    yield from _lengths("unet", unet, ("down_block_types", "up_block_types", *lists))
    if unet["encoder_hid_dim"] and isinstance(unet["cross_attention_dim"], list):
        yield "unet/config.json: cross_attention_dim is a list, but encoder_hid_dim projects to one width"
    if unet["encoder_hid_dim_type"] and not unet["encoder_hid_dim"]:
        yield f"unet/config.json: encoder_hid_dim_type {unet['encoder_hid_dim_type']!r} needs encoder_hid_dim"


def _vae_misfits(vae: Mapping[str, Any]) -> Iterator[str]:
    if "block_out_channels" in vae:
        yield from _lengths("vae", vae, ("down_block_types", "up_block_types"))
        return
    if "up_block_out_channels" in vae:
        for way in ("down", "up"):
            widths = {**vae, "block_out_channels": vae[f"{way}_block_out_channels"]}
            yield from _lengths("vae", widths, ("down_block_types", "up_block_types"))
        return
    lists = ("encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks")
    if len({len(vae[key]) for key in lists}) > 1:
        yield f"vae/config.json: {', '.join(f'{key} has {len(vae[key])}' for key in lists)} entries: they must be equally many"


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Return how many pixels a side of a latent cell is."""
    keys = ("block_out_channels", "decoder_block_out_channels", "up_block_out_channels")
    widths: list[int] = next(vae[key] for key in keys if key in vae)
    return 1 << (len(widths) - 1)


def _lengths(part: str, config: Mapping[str, Any], lists: tuple[str, ...]) -> Iterator[str]:
    blocks = len(config["block_out_channels"])
    for key in lists:
        if len(config[key]) != blocks:
            yield f"{part}/config.json: {key} has {len(config[key])} entries for {blocks} block_out_channels"
    groups = config["norm_num_groups"]
    for width in dict.fromkeys(config["block_out_channels"]):
        if width % groups:
            yield f"{part}/config.json: block_out_channels {width} is not a multiple of norm_num_groups {groups}"


def text_width(unet: Mapping[str, Any]) -> int:
    """Return the width of a UNet's encoder_hidden_states: that of its own projection, if it has one."""
    width: int = unet["encoder_hid_dim"] or max(as_list(unet["cross_attention_dim"]))
    return width


def default_size(unet: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Return the default (height, width) of images, in pixels."""
    height, width = unet["sample_size"] if isinstance(unet["sample_size"], list) else (unet["sample_size"],) * 2
    return height * factor, width * factor
