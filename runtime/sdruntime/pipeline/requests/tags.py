"""`<lora:name:0.8>` in prompts, as AUTOMATIC1111's web UI has it: a file of a folder, by its name without the ending.

`<lora:name:0.5:0.8>` is 0.5 in the text encoders and 0.8 in the UNet; `te=` and `unet=` name them, and `lbw=` lists strengths by
block. Only prompts have tags, not negative prompts.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from sdruntime.adapters.blocks import text_of, weights_from
from sdruntime.adapters.lora import Lora
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.requests.request import Request

_TAG = re.compile(r"<(lora|lyco):([^<>]{1,800})>")
_MOST_FILES = 100_000


def has_tags(text: str | None) -> bool:
    """Return whether a text has the tag of a LoRA."""
    return text is not None and _TAG.search(text) is not None


def with_tagged(request: Request, folder: Path | str | None) -> Request:
    """Return the request with the LoRAs of the tags in its prompts, which are removed. "plain" texts have no tags.

    `folder`: where the files are, also in folders below it. Raises UnknownName for a name that no file has, SettingError for a
    tag without a folder and for a strength that is no number.
    """
    if request.prompt_syntax == "plain" or not any(map(has_tags, (request.prompt, request.prompt_2))):
        return request
    if folder is None:
        raise SettingError(f"the prompt has {_first(request)}: name the folder of the LoRAs too (--lora-dir), or use --lora FILE")
    files = files_of(Path(folder))
    loras: list[Lora] = []
    texts = {name: getattr(request, name) for name in ("prompt", "prompt_2")}
    for name, text in texts.items():
        if text is not None:
            loras += [_lora(match[2], files) for match in _TAG.finditer(text)]
            texts[name] = _TAG.sub("", text)
    return replace(request, **texts, loras=(*request.loras, *dict.fromkeys(loras)))


def check_untagged(request: Request) -> None:
    """Raises SettingError for a tag that nobody has read."""
    texts = (request.prompt, request.prompt_2, request.negative, request.negative_2)
    if request.prompt_syntax == "a1111" and any(map(has_tags, texts)):
        raise SettingError(
            f"{_first(request)} in a text: pass loras=[Lora(file, strength)] (--lora FILE), or --lora-dir for tags in the "
            "prompt; negative prompts cannot have tags"
        )


def tag_of(lora: Lora) -> str:
    """Return the tag of a LoRA, for the metadata of an image."""
    unet, text = lora.scales
    name = Path(lora.path).stem
    strengths = f"{unet:g}" if unet == text else f"{text:g}:{unet:g}"
    return f"<lora:{name}:{strengths}{text_of(lora.blocks)}>"


def _first(request: Request) -> str:
    texts = (request.prompt, request.prompt_2, request.negative, request.negative_2)
    return next(match[0] for text in texts if text is not None and (match := _TAG.search(text)))


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and of those below it, by their names without endings; the first of equal names."""
    if not folder.is_dir():
        raise SettingError(f"--lora-dir {folder}: no such folder")
    files: dict[str, Path] = {}
    for count, path in enumerate(sorted(folder.rglob("*.safetensors"))):
        if count >= _MOST_FILES:
            raise SettingError(f"--lora-dir {folder}: more than {_MOST_FILES:,} files")
        files.setdefault(path.stem, path)
    return files


def _lora(text: str, files: dict[str, Path]) -> Lora:
    name, *parts = (part.strip() for part in text.split(":"))
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    scales = [part for part in parts if "=" not in part]
    if name not in files:
        raise UnknownName("LoRA", name, files)
    if unknown := named.keys() - {"te", "unet", "lbw"} or scales[2:]:
        raise SettingError(f"<lora:{text}>: {', '.join(unknown)}: expected <lora:name:strength> or <lora:name:text:unet>")
    text_scale = named.get("te", scales[0] if scales else "1")
    unet_scale = named.get("unet", scales[1] if len(scales) > 1 else text_scale)
    try:
        blocks = weights_from(named["lbw"]) if "lbw" in named else ()
        return Lora(files[name], float(unet_scale), float(text_scale), blocks)
    except ValueError as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"<lora:{text}>: the strength is not a number") from None
