"""Read and check a diffusers folder: its networks, their configs and weights, its tokenizers and its scheduler.

The folder is read as JSON and safetensors headers. No name in it is ever imported (diffusers imports what model_index.json names,
GHSA-4prv-5hj7-c2xr). All faults of a folder are reported at once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdexport.checkpoint.bounds import check_depth
from sdexport.checkpoint.card import read_card
from sdexport.checkpoint.configs import default_size, misfits, read_config
from sdexport.checkpoint.opening import FLOW_SCHEDULERS, SCHEDULERS, check_index, opened_scheduler, opened_unet, without_defaults
from sdexport.checkpoint.safetensors import StoredTensor, is_regular, merge_shards, read_header
from sdexport.checkpoint.tokenizer import NAMES as TOKENIZER_FILES
from sdexport.checkpoint.tokenizer import StoredTokenizer, read_tokenizer
from sdexport.checkpoint.tree import read_own
from sdexport.checkpoint.weight_files import WeightFile, choose_weight_file, full_weights_name
from sdexport.errors import CheckpointError
from sdruntime.bundle.manifest import LONGEST_TEXT, NAME, Family, ModelSpec, Precision, PredictionType, load_manifest
from sdruntime.bundle.records import read_json
from sdruntime.errors import BundleError, plain, quoted

_CLIP = ("transformers", "CLIPTextModel")
_TOKENIZERS = (("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast"))
_PARTS: Mapping[str, Mapping[str, tuple[tuple[str, str], ...]]] = {
    "StableDiffusionPipeline": {
        "text_encoder": (_CLIP,),
        "tokenizer": _TOKENIZERS,
        "unet": (("diffusers", "UNet2DConditionModel"),),
        "vae": (("diffusers", "AutoencoderKL"),),
    },
    "StableDiffusionXLPipeline": {
        "text_encoder": (_CLIP,),
        "text_encoder_2": (("transformers", "CLIPTextModelWithProjection"),),
        "tokenizer": _TOKENIZERS,
        "tokenizer_2": _TOKENIZERS,
        "unet": (("diffusers", "UNet2DConditionModel"),),
        "vae": (("diffusers", "AutoencoderKL"),),
    },
}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
_PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A network of the checkpoint: the settings of its config.json, its files, and the location of each weight.

    `weights` is empty if the files are pickles.
    """

    config: Mapping[str, Any]
    files: tuple[Path, ...]
    weights: Mapping[str, StoredTensor]
    pickled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint, as `read_checkpoint` returns it.

    `scheduler` has the settings of the scheduler in diffusers' open pipeline, and `changes` a line for each setting that the
    pipeline changes when it opens the checkpoint.
    """

    folder: Path
    model: ModelSpec
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, StoredTokenizer]
    text_length: int  # tokens of a text, including start, end and padding
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    changes: tuple[str, ...] = ()


def read_checkpoint(folder: Path, *, name: str, precision: Precision = "fp32", allow_pickle: bool = False) -> Checkpoint:
    """Read and check a diffusers folder. fp16 prefers the files of the fp16 variant; other precisions prefer the full ones.

    Raises CheckpointError with every fault.
    """
    if folder.is_file():
        raise CheckpointError(folder.name, ["a single file is not read yet: give a diffusers folder or a hub id"])
    return _Reader(folder, precision, allow_pickle).read(name)


class _Reader:
    """Read one folder and collect its faults in `faults`."""

    def __init__(self, folder: Path, precision: Precision, allow_pickle: bool) -> None:
        self.folder, self.precision, self.allow_pickle = folder, precision, allow_pickle
        self.faults: list[str] = []
        self.changes: list[str] = []

    def read(self, name: str) -> Checkpoint:
        self._refuse_a_bundle()
        index = self._json("model_index.json")
        self._stop_at_faults()
        required = _PARTS.get(str(index.get("_class_name")))
        if required is None:
            known = ", ".join(_PARTS)
            self.faults.append(f"model_index.json: _class_name {index.get('_class_name')!r} is not one of {known}")
            raise CheckpointError(self.folder, self.faults)
        for required_part, classes in required.items():
            self._check_class(index, required_part, classes)
        check_index(index, self.faults)
        parts = {part: self._part(part, required[part][0][1], index["_class_name"]) for part in required if part in _NETWORKS}
        scheduler = self._scheduler(index)
        read = {part: self._tokenizer(part) for part in required if part.startswith("tokenizer")}
        tokenizers = {part: tokenizer for part, tokenizer in read.items() if tokenizer is not None}
        self._stop_at_faults()
        configs = {name: part.config for name, part in parts.items()}
        self.faults.extend(misfits(configs, two_encoders="text_encoder_2" in parts))
        self._stop_at_faults()
        for name_of_part, part in parts.items():
            if not part.pickled:  # the names in pickles are unknown until they are loaded
                check_depth(name_of_part, part.config, part.weights, self.faults)
        length = self._text_length(parts, tokenizers)
        self._stop_at_faults()
        model = self._model(name, index, parts, scheduler, tokenizers["tokenizer"].pad_token)
        return Checkpoint(
            folder=self.folder,
            model=model,
            parts=MappingProxyType(parts),
            tokenizers=MappingProxyType(tokenizers),
            text_length=length,
            index=MappingProxyType(index),
            scheduler=MappingProxyType(scheduler),
            changes=tuple(self.changes),
        )

    def _refuse_a_bundle(self) -> None:
        """Raise CheckpointError if the folder is a bundle, which has a model_index.json too."""
        if (self.folder / NAME).is_file():
            with contextlib.suppress(BundleError):
                load_manifest(self.folder)
                advice = f"sdruntime build {quoted(self.folder)} --backend onnxruntime adds engines to it"
                raise CheckpointError(self.folder, [f"a bundle already, not a checkpoint: {advice}"])

    def _stop_at_faults(self) -> None:
        if self.faults:
            raise CheckpointError(self.folder, self.faults)

    def _json(self, path: str) -> dict[str, Any]:
        try:
            document = read_json(self.folder / path)
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

    def _part(self, name: str, kind: str, pipeline: str) -> Part:
        written: Mapping[str, Any] = self._json(f"{name}/config.json")
        if name not in _TEXT_ENCODERS:
            written = without_defaults(written, f"{name}/config.json", self.faults)
        if name == "unet":
            written, changes = opened_unet(pipeline, written)
            self.changes.extend(changes)
        config = read_config(kind, written, f"{name}/config.json", self.faults) if written else {}
        files, pickled = self._weight_files(name)
        return Part(config=config, files=files, weights={} if pickled else self._weights(name, files), pickled=pickled)

    def _weight_files(self, name: str) -> tuple[tuple[Path, ...], bool]:
        """Return the files that diffusers would open (the weights, or the shards of an index), and whether they are pickles."""
        folder = self.folder / name
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        file = choose_weight_file(name, present, self.precision)
        if file is None:
            others = sorted(path for path in present if path.endswith((".safetensors", ".bin")))
            beside = f": {', '.join(others[:8])} exist, but diffusers opens none of them" if others else ""
            self.faults.append(f"{name}/{full_weights_name(name)} is missing{beside}")
            return (), False
        if file.pickled and not self.allow_pickle:
            self.faults.append(
                f"{name}/{file.name} is a pickle, which can run code when it is read: "
                "use a checkpoint with safetensors, or trust this one with --allow-pickle"
            )
            return (), True
        files = self._shards(name, file) if file.index else (folder / file.name,)
        unreadable = [path for path in files if not is_regular(path)]
        self.faults.extend(
            f"{name}/{path.name} {'is not a regular file' if path.exists() else 'is missing'}"
            + (f", a shard named by {file.name}" if file.index else "")
            for path in unreadable
        )
        return tuple(path for path in files if path not in unreadable), file.pickled

    def _shards(self, name: str, index: WeightFile) -> tuple[Path, ...]:
        listed = f"{name}/{index.name}"
        before, places = len(self.faults), self._json(listed).get("weight_map")
        if not isinstance(places, dict) or not places:
            if len(self.faults) == before:
                self.faults.append(f"{listed}: weight_map is missing")
            return ()
        shards = sorted({str(shard) for shard in places.values()})
        ending = "bin" if index.pickled else "safetensors"
        valid = [shard for shard in shards if re.fullmatch(rf"[\w.-]+\.{ending}", shard)]
        self.faults.extend(
            f"{listed}: the shard {shard!r:.60} is not a .{ending} file of this folder" for shard in shards if shard not in valid
        )
        return tuple(self.folder / name / shard for shard in valid)

    def _weights(self, name: str, files: tuple[Path, ...]) -> Mapping[str, StoredTensor]:
        headers = []
        for path in files:
            try:
                headers.append((path, read_header(path)))
            except (OSError, ValueError) as error:
                self.faults.append(f"{path.relative_to(self.folder)}: {plain(error)}")
        try:
            return MappingProxyType(merge_shards(headers))
        except ValueError as error:
            self.faults.append(f"{name}: {error}")
            return {}

    def _tokenizer(self, name: str) -> StoredTokenizer | None:
        files, before = {}, len(self.faults)
        for file in TOKENIZER_FILES:
            try:
                data = read_own(self.folder / name / file, self.folder)
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

    def _scheduler(self, index: Mapping[str, Any]) -> dict[str, Any]:
        value, path = index.get("scheduler"), "scheduler/scheduler_config.json"
        if isinstance(value, list) and len(value) == 2 and value[1] in FLOW_SCHEDULERS:
            self.faults.append(
                f"model_index.json: scheduler is {value[1]}, which {index['_class_name']} cannot run, so diffusers has no image "
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
        scheduler, changes = opened_scheduler(index["_class_name"], value[-1], written, self.faults)
        self.changes.extend(changes)
        return scheduler

    def _model(
        self, name: str, index: Mapping[str, Any], parts: Mapping[str, Part], scheduler: Mapping[str, Any], pad_token: str
    ) -> ModelSpec:
        unet, vae, text = (parts[part].config for part in ("unet", "vae", "text_encoder"))
        xl, card = "text_encoder_2" in parts, read_card(self.folder)
        # OpenCLIP's encoder, introduced with SD2, uses plain GELU; CLIP's own uses quick GELU
        family: Family = "sdxl" if xl else "sd2" if text["hidden_act"] == "gelu" else "sd1"
        try:
            factor = 2 ** (len(vae["block_out_channels"]) - 1)
            mean, std = (vae[key] or () for key in ("latents_mean", "latents_std"))
            # StableDiffusionXLPipeline uses them if both are set; StableDiffusionPipeline ignores them
            normalized = xl and mean and std
            return ModelSpec(
                name=name,
                family=family,
                prediction_type=scheduler.get("prediction_type") or "epsilon",
                scaling_factor=float(vae["scaling_factor"]),
                latents_mean=tuple(map(float, mean)) if normalized else (),
                latents_std=tuple(map(float, std)) if normalized else (),
                latent_channels=vae["latent_channels"],
                vae_factor=factor,
                size_multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
                default_size=default_size(unet, factor),
                pad_token=pad_token,
                zero_empty_negative=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
                license=card.license,
                prompts=card.prompts,
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(self.folder, [f"the configs do not fit together: {error}"]) from error
