"""The LoRAs of requests: files that are opened once, and the set of each request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sdruntime.adapters.base import UNET
from sdruntime.adapters.file import AdapterFile
from sdruntime.adapters.lora import Lora
from sdruntime.adapters.names import Shape
from sdruntime.adapters.sets import AdapterSet, Fitted, fit
from sdruntime.backends.onnx_file.stored import weight_tensors
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.roles import of_kind
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.requests.tags import check_untagged

KEPT_FILES = 32


class Loras:
    """The LoRAs of requests to a bundle's model."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._shapes: dict[str, dict[str, Shape]] = {}
        self._fitted: dict[Path, Fitted] = {}  # ordered by use: the most recent file is last

    def set_of(self, request: Request) -> AdapterSet | None:
        """Return what a request's LoRAs change, None if that is nothing.

        Raises SettingError for a file that is damaged or was made for another model.
        """
        if not request.loras:
            return None
        adapters = AdapterSet.of((self._weighted(lora), *lora.scales) for lora in request.loras)
        return adapters if adapters.members else None

    def check(self, requests: Sequence[Request], most: int) -> None:
        """Check the LoRAs of requests that run together; `most`: how many sets can. Raises SettingError."""
        for request in requests:
            check_untagged(request)
        sets = {self.set_of(request) for request in requests} - {None}
        if len(sets) > most:
            raise SettingError(
                f"loras: {len(sets)} different sets of LoRAs in one call; the maximum is {most}: make a call for each set, "
                "or use a Batcher, where requests take turns"
            )

    def hashes(self, request: Request) -> dict[str, str]:
        """Return the hash of each LoRA of a request by its name, as AUTOMATIC1111's web UI writes them."""
        files = [self._fitted[path].file for lora in request.loras if (path := Path(lora.path)) in self._fitted]
        return {file.name: file.short_hash for file in files}

    def unused(self, request: Request) -> Iterator[str]:
        """Yield a line for each LoRA of a request that changes nothing."""
        for lora in request.loras:
            layers, (unet, text) = self._weighted(lora).layers, lora.scales
            if not any(unet if component == UNET else text for component in layers):
                changed = ", ".join(self._fit(Path(lora.path)).layers)
                yield f"the LoRA {Path(lora.path).name} has no effect: its strength is 0 in what it changes ({changed})"

    def _weighted(self, lora: Lora) -> Fitted:
        return self._fit(Path(lora.path)).weighted(lora.blocks, self._components())

    def _fit(self, path: Path) -> Fitted:
        fitted = self._fitted.pop(path, None)
        if fitted is None or not fitted.file.unchanged():
            fitted = fit(AdapterFile.open(path), self._components(), self._bundle.manifest.model.name)
        self._fitted[path] = fitted
        while len(self._fitted) > KEPT_FILES:
            del self._fitted[next(iter(self._fitted))]
        return fitted

    def _components(self) -> dict[str, dict[str, Shape]]:
        if not self._shapes:
            for name in of_kind(self._bundle.manifest.components, "text encoder", "denoiser"):
                self._shapes[name] = {weight: tensor.shape for weight, tensor in weight_tensors(self._bundle, name).items()}
        return self._shapes
