"""List the keys of config.json for each class of network, with their defaults and the supported values.

A key is *read* (the traced network or the runtime uses it) or *idle* (it affects no image). Unsupported values and unknown keys
are refused by name. Keep equal to diffusers' UNet2DConditionModel and AutoencoderKL and transformers' CLIPTextConfig:
tests/sdexport/checkpoint/test_configs.py compares keys and defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdexport.checkpoint.pipelines import ASYMMETRIC_VAE, SCORE, TINY_VAE
from sdruntime.bundle.limits import NOISE_LEVELS
from sdruntime.bundle.tasks import SCORED, SIZES, task_for

REQUIRED = object()  # in place of a default: the file must have the key

# limits beyond any trained network, which keep a damaged config from requesting hours of work
_WIDEST, _DEEPEST, _LONGEST, _VOCABULARY = 1 << 16, 64, 1 << 14, 1 << 22


@dataclass(frozen=True, slots=True)
class Values:
    """The supported values of a key, and their description in messages."""

    named: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Values) -> Values:
        return Values(f"{self.named} or {other.named}", lambda value: self.holds(value) or other.holds(value))


def _whole(low: int, high: int) -> Values:
    return Values(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def _number(low: float, high: float) -> Values:
    return Values(
        f"a number from {low:g} to {high:g}",
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high,
    )


def _one_of(*values: Any) -> Values:
    names = {None: "null", True: "true", False: "false"}
    named = ", ".join(names.get(value, str(value)) for value in values)
    return Values(named, lambda value: any(type(value) is type(known) and value == known for known in values))


def _list_of(item: Values) -> Values:
    holds = item.holds
    return Values(
        f"a list, each {item.named}",
        lambda value: isinstance(value, list) and 0 < len(value) <= _DEEPEST and all(map(holds, value)),
    )


_WIDTH, _DEPTH, _NULL = _whole(1, _WIDEST), _whole(1, _DEEPEST), _one_of(None)
_FLAG, _OFF = _one_of(True, False, None), _one_of(False, None)  # the classes treat null as false
_EPSILON, _FACTOR = _number(1e-12, 1.0), _number(1e-6, 1e6)
_LAYERS = _whole(0, _DEEPEST)
_ACTIVATIONS = _one_of("silu", "swish", "mish", "gelu", "relu")
_SIDE = _whole(1, _LONGEST)
_ANYTHING = Values("anything", lambda value: True)


@dataclass(frozen=True, slots=True)
class Key:
    """A key that is read. With `per_block`, the value applies to every block, or is a list with one value for each."""

    default: Any
    values: Values
    per_block: bool = False

    @property
    def accepted(self) -> Values:
        return self.values | _list_of(self.values) if self.per_block else self.values


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of a class: those that are read, and `idle` ones. Keys that begin with "_" are always idle."""

    read: Mapping[str, Key]
    idle: frozenset[str]


_UNET = Config(
    read={
        "sample_size": Key(REQUIRED, _SIDE | Values("a pair of them", lambda value: _is_pair(value))),
        "in_channels": Key(4, _WIDTH),
        "out_channels": Key(4, _WIDTH),
        "center_input_sample": Key(False, _FLAG),
        "flip_sin_to_cos": Key(True, _FLAG),
        "freq_shift": Key(0, _number(-1e3, 1e3)),
        "down_block_types": Key(
            ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            _list_of(_one_of("CrossAttnDownBlock2D", "DownBlock2D")),
        ),
        "mid_block_type": Key("UNetMidBlock2DCrossAttn", _one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)),
        "up_block_types": Key(
            ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            _list_of(_one_of("CrossAttnUpBlock2D", "UpBlock2D")),
        ),
        "only_cross_attention": Key(False, _FLAG, per_block=True),
        "block_out_channels": Key([320, 640, 1280, 1280], _list_of(_WIDTH)),
        "layers_per_block": Key(2, _DEPTH, per_block=True),
        "downsample_padding": Key(1, _one_of(1)),  # with 0 the padding is uneven, and sizes no longer double in the up blocks
        "mid_block_scale_factor": Key(1, _FACTOR),
        "act_fn": Key("silu", _ACTIVATIONS),
        "norm_num_groups": Key(32, _WIDTH),
        "norm_eps": Key(1e-5, _EPSILON),
        "cross_attention_dim": Key(1280, _WIDTH, per_block=True),
        "transformer_layers_per_block": Key(1, _LAYERS | _list_of(_LAYERS), per_block=True),
        "reverse_transformer_layers_per_block": Key(None, _NULL | _list_of(_LAYERS | _list_of(_LAYERS))),
        "encoder_hid_dim": Key(None, _NULL | _WIDTH),
        "encoder_hid_dim_type": Key(None, _one_of(None, "text_proj")),  # the others take an image's embedding
        "attention_head_dim": Key(8, _WIDTH, per_block=True),
        "num_attention_heads": Key(None, _NULL),  # diffusers refuses others too and uses attention_head_dim instead
        "dual_cross_attention": Key(False, _OFF),  # takes two conditions in one
        "use_linear_projection": Key(False, _FLAG),
        "class_embed_type": Key(None, _NULL),  # takes class labels, which no Stable Diffusion pipeline feeds
        "addition_embed_type": Key(None, _one_of(None, "text_time")),
        "addition_time_embed_dim": Key(None, _NULL | _WIDTH),
        "num_class_embeds": Key(None, _NULL | _whole(1, NOISE_LEVELS)),  # levels of noise, of upscaling models
        "upcast_attention": Key(False, _FLAG),
        "resnet_time_scale_shift": Key("default", _one_of("default", "scale_shift")),
        "resnet_skip_time_act": Key(False, _FLAG),
        "resnet_out_scale_factor": Key(1.0, _FACTOR),
        "time_embedding_type": Key("positional", _one_of("positional", "fourier")),
        "time_embedding_dim": Key(None, _NULL | _WIDTH),
        "time_embedding_act_fn": Key(None, _NULL | _ACTIVATIONS),
        "timestep_post_act": Key(None, _NULL | _ACTIVATIONS),
        "time_cond_proj_dim": Key(None, _NULL | _WIDTH),  # of the embedding of the guidance (latent consistency models)
        "conv_in_kernel": Key(3, _one_of(1, 3, 5, 7, 9)),
        "conv_out_kernel": Key(3, _one_of(1, 3, 5, 7, 9)),
        "projection_class_embeddings_input_dim": Key(None, _NULL | _WIDTH),
        "attention_type": Key("default", _one_of("default")),  # "gated" takes boxes (GLIGEN)
        "class_embeddings_concat": Key(False, _OFF),
        "mid_block_only_cross_attention": Key(None, _FLAG),
        "cross_attention_norm": Key(None, _one_of(None, "layer_norm", "group_norm")),
        "addition_embed_type_num_heads": Key(64, _WIDTH),
    },
    idle=frozenset(
        # keys of training, and those that diffusers' EMAModel.save_pretrained adds
        "dropout decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup".split()
    ),
)
_AUTOENCODER = Config(
    read={
        "in_channels": Key(3, _one_of(3)),
        "out_channels": Key(3, _one_of(3)),
        "down_block_types": Key(["DownEncoderBlock2D"], _list_of(_one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))),
        "up_block_types": Key(["UpDecoderBlock2D"], _list_of(_one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"))),
        "block_out_channels": Key([64], _list_of(_WIDTH)),
        "layers_per_block": Key(1, _DEPTH),
        "act_fn": Key("silu", _ACTIVATIONS),
        "latent_channels": Key(4, _WIDTH),
        "norm_num_groups": Key(32, _WIDTH),
        "scaling_factor": Key(0.18215, _FACTOR),
        "latents_mean": Key(None, _NULL | _list_of(_number(-1e6, 1e6))),
        "latents_std": Key(None, _NULL | _list_of(_FACTOR)),
        "use_quant_conv": Key(True, _FLAG),
        "use_post_quant_conv": Key(True, _FLAG),
        "mid_block_add_attention": Key(True, _FLAG),
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
        "in_channels": Key(3, _one_of(3)),
        "out_channels": Key(3, _one_of(3)),
        "encoder_block_out_channels": Key([64, 64, 64, 64], _list_of(_WIDTH)),
        "decoder_block_out_channels": Key([64, 64, 64, 64], _list_of(_WIDTH)),
        "act_fn": Key("relu", _ACTIVATIONS),
        "upsample_fn": Key("nearest", _one_of("nearest")),
        "latent_channels": Key(4, _WIDTH),
        "upsampling_scaling_factor": Key(2, _one_of(2)),
        "num_encoder_blocks": Key([1, 3, 3, 3], _list_of(_DEPTH)),
        "num_decoder_blocks": Key([3, 3, 3, 1], _list_of(_DEPTH)),
        "scaling_factor": Key(1.0, _FACTOR),
    },
    # latent_magnitude and latent_shift are for storing latents as images; block_out_channels repeats the decoder's
    idle=frozenset({"latent_magnitude", "latent_shift", "force_upcast", "shift_factor", "block_out_channels"}),
)
_ASYMMETRIC = Config(
    read={key: _AUTOENCODER.read[key] for key in _AUTOENCODER.read if key not in _NOT_ASYMMETRIC}
    | {
        "down_block_out_channels": Key([64], _list_of(_WIDTH)),
        "layers_per_down_block": Key(1, _DEPTH),
        "up_block_out_channels": Key([64], _list_of(_WIDTH)),
        "layers_per_up_block": Key(1, _DEPTH),
    },
    idle=frozenset({"sample_size", "force_upcast", "block_out_channels"}),  # the last one repeats the decoder's
)
_TEXT = Config(
    read={
        "vocab_size": Key(49408, _whole(1, _VOCABULARY)),
        "hidden_size": Key(512, _WIDTH),
        "intermediate_size": Key(2048, _WIDTH),
        "projection_dim": Key(512, _NULL | _WIDTH),
        "num_hidden_layers": Key(12, _DEPTH),
        "num_attention_heads": Key(8, _WIDTH),
        "max_position_embeddings": Key(77, _SIDE),
        "hidden_act": Key("quick_gelu", _one_of("quick_gelu", "gelu", "gelu_new", "relu", "silu")),
        "layer_norm_eps": Key(1e-5, _EPSILON),
        "pad_token_id": Key(1, _ANYTHING),
        "bos_token_id": Key(49406, _ANYTHING),
        "eos_token_id": Key(49407, _whole(0, _VOCABULARY)),
        "use_attention_mask": Key(False, _OFF),  # if true, StableDiffusionPipeline masks the padding
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
CONFIGS: Mapping[str, Config] = {
    "UNet2DConditionModel": _UNET,
    "AutoencoderKL": _AUTOENCODER,
    TINY_VAE: _TINY,
    ASYMMETRIC_VAE: _ASYMMETRIC,
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
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
    return isinstance(value, list) and len(value) == 2 and all(map(_SIDE.holds, value))


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
    for required in {text_width(unet)} if unet["encoder_hid_dim"] else set(_as_list(unet["cross_attention_dim"])):
        if required != width:
            key = "encoder_hid_dim" if unet["encoder_hid_dim"] else "cross_attention_dim"
            yield f"unet/config.json: {key} {required}, but the text's embedding is {width} wide ({' and '.join(encoders)})"
    for part in encoders:
        if configs[part]["hidden_size"] % configs[part]["num_attention_heads"]:
            yield f"{part}/config.json: hidden_size is not a multiple of num_attention_heads"
    if xl and added == expected:
        ids = SCORED if scored else SIZES
        times, stated = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
        computed = None if times is None else ids * times + configs["text_encoder_2"]["projection_dim"]
        if computed is None or computed != stated:
            yield (
                f"unet/config.json: projection_class_embeddings_input_dim is {stated}, but {ids} * addition_time_embed_dim "
                f"{times} + text_encoder_2's projection_dim {configs['text_encoder_2']['projection_dim']} is {computed}"
            )


def _unet_misfits(unet: Mapping[str, Any]) -> Iterator[str]:
    lists = [key for key, entry in _UNET.read.items() if entry.per_block and isinstance(unet[key], list)]
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


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def text_width(unet: Mapping[str, Any]) -> int:
    """Return the width of a UNet's encoder_hidden_states: that of its own projection, if it has one."""
    width: int = unet["encoder_hid_dim"] or max(_as_list(unet["cross_attention_dim"]))
    return width


def default_size(unet: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Return the default (height, width) of images, in pixels."""
    height, width = unet["sample_size"] if isinstance(unet["sample_size"], list) else (unet["sample_size"],) * 2
    return height * factor, width * factor
