"""Text conditioning of the UNet: encode prompts, and keep the most recent ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.finite import checked_rows
from sdruntime.pipeline.text.prompt import batch, tokenize
from sdruntime.pipeline.text.tokenizer import FILES, Tokenizer
from sdruntime.system.document import LARGEST

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
KEPT = 64  # encoded texts in memory: 15 MiB for SD1, 40 MiB for SDXL


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """An encoded text, read-only. `hidden`: float32 [S, D]. `pooled`: float32 [P], for SDXL. `cut`: the text that did not fit."""

    hidden: Array
    pooled: Array | None = None
    cut: str = ""

    @property
    def row(self) -> dict[str, Array]:
        """The UNet's inputs for one row of a call."""
        pooled = {} if self.pooled is None else {"text_embeds": self.pooled}
        return {"encoder_hidden_states": self.hidden, **pooled}

    def zeros(self) -> Condition:
        """Return the condition that some checkpoints use in place of an absent negative prompt: all zeros."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return Condition(hidden=np.zeros_like(self.hidden), pooled=pooled)


def cut_lines(encoded: Iterable[tuple[str, Condition]]) -> list[str]:
    """Return one warning for each text that did not fit."""
    lines = [
        f"the text encoder takes {len(condition.hidden)} tokens; of {text[:40]!r}… this was cut: {condition.cut!r}"
        for text, condition in encoded
        if condition.cut
    ]
    return list(dict.fromkeys(lines))


@dataclass(frozen=True, slots=True)
class Conditioner:
    """Encode texts with a bundle's text encoders. `tokenizers`: by the name of the text encoder that each feeds."""

    tokenizers: Mapping[str, Tokenizer]
    bundle: Path | None = None
    _kept: dict[str, Condition] = field(default_factory=dict)  # ordered by use: the most recent text is last

    @classmethod
    def open(cls, bundle: Bundle) -> Conditioner:
        """Read a bundle's tokenizers. Raises BundleError with every fault of their files."""
        tokenizers = {}
        for encoder, folder in TOKENIZERS.items():
            if encoder in bundle.manifest.components:
                # a file that the manifest does not list is no part of the bundle
                listed = [name for name in FILES if f"{folder}/{name}" in bundle.manifest.files]
                files = {name: bundle.read(f"{folder}/{name}", most=LARGEST) for name in listed}
                tokenizers[encoder] = Tokenizer.from_files(
                    files, where=bundle.folder / folder, length=bundle.manifest.text_length
                )
        return cls(tokenizers, bundle.folder)

    def encode(self, texts: Iterable[str], engine: Callable[[str], Engine]) -> dict[str, Condition]:
        """Return the condition of each distinct text; encode those that are not in memory. Raises NotFinite.

        `engine` returns the open engine of a text encoder. It is called only if there is something to encode.
        """
        texts = list(dict.fromkeys(texts))
        conditions = {text: self._kept.pop(text) for text in texts if text in self._kept}
        if new := [text for text in texts if text not in conditions]:
            conditions |= self._encode(new, engine)
        self._kept.update((text, conditions[text]) for text in texts)
        for text in list(self._kept)[:-KEPT]:
            del self._kept[text]
        return conditions

    def forget(self) -> None:
        """Drop all encoded texts."""
        self._kept.clear()

    def _encode(self, texts: Sequence[str], engine: Callable[[str], Engine]) -> dict[str, Condition]:
        tokens = {encoder: [tokenize(tokenizer, text) for text in texts] for encoder, tokenizer in self.tokenizers.items()}
        outputs = [
            checked_rows(engine(encoder), {"input_ids": batch(prompts)}, lambda row: f"text {texts[row][:40]!r}", self.bundle)
            for encoder, prompts in tokens.items()
        ]
        cuts = [
            " / ".join(dict.fromkeys(prompt.cut for prompt in prompts if prompt.cut))
            for prompts in zip(*tokens.values(), strict=True)
        ]
        if len(outputs) == 1 and "last_hidden_state" in outputs[0]:
            hidden, pooled = outputs[0]["last_hidden_state"], None
        else:  # SDXL: both encoders' second-to-last hidden states, concatenated, and the pooled text of the second
            hidden, pooled = np.concatenate([out["hidden_states"] for out in outputs], axis=-1), outputs[-1]["text_embeds"]
        return {
            text: Condition(hidden=_read_only(hidden[k]), pooled=None if pooled is None else _read_only(pooled[k]), cut=cuts[k])
            for k, text in enumerate(texts)
        }


def _read_only(row: Array) -> Array:
    """Return a read-only copy: callers share it, and it does not keep the whole batch in memory."""
    copied: Array = row.copy()
    copied.flags.writeable = False
    return copied
