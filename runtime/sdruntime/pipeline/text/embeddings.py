"""Embeddings as tokens: their names in prompts, and the vectors at their positions.

The id of a token past the text encoder's own table stands for a vector, which the encoder takes as an input. Prompts have the
name of an embedding, in any case, or `embedding:NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdruntime.adapters.embedding import Embedding, read_embedding
from sdruntime.arrays import Array
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.interface import TOKEN_VECTORS
from sdruntime.bundle.roles import of_kind
from sdruntime.errors import BundleError, SettingError, UnknownName, Unsupported
from sdruntime.pipeline.text.added_tokens import AddedToken
from sdruntime.pipeline.text.tokenizer import Tokenizer

FOLDER = "embeddings"  # of a bundle
MOST_TOKENS = 1 << 30
_PREFIX = "embedding:"
_REFERENCE = re.compile(re.escape(_PREFIX) + r"([^\s,:()\[\]|]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """The embeddings of a pipeline. `sizes`: rows of the table of each text encoder."""

    items: Sequence[Embedding] = ()
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        names = [item.name.lower() for item in self.items]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise SettingError(f"embedding {twice!r} is there twice: give one another name, as NAME=FILE")

    def added_to(self, tokenizer: Tokenizer, encoder: str) -> Tokenizer:
        """Return a tokenizer with the embeddings as tokens. Raises SettingError for the name of another added token."""
        if not self.items:
            return tokenizer
        known = {token.text.lower() for token in tokenizer.added}
        if clash := next((item.name for item in self.items if item.name.lower() in known), None):
            raise SettingError(f"embedding {clash!r}: the tokenizer has a token of that name: give another, as NAME=FILE")
        return replace(tokenizer, added=(*tokenizer.added, *self._tokens(self.sizes[encoder])))

    def _tokens(self, first: int) -> Iterator[AddedToken]:
        for item in self.items:
            # a name of letters is not to be found in longer words
            word = item.name[0].isalnum() and item.name[-1].isalnum()
            for text in (_PREFIX + item.name, item.name):  # the last one decodes
                yield AddedToken(text=text, id=first, normalized=True, single_word=word, vectors=item.count)
            first += item.count

    def feeds(self, encoder: str, ids: NDArray[np.int32]) -> dict[str, Array]:
        """Return the inputs of a text encoder for `ids` [B, S]: with the vectors [B, S, D] if one of them is an embedding's."""
        feeds: dict[str, Array] = {"input_ids": ids}
        beyond = ids >= self.sizes[encoder] if self.items else np.zeros_like(ids, bool)
        if beyond.any():
            table = np.concatenate([item.vectors[encoder] for item in self.items])
            placed = np.zeros((*ids.shape, table.shape[1]), np.float32)
            placed[beyond] = table[ids[beyond] - self.sizes[encoder]]
            feeds[TOKEN_VECTORS] = placed
        return feeds

    def check(self, text: str) -> None:
        """Raises UnknownName for an `embedding:NAME` that is not there."""
        known = [item.name for item in self.items]
        for name in _REFERENCE.findall(text):
            if not any(name.lower() == other.lower() for other in known):
                raise UnknownName("embedding", name, known)

    def used_in(self, texts: Iterable[str], tokenizer: Tokenizer, encoder: str) -> list[Embedding]:
        """Return the embeddings that occur in texts."""
        if not self.items:
            return []
        first, ids = self.sizes[encoder], {number for text in texts for number in tokenizer.encode(text)}
        used = []
        for item in self.items:
            if first in ids:
                used.append(item)
            first += item.count
        return used


NO_EMBEDDINGS = Embeddings(sizes={})


def embeddings_of(bundle: Bundle, sources: Iterable[Path | str]) -> Embeddings:
    """Return the embeddings in a bundle and those of `sources`, each FILE or NAME=FILE, for its text encoders.

    Raises SettingError for a file that is none or does not fit, Unsupported for a bundle whose text encoders take no vectors, and
    BundleError for a damaged file in the bundle.
    """
    inside = [path for path in bundle.manifest.files if path.startswith(f"{FOLDER}/")]
    if not inside and not (sources := list(sources)):
        return NO_EMBEDDINGS
    widths, sizes = {}, {}
    for name in of_kind(bundle.manifest.components, "text encoder"):
        component = bundle.manifest.components[name]
        vectors = next((tensor for tensor in component.optional_inputs if tensor.name == TOKEN_VECTORS), None)
        if vectors is None:
            raise Unsupported(f"embedding: the bundle was exported without {TOKEN_VECTORS} of its {name}: export it again")
        config = bundle.read_json(component.config)
        size = config.get("vocab_size") if isinstance(config, dict) else None
        if type(size) is not int or not 0 < size < MOST_TOKENS:
            raise BundleError(bundle.folder, [f"{component.config}: vocab_size {size!r:.40} is not a number of tokens"])
        widths[name], sizes[name] = int(vectors.shape[-1]), size
    items = []
    for path in inside:
        try:
            item = read_embedding(bundle.folder / path, widths)
        except SettingError as error:
            raise BundleError(bundle.folder, [str(error)]) from error
        if item.sha256 != bundle.manifest.files[path].sha256:
            raise BundleError(bundle.folder, [f"{path}: its hash differs from the manifest's"])
        items.append(item)
    return Embeddings(items=[*items, *(read_embedding(source, widths) for source in sources)], sizes=sizes)
