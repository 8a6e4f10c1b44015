"""Describe a bundle's precision: as a document for programs, and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sdruntime.bundle.audit import Audit
from sdruntime.bundle.manifest import Manifest
from sdruntime.bundle.records import json_from_record

REASONS = {
    "overflow": "its output overflows",
    "takes": "takes what overflows",
    "constant": "has a constant that the type cannot hold",
    "loss": "its rounding costs too much",
}


def audit_document(manifest: Manifest) -> dict[str, Any]:
    """Return the precision and the audits of the components, as JSON values."""
    return {"precision": manifest.precision, "audits": json_from_record(_audits(manifest))}


def audit_lines(manifest: Manifest) -> Iterator[str]:
    """Yield lines with each component's nodes in float32, the reasons, and the numbers."""
    audits = _audits(manifest)
    if not audits:
        reason = "nothing to audit" if manifest.precision == "fp32" else "not audited: rebuild it without --no-audit"
        yield f"{manifest.model.name} is {manifest.precision}: {reason}"
    for name, audit in audits.items():
        kept = "all (the last resort)" if audit.whole else f"{len(audit.kept)}"
        alone = "not finite" if audit.all_psnr is None else f"cosine {audit.all_cosine:.6f}, {audit.all_psnr} dB"
        yield f"{name}: {manifest.precision}, of {audit.nodes} nodes {kept} in float32, over {audit.feeds} sets of activations"
        yield f"  against float32: cosine {audit.cosine:.6f}, PSNR {audit.psnr} dB (with none in float32: {alone})"
        yield f"  largest in {manifest.precision}: {audit.largest} ({audit.largest_node or 'none'})"
        for node in audit.kept:
            cost = "not finite" if node.cost is None else f"{node.cost:.1e}"
            split = "; keeps its attention from being fused" if node.splits_attention else ""
            yield f"  {node.node} ({node.op}): {REASONS[node.reason]}; largest {node.largest}, rounded alone {cost}{split}"


def _audits(manifest: Manifest) -> dict[str, Audit]:
    return {name: component.audit for name, component in manifest.components.items() if component.audit is not None}
