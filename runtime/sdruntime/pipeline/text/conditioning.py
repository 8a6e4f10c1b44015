"""Text -> what the UNet is conditioned on."""

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
KEPT = 64  # encoded texts: 15 MiB of them for SD1, 40 for SDXL


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One text, encoded, to be read only. `hidden` float32 [S, D]; `pooled` float32 [P] for SDXL. `cut`: the text that did not
    fit."""

    hidden: Array
    pooled: Array | None = None
    cut: str = ""

    @property
    def row(self) -> dict[str, Array]:
        """It as inputs of the UNet, for one row of a call."""
        pooled = {} if self.pooled is None else {"text_embeds": self.pooled}
        return {"encoder_hidden_states": self.hidden, **pooled}

    def zeros(self) -> Condition:
        """What some checkpoints condition on in place of an absent negative prompt."""
        pooled = None if self.pooled is None else np.zeros_like(self.pooled)
        return Condition(hidden=np.zeros_like(self.hidden), pooled=pooled)


def cut_lines(encoded: Iterable[tuple[str, Condition]]) -> list[str]:
    """For a person: a line for each text that did not fit."""
    lines = [
        f"the text encoder takes {len(each.hidden)} tokens; of {text[:40]!r}… this was cut: {each.cut!r}"
        for text, each in encoded
        if each.cut
    ]
    return list(dict.fromkeys(lines))


@dataclass(frozen=True, slots=True)
class Conditioner:
    """The tokenizers of a bundle, by the text encoder that each one feeds, and what was encoded last."""

    tokenizers: Mapping[str, Tokenizer]
    bundle: Path | None = None
    _kept: dict[str, Condition] = field(default_factory=dict)  # the most recently used text is the last

    @classmethod
    def open(cls, bundle: Bundle) -> Conditioner:
        """Raises BundleError, naming every fault of the tokenizer's files."""
        found = {}
        for encoder, folder in TOKENIZERS.items():
            if encoder in bundle.manifest.components:
                # a file that the manifest does not list is not there
                listed = [name for name in FILES if f"{folder}/{name}" in bundle.manifest.files]
                files = {name: bundle.read(f"{folder}/{name}", most=LARGEST) for name in listed}
                found[encoder] = Tokenizer.from_files(files, where=bundle.folder / folder, length=bundle.manifest.text_length)
        return cls(found, bundle.folder)

    def encode(self, texts: Iterable[str], engine: Callable[[str], Engine]) -> dict[str, Condition]:
        """Each different text, encoded now where it was not lately. `engine` gives the open engine of a text encoder, and is
        called only if there is something to encode. Raises NotFinite."""
        texts = list(dict.fromkeys(texts))
        found = {text: self._kept.pop(text) for text in texts if text in self._kept}
        if fresh := [text for text in texts if text not in found]:
            found |= self._encoded(fresh, engine)
        self._kept.update((text, found[text]) for text in texts)
        for text in list(self._kept)[:-KEPT]:
            del self._kept[text]
        return found

    def forget(self) -> None:
        self._kept.clear()

    def _encoded(self, texts: Sequence[str], engine: Callable[[str], Engine]) -> dict[str, Condition]:
        tokens = {encoder: [tokenize(tokenizer, text) for text in texts] for encoder, tokenizer in self.tokenizers.items()}
        outputs = [
            checked_rows(engine(encoder), {"input_ids": batch(found)}, lambda row: f"text {texts[row][:40]!r}", self.bundle)
            for encoder, found in tokens.items()
        ]
        cuts = [" / ".join(dict.fromkeys(each.cut for each in parts if each.cut)) for parts in zip(*tokens.values(), strict=True)]
        if len(outputs) == 1 and "last_hidden_state" in outputs[0]:
            hidden, pooled = outputs[0]["last_hidden_state"], None
        else:  # SDXL: the second-to-last layers of both encoders side by side, the pooled text of the last
            hidden, pooled = np.concatenate([out["hidden_states"] for out in outputs], axis=-1), outputs[-1]["text_embeds"]
        return {
            text: Condition(hidden=_own(hidden[k]), pooled=None if pooled is None else _own(pooled[k]), cut=cuts[k])
            for k, text in enumerate(texts)
        }


def _own(row: Array) -> Array:
    """A copy that nobody can write to: it is handed out again, and keeps no larger array alive."""
    copied: Array = row.copy()
    copied.flags.writeable = False
    return copied
