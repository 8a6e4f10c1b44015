"""Cache traces between builds, each under the hash of everything it depends on.

A trace has no weights: it depends on the component's config and tensors, on the versions of the libraries and on the code that
traces. An entry is one file: the SHA-256 of the graph, then the graph. A damaged entry is ignored.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from sdexport.families.components import Component
from sdexport.trace.versions import DIGEST, digest_of, versions
from sdruntime.bundle.records import json_from_record
from sdruntime.bundle.roles import role
from sdruntime.system.durable import replace_file

# settings of the pipeline, not of the network, as are those that begin with "_"
_IDLE = ("sample_size", "scaling_factor", "latents_mean", "latents_std", "use_attention_mask")
_TRACERS = ("families/components.py", "families/modules.py", "trace/to_onnx.py")


def cache_folder() -> Path:
    """Return SDEXPORT_CACHE, or `sdexport` in the user's cache folder. The folder may be removed at any time."""
    own = os.environ.get("SDEXPORT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sdexport"


def trace_key(component: Component) -> str:
    """Return the hash of everything that a component's trace depends on."""
    document = json_from_record(component)
    config = {key: value for key, value in component.config.items() if not key.startswith("_") and key not in _IDLE}
    del document["optional_inputs"]  # added to the graph after the trace
    if (kind := role(component.name).kind) in ("ControlNet", "T2I-Adapter"):  # a bundle may have several of one architecture
        document |= {"name": kind, "part": kind}
    document |= {"config": config, "versions": versions(), "code": _code()}
    return digest_of(document)


@cache
def _code() -> str:
    sources = [Path(__file__).parents[1] / name for name in _TRACERS]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def load_trace(key: str) -> bytes | None:
    """Return the cached graph, or None if it is missing or damaged."""
    try:
        entry = _path(key).read_bytes()
    except OSError:
        return None
    return entry[DIGEST:] if hashlib.sha256(entry[DIGEST:]).digest() == entry[:DIGEST] else None


def store_trace(key: str, graph: bytes) -> None:
    """Store a graph in the cache, by one rename."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, hashlib.sha256(graph).digest() + graph)


def _path(key: str) -> Path:
    return cache_folder() / "traces" / key[:2] / f"{key}.onnx"
