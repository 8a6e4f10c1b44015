"""Read and check a checkpoint: its networks, their configs and weights, its tokenizers and its scheduler.

A checkpoint is a diffusers folder, or one file that `original` presents as such a folder. It is read as JSON and weight headers.
No name in it is ever imported (diffusers imports what model_index.json names, GHSA-4prv-5hj7-c2xr). All faults of a
checkpoint are reported at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdexport.checkpoint.configs.controlnet import controlnet_misfits
from sdexport.checkpoint.configs.misfits import default_size, image_encoder_misfits, misfits, preview_misfits, vae_factor
from sdexport.checkpoint.configs.t2i_adapter import adapter_misfits
from sdexport.checkpoint.configs.tables import read_config
from sdexport.checkpoint.defaults import defaults_of
from sdexport.checkpoint.folder import DiffusersFolder
from sdexport.checkpoint.opening import FLOW_SCHEDULERS, SCHEDULERS, check_index, opened_scheduler, opened_unet, without_defaults
from sdexport.checkpoint.original.file import read_single_file
from sdexport.checkpoint.overrides import NO_OVERRIDES, PREVIEW_VAE, Overridden, Overrides
from sdexport.checkpoint.pipelines import (
    ASYMMETRIC_VAE,
    CONTROLNETS,
    IMAGE_ENCODER_CLASS,
    LOW_RES,
    MOST_NOISE,
    OTHERS,
    PARTS,
    SCORE,
    T2I_ADAPTER,
    TINY_VAE,
    UNSUPPORTED,
    Classes,
    parts_of,
    pipeline_of,
)
from sdexport.checkpoint.source import Source
from sdexport.checkpoint.tokenizer import NAMES as TOKENIZER_FILES
from sdexport.checkpoint.tokenizer import StoredTokenizer, read_tokenizer
from sdexport.checkpoint.weights.bounds import check_depth
from sdexport.checkpoint.weights.loras import merged
from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdexport.errors import CheckpointError
from sdruntime.bundle.limits import NOISE_LEVELS
from sdruntime.bundle.manifest import LONGEST_TEXT, Precision
from sdruntime.bundle.model import Family, ModelSpec, PredictionType
from sdruntime.bundle.roles import IMAGE_ENCODER, role
from sdruntime.bundle.tasks import Task, task_for
from sdruntime.errors import SettingError, plain
from sdruntime.pipeline.tasks.upscaling import READS as LOW_RES_READS
from sdruntime.pipeline.tasks.upscaling import SCHEDULER as LOW_RES_SCHEDULER
from sdruntime.pipeline.tasks.upscaling import noise_levels

UPSCALING_FACTOR, MOST_BY_DEFAULT = 0.08333, 350  # of diffusers' StableDiffusionUpscalePipeline
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_BY_TRANSFORMERS = (*_TEXT_ENCODERS, IMAGE_ENCODER)
_NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
_PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A network of the checkpoint: the settings of its config.json, its files, and the location of each weight.

    `files` are by names without this machine's paths.
    """

    config: Mapping[str, Any]
    files: Mapping[str, Path]
    weights: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint, as `read_checkpoint` returns it.

    `scheduler` has the settings of the scheduler in diffusers' open pipeline, and `changes` a line for each setting that the
    pipeline changes when it opens the checkpoint. `adapters` is the digest of the LoRAs that are merged. `pipeline` is that
    pipeline, by its class: the one for the UNet's `task`.
    """

    source: Source
    model: ModelSpec
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, StoredTokenizer]
    text_length: int  # tokens of a text, including start, end and padding
    index: Mapping[str, Any]
    pipeline: str
    task: Task | None
    scheduler: Mapping[str, Any]
    low_res_scheduler: Mapping[str, Any] | None = None  # of the noise in the image that an upscaling model enlarges
    changes: tuple[str, ...] = ()
    overrides: Overrides = NO_OVERRIDES
    adapters: str = ""

    @property
    def vae(self) -> str:
        """The class of the VAE."""
        return str(self.index["vae"][1])

    @property
    def path(self) -> Path:
        """The folder or file."""
        return self.source.path


def read_checkpoint(
    path: Path,
    *,
    name: str,
    precision: Precision = "fp32",
    allow_pickle: bool = False,
    overrides: Overrides = NO_OVERRIDES,
) -> Checkpoint:
    """Read and check a diffusers folder or a single file.

    Of a folder, fp16 prefers the files of the fp16 variant; other precisions prefer the full ones. Raises CheckpointError with
    every fault.
    """
    source: Source
    if path.is_file():
        source = read_single_file(path, allow_pickle=allow_pickle, with_vae=not overrides.vae)
    else:
        source = DiffusersFolder(path, precision, allow_pickle)
    if overrides:
        source = Overridden(source, overrides, precision, allow_pickle=allow_pickle)
    checkpoint = dataclasses.replace(_Reader(source, overrides).read(name), overrides=overrides)
    return _with_loras(checkpoint) if overrides.loras else checkpoint


def _with_loras(checkpoint: Checkpoint) -> Checkpoint:
    weights = {name: part.weights for name, part in checkpoint.parts.items()}
    merged_weights, lines, adapters = merged(weights, checkpoint.overrides.loras, model=checkpoint.model.name)
    parts = {name: dataclasses.replace(part, weights=merged_weights[name]) for name, part in checkpoint.parts.items()}
    changes = (*checkpoint.changes, *lines)
    return dataclasses.replace(checkpoint, parts=MappingProxyType(parts), changes=changes, adapters=adapters)


class _Reader:
    """Read one checkpoint and collect its faults in `faults`. `overrides` names the parts that are added to it."""

    def __init__(self, source: Source, overrides: Overrides) -> None:
        self.source, self._preview, self._controlnets = source, bool(overrides.preview_vae), tuple(overrides.controlnets)
        self._prompted = bool(overrides.ip_adapter)
        self.faults: list[str] = []
        self.changes: list[str] = list(source.inferred)

    def read(self, name: str) -> Checkpoint:
        index = self._json("model_index.json")
        self._stop_at_faults()
        required = parts_of(index)
        if required is None:
            named = index.get("_class_name")
            other = next((model for part, model in OTHERS.items() if part in str(named)), None)
            fault = f"not supported: it is {other}" if other else f"not one of {', '.join(PARTS)}"
            self.faults.append(f"model_index.json: _class_name {named!r:.80} is {fault}")
            raise CheckpointError(self.source.path, self.faults)
        for required_part, classes in required.items():
            self._check_class(index, required_part, classes)
        check_index(index, self.faults)
        task = self._task(index)
        pipeline = pipeline_of(index, task)
        if task == "depth":
            self.changes.append("depth_estimator is not exported: requests give a depth map (--depth)")
        parts = {
            part: self._part(part, self._kind(index, part, classes), pipeline)
            for part, classes in required.items()
            if part in _NETWORKS
        }
        if self._preview:
            parts[PREVIEW_VAE] = self._part(PREVIEW_VAE, self._added_class(PREVIEW_VAE, (TINY_VAE,), "--preview-vae"), pipeline)
        for added in self._controlnets:
            kind, option = ((T2I_ADAPTER,), "--t2i-adapter") if _adapts(added) else (CONTROLNETS, "--controlnet")
            parts[added] = self._part(added, self._added_class(added, kind, option), pipeline)
        if self._prompted:
            parts[IMAGE_ENCODER] = self._part(IMAGE_ENCODER, IMAGE_ENCODER_CLASS, pipeline)
        scheduler = self._scheduler(index, pipeline)
        low_res = self._low_res_scheduler(index) if task == "upscaling" else None
        read = {part: self._tokenizer(part) for part in required if part.startswith("tokenizer")}
        tokenizers = {part: tokenizer for part, tokenizer in read.items() if tokenizer is not None}
        self._stop_at_faults()
        configs = {name: part.config for name, part in parts.items()}
        self.faults.extend(misfits(configs, scored=bool(index.get(SCORE))))
        self._stop_at_faults()
        if self._preview:
            self.faults.extend(preview_misfits(configs[PREVIEW_VAE], configs["vae"]))
        for added in self._controlnets:
            latents, factor = configs["vae"]["latent_channels"], vae_factor(configs["vae"])
            self.faults.extend(
                adapter_misfits(added, configs[added], configs["unet"], factor=factor)
                if _adapts(added)
                else controlnet_misfits(added, configs[added], configs["unet"], latents=latents, factor=factor)
            )
        if self._prompted:
            self.faults.extend(image_encoder_misfits(configs[IMAGE_ENCODER]))
        if task == "inpainting" and index["vae"][1] == ASYMMETRIC_VAE:
            self.faults.append(
                f"model_index.json: vae is {ASYMMETRIC_VAE}, whose decoder takes the image and the mask when inpainting, which "
                "is not supported: use another VAE (--vae)"
            )
        for name_of_part, part in parts.items():
            check_depth(name_of_part, part.config, part.weights, self.faults)
        length = self._text_length(parts, tokenizers)
        self._stop_at_faults()
        model = self._model(name, index, parts, scheduler, next(iter(tokenizers.values())).pad_token)
        return Checkpoint(
            source=self.source,
            model=model,
            parts=MappingProxyType(parts),
            tokenizers=MappingProxyType(tokenizers),
            text_length=length,
            index=MappingProxyType(index),
            pipeline=pipeline,
            task=task,
            scheduler=MappingProxyType(scheduler),
            low_res_scheduler=low_res,
            changes=tuple(self.changes),
        )

    def _task(self, index: Mapping[str, Any]) -> Task | None:
        """Return the UNet's task, which decides the pipeline; the configs report invalid numbers of channels."""
        numbers = []
        for part, key in (("unet", "in_channels"), ("vae", "latent_channels")):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                numbers.append(self.source.document(f"{part}/config.json").get(key, 4))
        with contextlib.suppress(ValueError, TypeError):
            return task_for(*numbers) or ("refining" if index.get(SCORE) else None)
        return None

    def _stop_at_faults(self) -> None:
        if self.faults:
            raise CheckpointError(self.source.path, self.faults)

    def _json(self, path: str) -> dict[str, Any]:
        try:
            document = self.source.document(path)
        except FileNotFoundError:
            self.faults.append(f"{path} is missing")
        except (OSError, ValueError) as error:
            self.faults.append(f"{path} is not readable: {plain(error)}")
        else:
            if isinstance(document, dict):
                return document
            self.faults.append(f"{path} is not a JSON object")
        return {}

    def _check_class(self, index: Mapping[str, Any], name: str, known: tuple[tuple[str, str], ...]) -> None:
        value = index.get(name)
        if not isinstance(value, list) or value not in [[*pair] for pair in known]:
            names = ", ".join(".".join(pair) for pair in known)
            self.faults.append(f"model_index.json: {name} is {value!r}, not one of {names}")

    def _kind(self, index: Mapping[str, Any], name: str, known: Classes) -> str:
        """Return the class that model_index.json names, or the usual one if it names none of the known."""
        return next((kind for library, kind in known if index.get(name) == [library, kind]), known[0][1])

    def _part(self, name: str, kind: str, pipeline: str) -> Part:
        written: Mapping[str, Any] = self._json(f"{name}/config.json")
        if name not in _BY_TRANSFORMERS:
            written = without_defaults(written, f"{name}/config.json", self.faults)
        if name == "unet":
            written, changes = opened_unet(pipeline, written)
            self.changes.extend(changes)
        config = read_config(kind, written, f"{name}/config.json", self.faults) if written else {}
        stored = self.source.weights(name, self.faults)
        return Part(config=config, files=stored.files, weights=stored.tensors)

    def _added_class(self, name: str, kinds: tuple[str, ...], option: str) -> str:
        """Return the class of an added part. Stop if it is another one, whose settings would only be misunderstood."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # which `_part` reports
            named = self.source.document(f"{name}/config.json").get("_class_name")
            if named in kinds:
                return str(named)
            what = f" ({UNSUPPORTED[named]}), which is not supported," if named in UNSUPPORTED else ""
            for other, classes in (("--controlnet", CONTROLNETS), ("--t2i-adapter", (T2I_ADAPTER,))):
                what = f", which is for {other}," if named in classes else what
            self.faults.append(f"{name}/config.json: _class_name {named!r:.80}{what} is not {' or '.join(kinds)} ({option})")
            self._stop_at_faults()
        return kinds[0]

    def _tokenizer(self, name: str) -> StoredTokenizer | None:
        files, before = {}, len(self.faults)
        for file in TOKENIZER_FILES:
            try:
                data = self.source.file(f"{name}/{file}")
            except (OSError, ValueError) as error:
                self.faults.append(f"{name}/{file}: {error}")
                continue
            if data is not None:
                files[file] = data
        if len(self.faults) == before:
            try:
                return read_tokenizer(files)
            except ValueError as error:
                self.faults.append(f"{name}/: {error}")
        return None

    def _text_length(self, parts: Mapping[str, Part], tokenizers: Mapping[str, StoredTokenizer]) -> int:
        """Return the number of tokens that every text encoder takes: its tokenizer's limit, or else all of its positions."""
        lengths = {}
        for encoder, (name, tokenizer) in zip(
            (part for part in parts if part in _TEXT_ENCODERS), tokenizers.items(), strict=True
        ):
            config = parts[encoder].config
            positions, (largest, token) = config.get("max_position_embeddings", 77), tokenizer.largest
            lengths[name] = tokenizer.limit or positions
            if type(positions) is not int or not lengths[name] <= positions <= LONGEST_TEXT:
                self.faults.append(
                    f"{name}: model_max_length {lengths[name]}, but {encoder} has max_position_embeddings {positions!r:.40}: "
                    "set model_max_length in tokenizer_config.json to what the encoder was trained for"
                )
            if type(config["vocab_size"]) is not int or largest >= config["vocab_size"]:
                self.faults.append(
                    f"{name}: the token {token!r:.60} has the id {largest}, but {encoder}/config.json has vocab_size "
                    f"{config['vocab_size']!r:.40}: remove the token, or resize the encoder's embeddings"
                )
        if len(set(lengths.values())) > 1:
            self.faults.append(
                f"{' and '.join(f'{name} takes {length}' for name, length in lengths.items())} tokens: they must be equal"
            )
        return next(iter(lengths.values()))

    def _scheduler(self, index: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
        value, path = index.get("scheduler"), "scheduler/scheduler_config.json"
        if isinstance(value, list) and len(value) == 2 and value[1] in FLOW_SCHEDULERS:
            self.faults.append(
                f"model_index.json: scheduler is {value[1]}, which {pipeline} cannot run, so diffusers has no image "
                "to compare with; for a flow model use UniPCMultistepScheduler, with use_flow_sigmas true and prediction_type "
                "flow_prediction in its config"
            )
            return {}
        self._check_class(index, "scheduler", tuple(("diffusers", scheduler) for scheduler in SCHEDULERS))
        written = self._json(path)
        if not written or not isinstance(value, list) or not value or value[-1] not in SCHEDULERS:
            return {}
        prediction = written.get("prediction_type", "epsilon")
        if prediction not in _PREDICTIONS:
            self.faults.append(f"{path}: prediction_type {prediction!r} is not one of {', '.join(_PREDICTIONS)}")
            return {}
        scheduler, changes = opened_scheduler(pipeline, value[-1], written, self.faults)
        self.changes.extend(changes)
        return scheduler

    def _low_res_scheduler(self, index: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of the scheduler that adds noise to the image to enlarge, as far as they count for that."""
        self._check_class(index, LOW_RES, (("diffusers", "DDPMScheduler"),))
        written = without_defaults(self._json(LOW_RES_SCHEDULER), LOW_RES_SCHEDULER, self.faults)
        config = {key: written.get(key, default) for key, default in LOW_RES_READS.items()}
        try:
            levels = len(noise_levels(config)) if written else NOISE_LEVELS
        except (SettingError, TypeError, ValueError) as error:
            self.faults.append(f"{LOW_RES_SCHEDULER}: {error}")
        else:
            most = index.get(MOST_NOISE, MOST_BY_DEFAULT)
            if type(most) is int and most >= levels:
                self.faults.append(f"model_index.json: {MOST_NOISE} {most}, but {LOW_RES_SCHEDULER} has {levels} levels")
        return config

    def _model(
        self, name: str, index: Mapping[str, Any], parts: Mapping[str, Part], scheduler: Mapping[str, Any], pad_token: str
    ) -> ModelSpec:
        unet, vae = parts["unet"].config, parts["vae"].config
        text = next(parts[part].config for part in _TEXT_ENCODERS if part in parts)
        xl, card = "text_encoder_2" in parts, self.source.card()
        # OpenCLIP's encoder, introduced with SD2, uses plain GELU; CLIP's own uses quick GELU
        family: Family = "sdxl" if xl else "sd2" if text["hidden_act"] == "gelu" else "sd1"
        defaults, reason = defaults_of(unet, scheduler, card)
        scaling, upscales = float(vae["scaling_factor"]), unet["num_class_embeds"] is not None
        if upscales and scaling != UPSCALING_FACTOR:
            self.changes.append(
                f"vae: scaling_factor {scaling:g} becomes {UPSCALING_FACTOR}, as StableDiffusionUpscalePipeline has it"
            )
            scaling = UPSCALING_FACTOR
        if reason:
            self.changes.append(f"defaults: {defaults}: {reason} (--defaults changes them)")
        try:
            factor = vae_factor(vae)
            mean, std = (vae.get(key) or () for key in ("latents_mean", "latents_std"))
            # StableDiffusionXLPipeline uses them if both are set; StableDiffusionPipeline ignores them
            normalized = xl and mean and std
            return ModelSpec(
                name=name,
                family=family,
                prediction_type=scheduler.get("prediction_type") or "epsilon",
                scaling_factor=scaling,
                latents_mean=tuple(map(float, mean)) if normalized else (),
                latents_std=tuple(map(float, std)) if normalized else (),
                latent_channels=vae["latent_channels"],
                vae_factor=factor,
                size_multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
                size_step=factor,
                default_size=default_size(unet, factor),
                defaults=defaults,
                pad_token=pad_token,
                max_noise_level=int(index.get(MOST_NOISE, MOST_BY_DEFAULT)) if upscales else None,
                masked_decoder=str(index["vae"][1]) == ASYMMETRIC_VAE,
                zero_empty_negative=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
                license=card.license,
                prompts=card.prompts,
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(self.source.path, [f"the configs do not fit together: {error}"]) from error


def _adapts(part: str) -> bool:
    return role(part).kind == "T2I-Adapter"
