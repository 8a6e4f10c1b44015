"""Text conditioning of the UNet: encode prompts, and keep the most recent ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sdruntime.adapters.embedding import Embedding
from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import ComponentSpec
from sdruntime.engines.finite import checked_rows
from sdruntime.errors import SettingError, shown
from sdruntime.pipeline.text.chunks import Chunk, chunks, whole
from sdruntime.pipeline.text.embeddings import NO_EMBEDDINGS, Embeddings
from sdruntime.pipeline.text.emphasis import emphasized
from sdruntime.pipeline.text.prompt import tokenize
from sdruntime.pipeline.text.tokenizer import FILES, Tokenizer
from sdruntime.pipeline.text.wording import Wording
from sdruntime.system.document import LARGEST

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
LAYERS = "layers"  # an output: the states of the layers before the last one, in order
KEPT = 64  # encoded chunks in memory: 15 MiB for SD1, 40 MiB for SDXL
MOST_ENCODED = 512  # chunks of one image: 120 MiB for SD1, 320 MiB for SDXL


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

    def filled(self, count: int, empty: Condition | None) -> Condition:
        """Return the condition with the `hidden` of `count` empty chunks at its end; itself without any."""
        if not count or empty is None:
            return self
        return replace(self, hidden=_read_only(np.concatenate([self.hidden, *[empty.hidden] * count])))

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
class _Chunked:
    """A text as inputs of the text encoders: `parts`, the same number for each. `cut`: what did not fit."""

    parts: Mapping[str, Sequence[Chunk]]
    cut: str

    @property
    def count(self) -> int:
        return len(next(iter(self.parts.values())))


@dataclass(frozen=True, slots=True)
class Conditioner:
    """Encode texts with a bundle's text encoders.

    `tokenizers`: by the name of the text encoder that each feeds. `most_skipped`: how many layers can be skipped, 0 if the
    encoders were exported without the states of their layers.
    """

    tokenizers: Mapping[str, Tokenizer]
    most_skipped: int = 0
    bundle: Path | None = None
    embeddings: Embeddings = NO_EMBEDDINGS
    _kept: dict[Wording, Condition] = field(default_factory=dict)  # ordered by use: the most recent text is last

    @classmethod
    def open(cls, bundle: Bundle, embeddings: Embeddings = NO_EMBEDDINGS) -> Conditioner:
        """Read a bundle's tokenizers, and add the embeddings. Raises BundleError with every fault of their files."""
        tokenizers = {}
        for encoder, folder in TOKENIZERS.items():
            if encoder in bundle.manifest.components:
                # a file that the manifest does not list is no part of the bundle
                listed = [name for name in FILES if f"{folder}/{name}" in bundle.manifest.files]
                files = {name: bundle.read(f"{folder}/{name}", most=LARGEST) for name in listed}
                tokenizer = Tokenizer.from_files(files, where=bundle.folder / folder, length=bundle.manifest.text_length)
                tokenizers[encoder] = embeddings.added_to(tokenizer, encoder)
        layers = [_layers(bundle.manifest.components[encoder]) for encoder in tokenizers]
        return cls(tokenizers, min(layers), bundle.folder, embeddings)

    def encode(self, images: Sequence[Sequence[Wording]], engine: Callable[[str], Engine]) -> list[dict[Wording, Condition]]:
        """Return the condition of each wording of each image, all of one image filled with empty chunks to the same length.

        Wordings that are not in memory are encoded. `engine` returns the open engine of a text encoder. It is called only if
        there is something to encode. Raises SettingError, NotFinite.
        """
        chunked = {wording: self._chunked(wording) for image in images for wording in image if wording not in self._kept}
        counts = {wording: chunks.count for wording, chunks in chunked.items()}
        counts |= {wording: self._count(condition) for wording, condition in self._kept.items()}
        most = [max(counts[wording] for wording in image) for image in images]
        for image, count in zip(images, most, strict=True):
            if len(set(image)) * count > MOST_ENCODED:
                raise SettingError(
                    f"the prompt {shown(image[0].text)} changes to {len(set(image))} texts of up to {count} chunks; the maximum "
                    f"is {MOST_ENCODED} chunks in all: shorten it, or use fewer [a|b] or [a:b:when] in it"
                )
        short = {w.empty for image, count in zip(images, most, strict=True) for w in image if counts[w] < count}
        chunked |= {empty: self._chunked(empty) for empty in short if empty not in self._kept}
        columns = itertools.zip_longest(*images)  # the first wording of every image, then the second, …
        wordings = dict.fromkeys([*(wording for column in columns for wording in column if wording), *short])
        conditions = {wording: self._kept.pop(wording) for wording in wordings if wording in self._kept}
        conditions |= self._encode({wording: chunked[wording] for wording in wordings if wording in chunked}, engine)
        self._keep(conditions)
        return [
            {w: conditions[w].filled(count - counts[w], conditions.get(w.empty)) for w in image}
            for image, count in zip(images, most, strict=True)
        ]

    def embeddings_in(self, texts: Iterable[str | None]) -> list[Embedding]:
        """Return the embeddings that texts name."""
        encoder, tokenizer = next(iter(self.tokenizers.items()))
        return self.embeddings.used_in([text for text in texts if text], tokenizer, encoder)

    def forget(self) -> None:
        """Drop all encoded texts."""
        self._kept.clear()

    def _keep(self, conditions: Mapping[Wording, Condition]) -> None:
        self._kept.update(conditions)
        room = KEPT
        for wording, condition in reversed(list(self._kept.items())):
            room -= self._count(condition)
            if room < 0:
                del self._kept[wording]

    def _count(self, condition: Condition) -> int:
        """Return the number of chunks of a condition."""
        return len(condition.hidden) // next(iter(self.tokenizers.values())).length

    def _chunked(self, wording: Wording) -> _Chunked:
        """Return the inputs of the text encoders, for each as many chunks as for the other."""
        for text in {wording.text, wording.second or ""}:
            self.embeddings.check(text)
        if wording.syntax == "plain":
            prompts = {encoder: tokenize(tokenizer, wording.of(encoder)) for encoder, tokenizer in self.tokenizers.items()}
            cut = " / ".join(dict.fromkeys(prompt.cut for prompt in prompts.values() if prompt.cut))
            return _Chunked({encoder: [whole(prompt)] for encoder, prompt in prompts.items()}, cut)
        parts = {encoder: chunks(tokenizer, wording.of(encoder)) for encoder, tokenizer in self.tokenizers.items()}
        most = max(map(len, parts.values()))
        return _Chunked(
            {name: [*part, *chunks(self.tokenizers[name], "") * (most - len(part))] for name, part in parts.items()}, ""
        )

    def _encode(self, texts: Mapping[Wording, _Chunked], engine: Callable[[str], Engine]) -> dict[Wording, Condition]:
        """Encode all chunks of all texts in one call of each text encoder."""
        if not texts:
            return {}
        rows = [wording for wording, text in texts.items() for _ in range(text.count)]
        hidden, pooled = [], None
        for encoder in self.tokenizers:
            parts = [chunk for text in texts.values() for chunk in text.parts[encoder]]
            feeds = self.embeddings.feeds(encoder, np.stack([chunk.ids for chunk in parts]))
            describe = lambda row, encoder=encoder: f"text {rows[row].of(encoder)[:40]!r}"  # noqa: E731
            outputs = checked_rows(engine(encoder), feeds, describe, self.bundle)
            # SDXL: both encoders' second-to-last hidden states, concatenated, and the pooled text of the second
            last = outputs.get("last_hidden_state", outputs.get("hidden_states"))
            assert last is not None
            states = [outputs[LAYERS][row, -wording.skip] if wording.skip else last[row] for row, wording in enumerate(rows)]
            hidden.append(
                [emphasized(z, chunk.weights, wording.emphasis) for z, chunk, wording in zip(states, parts, rows, strict=True)]
            )
            pooled = outputs.get("text_embeds")
        conditions, row = {}, 0
        for wording, text in texts.items():
            places = range(row, row + text.count)
            joined = np.concatenate([np.concatenate([states[place] for states in hidden], axis=-1) for place in places])
            first = None if pooled is None else _read_only(pooled[row])
            conditions[wording] = Condition(hidden=_read_only(joined), pooled=first, cut=text.cut)
            row += text.count
        return conditions


def _layers(encoder: ComponentSpec) -> int:
    """Return the number of layers whose states a text encoder returns besides those that are used by default."""
    tensors = {tensor.name: tensor for tensor in encoder.outputs}
    last = tensors.get("last_hidden_state", tensors.get("hidden_states"))
    if last is None or LAYERS not in tensors:
        return 0
    shape = tensors[LAYERS].shape
    count = shape[1] if len(shape) == 1 + len(last.shape) and (shape[0], *shape[2:]) == last.shape else 0
    return count if isinstance(count, int) and tensors[LAYERS].dtype == "float32" else 0


def _read_only(row: Array) -> Array:
    """Return a read-only copy: callers share it, and it does not keep the whole batch in memory."""
    copied: Array = row.copy()
    copied.flags.writeable = False
    return copied
