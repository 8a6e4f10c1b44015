"""List the keys of config.json for each class of network, with their defaults and the supported values.

A key is *read* (the traced network or the runtime uses it) or *idle* (it affects no image). Unsupported values and unknown keys
are refused by name. Keep equal to diffusers' UNet2DConditionModel, AutoencoderKL, ControlNetModel and T2IAdapter, and to
transformers' CLIPTextConfig and CLIPVisionConfig: tests/sdexport/checkpoint/test_configs.py compares keys and defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdexport.checkpoint.configs.keys import (
    ACTIVATIONS,
    ANYTHING,
    DEPTH,
    EPSILON,
    FACTOR,
    FLAG,
    LAYERS,
    NULL,
    OFF,
    REQUIRED,
    SIDE,
    VOCABULARY,
    WIDTH,
    Config,
    Key,
    Values,
    list_of,
    number,
    one_of,
    whole,
)
from sdexport.checkpoint.pipelines import ASYMMETRIC_VAE, CONTROLNET, CONTROLNET_UNION, IMAGE_ENCODER_CLASS, T2I_ADAPTER, TINY_VAE
from sdruntime.bundle.limits import NOISE_LEVELS

UNET = Config(
    read={
        "sample_size": Key(REQUIRED, SIDE | Values("a pair of them", lambda value: _is_pair(value))),
        "in_channels": Key(4, WIDTH),
        "out_channels": Key(4, WIDTH),
        "center_input_sample": Key(False, FLAG),
        "flip_sin_to_cos": Key(True, FLAG),
        "freq_shift": Key(0, number(-1e3, 1e3)),
        "down_block_types": Key(
            ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            list_of(one_of("CrossAttnDownBlock2D", "DownBlock2D")),
        ),
        "mid_block_type": Key("UNetMidBlock2DCrossAttn", one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)),
        "up_block_types": Key(
            ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            list_of(one_of("CrossAttnUpBlock2D", "UpBlock2D")),
        ),
        "only_cross_attention": Key(False, FLAG, per_block=True),
        "block_out_channels": Key([320, 640, 1280, 1280], list_of(WIDTH)),
        "layers_per_block": Key(2, DEPTH, per_block=True),
        "downsample_padding": Key(1, one_of(1)),  # with 0 the padding is uneven, and sizes no longer double in the up blocks
        "mid_block_scale_factor": Key(1, FACTOR),
        "act_fn": Key("silu", ACTIVATIONS),
        "norm_num_groups": Key(32, WIDTH),
        "norm_eps": Key(1e-5, EPSILON),
        "cross_attention_dim": Key(1280, WIDTH, per_block=True),
        "transformer_layers_per_block": Key(1, LAYERS | list_of(LAYERS), per_block=True),
        "reverse_transformer_layers_per_block": Key(None, NULL | list_of(LAYERS | list_of(LAYERS))),
        "encoder_hid_dim": Key(None, NULL | WIDTH),
        "encoder_hid_dim_type": Key(None, one_of(None, "text_proj")),  # the others take an image's embedding
        "attention_head_dim": Key(8, WIDTH, per_block=True),
        "num_attention_heads": Key(None, NULL),  # diffusers refuses others too and uses attention_head_dim instead
        "dual_cross_attention": Key(False, OFF),  # takes two conditions in one
        "use_linear_projection": Key(False, FLAG),
        "class_embed_type": Key(None, NULL),  # takes class labels, which no Stable Diffusion pipeline feeds
        "addition_embed_type": Key(None, one_of(None, "text_time")),
        "addition_time_embed_dim": Key(None, NULL | WIDTH),
        "num_class_embeds": Key(None, NULL | whole(1, NOISE_LEVELS)),  # levels of noise, of upscaling models
        "upcast_attention": Key(False, FLAG),
        "resnet_time_scale_shift": Key("default", one_of("default", "scale_shift")),
        "resnet_skip_time_act": Key(False, FLAG),
        "resnet_out_scale_factor": Key(1.0, FACTOR),
        "time_embedding_type": Key("positional", one_of("positional", "fourier")),
        "time_embedding_dim": Key(None, NULL | WIDTH),
        "time_embedding_act_fn": Key(None, NULL | ACTIVATIONS),
        "timestep_post_act": Key(None, NULL | ACTIVATIONS),
        "time_cond_proj_dim": Key(None, NULL | WIDTH),  # of the embedding of the guidance (latent consistency models)
        "conv_in_kernel": Key(3, one_of(1, 3, 5, 7, 9)),
        "conv_out_kernel": Key(3, one_of(1, 3, 5, 7, 9)),
        "projection_class_embeddings_input_dim": Key(None, NULL | WIDTH),
        "attention_type": Key("default", one_of("default")),  # "gated" takes boxes (GLIGEN)
        "class_embeddings_concat": Key(False, OFF),
        "mid_block_only_cross_attention": Key(None, FLAG),
        "cross_attention_norm": Key(None, one_of(None, "layer_norm", "group_norm")),
        "addition_embed_type_num_heads": Key(64, WIDTH),
    },
    idle=frozenset(
        # keys of training, and those that diffusers' EMAModel.save_pretrained adds
        "dropout decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup".split()
    ),
)
# as in a UNet: the part of it that a ControlNet copies
_COPIED = (
    *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "only_cross_attention", "block_out_channels"),
    *("layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps"),
    *("cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads"),
    *("use_linear_projection", "class_embed_type", "addition_embed_type", "addition_time_embed_dim", "num_class_embeds"),
    *("upcast_attention", "resnet_time_scale_shift", "projection_class_embeddings_input_dim", "addition_embed_type_num_heads"),
)
_CONTROLNET = Config(
    read={key: UNET.read[key] for key in _COPIED}
    | {
        "mid_block_type": Key("UNetMidBlock2DCrossAttn", one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")),
        "encoder_hid_dim": Key(None, NULL),
        "encoder_hid_dim_type": Key(None, NULL),
        "num_class_embeds": Key(None, NULL),
        "conditioning_channels": Key(3, one_of(3)),  # of the control image
        "controlnet_conditioning_channel_order": Key("rgb", one_of("rgb", "bgr")),
        "conditioning_embedding_out_channels": Key([16, 32, 96, 256], list_of(WIDTH)),
        "global_pool_conditions": Key(False, FLAG),
    },
    idle=frozenset({"sample_size", "out_channels", "up_block_types", "center_input_sample", "dropout"}),  # copied from a UNet
)
_CONTROLNET_UNION = Config(
    read={key: entry for key, entry in _CONTROLNET.read.items() if key != "mid_block_type"}
    | {
        "controlnet_conditioning_channel_order": Key("rgb", one_of("rgb")),
        "conditioning_embedding_out_channels": Key([48, 96, 192, 384], list_of(WIDTH)),
        "num_control_type": Key(6, DEPTH),
        "num_trans_channel": Key(320, WIDTH),
        "num_trans_head": Key(8, WIDTH),
        "num_trans_layer": Key(1, DEPTH),
        "num_proj_channel": Key(320, WIDTH),
    },
    idle=_CONTROLNET.idle | {"mid_block_type"},
)
_T2I_ADAPTER = Config(
    read={
        "in_channels": Key(3, one_of(1, 3)),  # of the control image: gray or RGB
        "channels": Key([320, 640, 1280, 1280], list_of(WIDTH)),
        "num_res_blocks": Key(2, DEPTH),
        "downscale_factor": Key(8, one_of(2, 4, 8, 16)),
        "adapter_type": Key("full_adapter", one_of("full_adapter", "full_adapter_xl", "light_adapter")),
    },
    idle=frozenset(),
)
_AUTOENCODER = Config(
    read={
        "in_channels": Key(3, one_of(3)),
        "out_channels": Key(3, one_of(3)),
        "down_block_types": Key(["DownEncoderBlock2D"], list_of(one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))),
        "up_block_types": Key(["UpDecoderBlock2D"], list_of(one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"))),
        "block_out_channels": Key([64], list_of(WIDTH)),
        "layers_per_block": Key(1, DEPTH),
        "act_fn": Key("silu", ACTIVATIONS),
        "latent_channels": Key(4, WIDTH),
        "norm_num_groups": Key(32, WIDTH),
        "scaling_factor": Key(0.18215, FACTOR),
        "latents_mean": Key(None, NULL | list_of(number(-1e6, 1e6))),
        "latents_std": Key(None, NULL | list_of(FACTOR)),
        "use_quant_conv": Key(True, FLAG),
        "use_post_quant_conv": Key(True, FLAG),
        "mid_block_add_attention": Key(True, FLAG),
    },
    # sample_size is for tiling; shift_factor is for Stable Diffusion 3 and Flux, and the pipelines of 1, 2 and XL ignore it;
    # force_upcast keeps diffusers from running the VAE in float16: the audit decides for each node whether it needs float32
    idle=frozenset({"sample_size", "shift_factor", "force_upcast"}),
)
_NOT_ASYMMETRIC = (
    *("block_out_channels", "layers_per_block", "latents_mean", "latents_std"),
    *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
)
_TINY = Config(
    read={
        "in_channels": Key(3, one_of(3)),
        "out_channels": Key(3, one_of(3)),
        "encoder_block_out_channels": Key([64, 64, 64, 64], list_of(WIDTH)),
        "decoder_block_out_channels": Key([64, 64, 64, 64], list_of(WIDTH)),
        "act_fn": Key("relu", ACTIVATIONS),
        "upsample_fn": Key("nearest", one_of("nearest")),
        "latent_channels": Key(4, WIDTH),
        "upsampling_scaling_factor": Key(2, one_of(2)),
        "num_encoder_blocks": Key([1, 3, 3, 3], list_of(DEPTH)),
        "num_decoder_blocks": Key([3, 3, 3, 1], list_of(DEPTH)),
        "scaling_factor": Key(1.0, FACTOR),
    },
    # latent_magnitude and latent_shift are for storing latents as images; block_out_channels repeats the decoder's
    idle=frozenset({"latent_magnitude", "latent_shift", "force_upcast", "shift_factor", "block_out_channels"}),
)
_ASYMMETRIC = Config(
    read={key: _AUTOENCODER.read[key] for key in _AUTOENCODER.read if key not in _NOT_ASYMMETRIC}
    | {
        "down_block_out_channels": Key([64], list_of(WIDTH)),
        "layers_per_down_block": Key(1, DEPTH),
        "up_block_out_channels": Key([64], list_of(WIDTH)),
        "layers_per_up_block": Key(1, DEPTH),
    },
    idle=frozenset({"sample_size", "force_upcast", "block_out_channels"}),  # the last one repeats the decoder's
)
_TEXT = Config(
    read={
        "vocab_size": Key(49408, whole(1, VOCABULARY)),
        "hidden_size": Key(512, WIDTH),
        "intermediate_size": Key(2048, WIDTH),
        "projection_dim": Key(512, NULL | WIDTH),
        "num_hidden_layers": Key(12, DEPTH),
        "num_attention_heads": Key(8, WIDTH),
        "max_position_embeddings": Key(77, SIDE),
        "hidden_act": Key("quick_gelu", one_of("quick_gelu", "gelu", "gelu_new", "relu", "silu")),
        "layer_norm_eps": Key(1e-5, EPSILON),
        "pad_token_id": Key(1, ANYTHING),
        "bos_token_id": Key(49406, ANYTHING),
        "eos_token_id": Key(49407, whole(0, VOCABULARY)),
        "use_attention_mask": Key(False, OFF),  # if true, StableDiffusionPipeline masks the padding
    },
    # keys of training and saving, and the generation settings that transformers 4 wrote into every config
    idle=frozenset(
        """architectures model_type transformers_version torch_dtype dtype attention_dropout dropout initializer_range
        initializer_factor gradient_checkpointing return_dict use_return_dict output_hidden_states output_attentions torchscript
        use_bfloat16 tf_legacy_loss pruned_heads tie_word_embeddings chunk_size_feed_forward is_encoder_decoder is_decoder
        cross_attention_hidden_size add_cross_attention tie_encoder_decoder finetuning_task id2label label2id problem_type
        tokenizer_class prefix sep_token_id decoder_start_token_id task_specific_params max_length min_length do_sample
        early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
        length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
        return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
        suppress_tokens begin_suppress_tokens attn_implementation""".split()
    ),
)
IMAGE_PROJECTION = "image_projection"  # which sdexport adds to an image encoder's settings: those of the IP-Adapter's projection
_VISION = Config(
    read={
        "hidden_size": Key(768, WIDTH),
        "intermediate_size": Key(3072, WIDTH),
        "projection_dim": Key(512, WIDTH),
        "num_hidden_layers": Key(12, DEPTH),
        "num_attention_heads": Key(12, WIDTH),
        "num_channels": Key(3, one_of(3)),
        "image_size": Key(224, SIDE),
        "patch_size": Key(32, SIDE),
        "hidden_act": _TEXT.read["hidden_act"],
        "layer_norm_eps": Key(1e-5, EPSILON),
        IMAGE_PROJECTION: Key(REQUIRED, ANYTHING),
    },
    idle=_TEXT.idle,
)
CONFIGS: Mapping[str, Config] = {
    "UNet2DConditionModel": UNET,
    "AutoencoderKL": _AUTOENCODER,
    TINY_VAE: _TINY,
    ASYMMETRIC_VAE: _ASYMMETRIC,
    CONTROLNET: _CONTROLNET,
    CONTROLNET_UNION: _CONTROLNET_UNION,
    T2I_ADAPTER: _T2I_ADAPTER,
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
    IMAGE_ENCODER_CLASS: _VISION,
}
# classes whose saved weights hold a CLIP text model under the same names
CLIP_ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
_CLIP_TYPES = ("clip_text_model", "clip")


def read_config(kind: str, written: Mapping[str, Any], where: str, faults: list[str]) -> dict[str, Any]:
    """Return the value of every key that is read for class `kind`, or its default; add a fault for each bad key.

    As in diffusers, the class is the one that model_index.json names, whatever the config itself says.
    """
    table = CONFIGS[kind]
    if table is _TEXT:
        written = _text_config(written, where, faults)
    for key, value in written.items():
        if key not in table.read and key not in table.idle and not key.startswith("_") and value not in (None, False, "", [], {}):
            faults.append(
                f"{where}: {key:.60} {value!r:.60} is not a setting that sdexport knows of a {kind}: the image may depend on it"
            )
    settings = {}
    for key, entry in table.read.items():
        value = settings[key] = written.get(key, entry.default)
        if value is REQUIRED:
            faults.append(f"{where}: {key} is missing")
        elif not entry.accepted.holds(value):
            faults.append(f"{where}: {key} is {value!r:.60}, which is not supported; it must be {entry.accepted.named}")
    return settings


def _text_config(written: Mapping[str, Any], where: str, faults: list[str]) -> Mapping[str, Any]:
    """Return the settings of a CLIP text encoder; a whole CLIPModel has them in text_config (transformers' from_pretrained)."""
    classes = written.get("architectures") or []
    unknown = [name for name in classes if name not in CLIP_ARCHITECTURES] if isinstance(classes, list) else [classes]
    faults.extend(f"{where} is of a {name!s:.60}, not of one of {', '.join(CLIP_ARCHITECTURES)}" for name in unknown)
    model_type = written.get("model_type", _CLIP_TYPES[0])
    if model_type not in _CLIP_TYPES:
        faults.append(f"{where}: model_type {model_type!r} is not one of {', '.join(_CLIP_TYPES)}")
    nested = written.get("text_config")
    return nested if isinstance(nested, dict) else written


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(SIDE.holds, value))
