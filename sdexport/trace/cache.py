"""Traces kept from one build to the next, each under the hash of all that it depends on.

A trace holds no weights: it depends on the component's config and tensors, on the versions of the libraries and on the code
that traces. An entry is one file, the SHA-256 of the graph and then the graph; one that was damaged is as good as none.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from sdexport.families.components import Component
from sdexport.trace.versions import DIGEST, digest_of, versions
from sdruntime.bundle.records import json_from_record
from sdruntime.system.durable import replace_file

# of the pipeline, not of the network, as is what begins with "_"
_IDLE = ("sample_size", "scaling_factor", "latents_mean", "latents_std", "use_attention_mask")
_TRACERS = ("families/components.py", "families/modules.py", "trace/to_onnx.py")


def cache_folder() -> Path:
    """SDEXPORT_CACHE, or `sdexport` in the user's cache folder. It may be removed at any time."""
    own = os.environ.get("SDEXPORT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sdexport"


def trace_key(component: Component) -> str:
    """The hash of everything that a component's trace depends on."""
    document = json_from_record(component)
    config = {key: value for key, value in component.config.items() if not key.startswith("_") and key not in _IDLE}
    document |= {"config": config, "versions": versions(), "code": _code()}
    return digest_of(document)


@cache
def _code() -> str:
    sources = [Path(__file__).parents[1] / name for name in _TRACERS]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def load_trace(key: str) -> bytes | None:
    """The kept graph, or None where there is none, or one whose bytes have changed since."""
    try:
        kept = _path(key).read_bytes()
    except OSError:
        return None
    return kept[DIGEST:] if hashlib.sha256(kept[DIGEST:]).digest() == kept[:DIGEST] else None


def store_trace(key: str, graph: bytes) -> None:
    """Keep a graph, by one rename."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, hashlib.sha256(graph).digest() + graph)


def _path(key: str) -> Path:
    return cache_folder() / "traces" / key[:2] / f"{key}.onnx"
