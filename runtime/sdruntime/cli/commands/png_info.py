"""The command `png-info`: the settings in an image's file."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdruntime.cli.terminal import document
from sdruntime.errors import printable

_LETTERS = 400  # of a text that is not ours


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `png-info`."""
    sub.add_argument("file", type=Path, metavar="FILE", help="a PNG, or with Pillow a JPEG or WebP")


def png_info(options: argparse.Namespace) -> None:
    """Run `sdruntime png-info`."""
    from sdruntime.pipeline.images.imagefile import text_of_image
    from sdruntime.pipeline.metadata.read import infotext, settings_of

    texts = text_of_image(options.file)
    parts = infotext(texts.get("parameters", ""))
    settings = settings_of(parts)
    if options.json:
        document(
            file=str(options.file),
            texts=texts,
            settings={"Prompt": parts.prompt, "Negative prompt": parts.negative, **parts.pairs} if "parameters" in texts else {},
            request=dict(settings.request) if "parameters" in texts else {},
            missing=list(settings.missing),
            unused=list(settings.unused),
        )
        return
    if not texts:
        print(f"{options.file}: no settings in this file")
    for key, text in texts.items():
        shown = text if key == "parameters" or len(text) <= _LETTERS else f"{text[:_LETTERS]}…"
        print(f"{printable(key)}:")
        print("\n".join(f"  {printable(line)}" for line in shown.splitlines()))
    if "parameters" in texts:
        print(f"the same with sdruntime:\n  {command(settings.request)}")
        for part in settings.missing:
            print(f"not in the file: the {part.replace('_', ' ')}")
        for line in settings.unused:
            print(f"not used: {printable(line)}")


def command(request: Mapping[str, Any]) -> str:
    """Return the command that generates with the fields of a Request."""
    settings = {"prompt_syntax": "plain", **request}  # the command line's own default is "a1111"
    prompt = settings.pop("prompt")
    words = ["sdruntime", "generate", "BUNDLE", *([] if prompt.startswith("-") else [prompt]), "-o", "image.png"]
    for key, value in settings.pop("options", {}).items():
        words += ["--option", f"{key}={json.dumps(value)}"]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words += [flag, ("x" if name.endswith(("size", "resize")) else ",").join(map(str, value))]
        elif value is not None and value is not False:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return printable(shlex.join([*words, "--", prompt] if prompt.startswith("-") else words))
