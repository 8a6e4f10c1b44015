"""Write the files of a bundle other than the networks, and describe its components for the manifest."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdexport.checkpoint.checkpoint import Checkpoint
from sdexport.checkpoint.pipelines import LOW_RES
from sdexport.checkpoint.weights.embeddings import open_file
from sdexport.families.components import Component
from sdexport.trace.component import DATA, MODEL
from sdexport.trace.versions import versions
from sdruntime.adapters.embedding import NAME, Embedding, read_embedding
from sdruntime.bundle.audit import Audit
from sdruntime.bundle.manifest import ComponentSpec
from sdruntime.bundle.roles import role
from sdruntime.pipeline.tasks.upscaling import SCHEDULER as LOW_RES_SCHEDULER
from sdruntime.pipeline.text.embeddings import FOLDER, Embeddings


def without_code_keys(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config without the keys that make a library run other code (`_attn_implementation`, `auto_map`, …)."""
    known = ("_class_name", "_diffusers_version")
    return {key: value for key, value in config.items() if key in known or not (key.startswith("_") or key == "auto_map")}


def write_pipeline_files(checkpoint: Checkpoint, table: Sequence[Component], folder: Path) -> None:
    """Write the tokenizers, the scheduler's config and model_index.json into `folder`."""
    for name, tokenizer in checkpoint.tokenizers.items():
        tokenizer.write(folder / name, length=checkpoint.text_length)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(dict(checkpoint.scheduler), indent=1) + "\n")
    if checkpoint.low_res_scheduler is not None:
        (folder / LOW_RES).mkdir()
        (folder / LOW_RES_SCHEDULER).write_text(json.dumps(dict(checkpoint.low_res_scheduler), indent=1) + "\n")
    (folder / "model_index.json").write_text(json.dumps(_model_index(checkpoint, table), indent=1) + "\n")


def _model_index(checkpoint: Checkpoint, table: Sequence[Component]) -> Mapping[str, Any]:
    """Return the model_index.json for diffusers' OnnxStableDiffusionPipeline, which supports SD1 and SD2."""
    supported = checkpoint.model.family != "sdxl"
    index: dict[str, Any] = {
        "_class_name": "OnnxStableDiffusionPipeline" if supported else checkpoint.index["_class_name"],
        "_diffusers_version": versions()["diffusers"],
        "scheduler": ["diffusers", checkpoint.scheduler["_class_name"]],
    }
    index |= {name: ["transformers", "CLIPTokenizer"] for name in checkpoint.tokenizers}
    index |= {component.name: ["diffusers", "OnnxRuntimeModel"] for component in table}
    if supported:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index


def read_embeddings(sources: Sequence[str], table: Sequence[Component], *, allow_pickle: bool = False) -> list[Embedding]:
    """Return the embeddings of files for the text encoders in `table`. Raises SettingError for one that does not fit."""
    widths = {
        component.name: component.config["hidden_size"] for component in table if role(component.name).kind == "text encoder"
    }
    opened = functools.partial(open_file, allow_pickle=allow_pickle)
    embeddings = [read_embedding(source, widths, opened) for source in sources]
    Embeddings(items=embeddings, sizes={})  # checks the names
    return embeddings


def write_embeddings(embeddings: Sequence[Embedding], folder: Path) -> None:
    """Write a file of each embedding into `folder`/embeddings, where the runtime looks for them."""
    from safetensors.numpy import save_file

    for number, embedding in enumerate(embeddings, start=1):
        path = folder / FOLDER / f"{number}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(embedding.tensors, path, {NAME: embedding.name})


def component_specs(table: Sequence[Component], audits: Mapping[str, Audit]) -> dict[str, ComponentSpec]:
    """Return the manifest's entry of each component, by name."""
    return {
        component.name: ComponentSpec(
            files=(f"{component.name}/{MODEL}", f"{component.name}/{DATA}"),
            config=f"{component.name}/config.json",
            inputs=component.inputs,
            outputs=component.outputs,
            optional_inputs=component.optional_inputs,
            audit=audits.get(component.name),
        )
        for component in table
    }
