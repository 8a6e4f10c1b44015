"""Remove paths, addresses and the names of the host and its user from text that leaves the machine."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
from pathlib import Path
from typing import Any

_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"`,;:()<>\[\]/\\]+[/\\])+([^\s'\"`,;:()<>\[\]/\\]*)")
_ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?=:\d)|https?://[^\s/]+|[\w.+-]+@[\w-]+\.[\w.-]+")
_LONGEST = 2000
_COMMON = ("root", "user", "localhost", "ubuntu", "nvidia", "jetson", "runner", "admin", "tensorrt")


def cleaned(document: Any) -> Any:
    """Return a JSON document with `clean` applied to every string."""
    if isinstance(document, str):
        return clean(document)
    if isinstance(document, dict):
        return {clean(str(key)): cleaned(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [cleaned(value) for value in document]
    return document


def clean(text: str) -> str:
    """Shorten paths to ".../name"; replace addresses and the names of this machine and its user."""
    text = _ADDRESS.sub("(address)", _PATH.sub(r".../\1", text[:_LONGEST]))
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(name)", text, flags=re.IGNORECASE)
    return text


def _names() -> list[str]:
    """Return the names of this machine and its user, except common ones."""
    names = {socket.gethostname(), socket.gethostname().split(".")[0], Path.home().name, os.environ.get("USER", "")}
    with contextlib.suppress(Exception):  # a user without an entry, as in a container
        names.add(getpass.getuser())
    return sorted((name for name in names if len(name) > 2 and name.lower() not in _COMMON), key=len)[::-1]
