"""Record where a bundle came from, and decide whether an existing one is up to date."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sdexport.build.events import ExportOptions
from sdexport.checkpoint.checkpoint import Checkpoint
from sdexport.checkpoint.hub import Located
from sdexport.families.components import Component
from sdexport.trace.cache import trace_key
from sdexport.trace.versions import digest_of, versions
from sdruntime.adapters.blocks import text_of
from sdruntime.adapters.embedding import Embedding
from sdruntime.adapters.lora import lora_from
from sdruntime.bundle.bundle import Bundle, opening, sha256
from sdruntime.bundle.records import json_from_record
from sdruntime.bundle.sampler_step import SLOTS, SOURCES, TARGETS
from sdruntime.errors import BundleError
from sdruntime.verification.golden import DOCUMENT


def digest_of_inputs(
    checkpoint: Checkpoint, table: Sequence[Component], options: ExportOptions, embeddings: Sequence[Embedding]
) -> str:
    """Return the hash of everything that determines the ONNX models and the files beside them."""
    files = dict(checkpoint.source.inputs(checkpoint.parts))
    files |= {name: path for part in checkpoint.parts.values() for name, path in part.files.items()}
    return digest_of(
        {
            **({"loras": checkpoint.adapters} if checkpoint.adapters else {}),
            **({"embeddings": [(embedding.name, embedding.sha256) for embedding in embeddings]} if embeddings else {}),
            "model": json_from_record(checkpoint.model),
            "precision": options.precision,
            "audit": options.audited,
            "step": [SLOTS, SOURCES, TARGETS],
            "traces": [trace_key(component) for component in table],
            "scheduler": dict(checkpoint.scheduler),
            "tokenizers": {name: dict(tokenizer.files) for name, tokenizer in checkpoint.tokenizers.items()},
            "versions": versions(),
            "files": {name: sha256(path) for name, path in files.items()},
        }
    )


def is_current(out: Path, inputs: str, *, verified: bool) -> bool:
    """Return whether `out` is an intact bundle of the same inputs; with reference outputs, if `verified`."""

    def current(bundle: Bundle) -> bool:
        if verified and DOCUMENT not in bundle.manifest.files:
            return False
        return bundle.manifest.provenance.get("inputs") == inputs and not bundle.changed_files()

    try:
        return opening(out, current)
    except BundleError:
        return False


def without_paths(
    options: ExportOptions, vae: Located | None, preview: Located | None, controlnets: Mapping[str, Located]
) -> ExportOptions:
    """Return the options with the names of other sources in place of their paths on this machine."""
    config = Path(options.config).resolve().name if options.config else None
    named, shown = (None if other is None else other.source for other in (vae, preview))
    loras = tuple(
        Path(lora.path).name + ":{:g}:{:g}".format(*lora.scales) + text_of(lora.blocks) for lora in map(lora_from, options.loras)
    )
    sources = {name: other.source for name, other in controlnets.items()}
    adapter, encoder = (Path(path).resolve().name if path else None for path in (options.ip_adapter, options.image_encoder))
    return dataclasses.replace(
        options,
        config=config,
        vae=named,
        preview_vae=shown,
        loras=loras,
        controlnets=sources,
        ip_adapter=adapter,
        image_encoder=encoder,
    )


def provenance_of(located: Located, checkpoint: Checkpoint, options: ExportOptions, inputs: str) -> dict[str, Any]:
    """Return the manifest's provenance. SOURCE_DATE_EPOCH sets the date of creation, for reproducible builds."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    created = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    provenance = {
        "source": located.source,
        "revision": located.revision,
        "created": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "options": json_from_record(options),
        "changes": list(checkpoint.changes) or None,  # settings that diffusers' pipeline changes when it opens the checkpoint
        "versions": versions(),
        "inputs": inputs,
    }
    return {key: value for key, value in provenance.items() if value is not None}
