"""The exact Python surface of each TensorRT that is supported: classes, members, signatures, read off the vendor's own binding.

A binding is a wheel of some 1.3 MB (pip fetches it into .venv-trt, once). It needs the engine library, two gigabytes, only to
be linked with: nine functions, which a stub has too, and importing calls none of them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import ROOT
from trt.signature import Signature, signatures

CACHE = ROOT / ".venv-trt"
_DUMP = Path(__file__).with_name("dump.py")
_LINKED = """createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParser_INTERNAL
    createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry
    initLibNvInferPlugins""".split()
_UNREACHABLE = (
    "Retrying (",
    "NewConnectionError",
    "ConnectTimeout",
    "name resolution",
    "Connection refused",
    "Network is unreach",
)


class Offline(Exception):
    """pip could not fetch a binding, since nothing could be reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Where a binding comes from: its package, the module in it, and the libraries that it is linked with."""

    module: str  # as users import it
    package: str
    version: str
    links: tuple[str, ...]

    @property
    def binding(self) -> str:
        return f"{self.module}_bindings"

    def __str__(self) -> str:
        return f"{self.module} {self.version}"


def _tensorrt(package: str, version: str) -> Version:
    major = version.split(".")[0]
    links = tuple(f"lib{name}.so.{major}" for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"))
    return Version(module="tensorrt", package=package, version=version, links=links)


VERSIONS = (
    _tensorrt("tensorrt-cu12-bindings", "10.3.0"),
    _tensorrt("tensorrt-cu12-bindings", "10.16.1.11"),
    _tensorrt("tensorrt-cu13-bindings", "11.4.0.106"),
    Version(
        module="tensorrt_rtx",
        package="tensorrt-rtx-cu13-bindings",
        version="1.7.1.116",
        links=("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """`kind` is "method", "static", "property", "enum" (a member of the enumeration `target`) or "class" (its other name)."""

    kind: str
    signatures: tuple[Signature, ...] = ()  # of a property: how it is read
    setters: tuple[Signature, ...] = ()
    readable: bool = True
    writable: bool = False
    target: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """`members` are its own; those of its `bases` are not among them. `values` are an enumeration's."""

    name: str
    bases: tuple[str, ...]
    is_enum: bool
    values: dict[str, int]
    members: dict[str, Member]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """`constants` are module attributes that are members of an enumeration, as (enumeration, member)."""

    module: str
    version: str
    classes: dict[str, Class]
    constants: dict[str, tuple[str, str]]
    functions: dict[str, tuple[Signature, ...]]

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split("."))

    def find(self, name: str, member: str) -> tuple[str, Member] | None:
        """(the class that has it, the member), in a class or its bases."""
        if member in self.classes[name].members:
            return name, self.classes[name].members[member]
        found = [self.find(base, member) for base in self.classes[name].bases]
        return next((one for one in found if one is not None), None)

    def has(self, path: str) -> bool:
        """Whether "Class.member", "Enumeration.MEMBER" or a name of the module is there."""
        if path in self.classes or path in self.constants or path in self.functions:
            return True
        name, _, member = path.rpartition(".")
        return name in self.classes and (member in self.classes[name].values or self.find(name, member) is not None)

    def names(self) -> Iterator[str]:
        """Every name that may stand after a dot, special methods apart."""
        yield from self.constants
        yield from self.functions
        for path, one in self.classes.items():
            yield path.rsplit(".", 1)[-1]
            yield from one.values
            yield from (member for member in one.members if not member.startswith("__"))


@functools.cache
def surface(version: Version) -> Surface:
    """Fetch the binding if it is not in the cache, and read it. Raises Offline."""
    folder = fetch(version)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(_DUMP), str(folder), version.binding],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder / "stubs"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{version}: the binding cannot be imported: {done.stderr}")
    return parsed(version.module, json.loads(done.stdout))


def fetch(version: Version) -> Path:
    """The folder with the binding and the stubs of what it is linked with."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    folder = CACHE / f"{version.package}-{version.version}-{python}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "binding"
            _install(version, made)
            _stub(version, made / "stubs")
            try:
                made.rename(folder)
            except OSError:  # another process was quicker
                if not folder.exists():
                    raise
    return folder


def _install(version: Version, folder: Path) -> None:
    requirement = f"{version.package}=={version.version}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    done = subprocess.run([*pip, "--target", str(folder), requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        if any(sign in done.stderr for sign in _UNREACHABLE):
            raise Offline(f"{requirement}: {done.stderr}")
        raise RuntimeError(f"{requirement}: pip failed: {done.stderr}")


def _stub(version: Version, folder: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("the bindings need a stub of the engine library, and there is no C compiler: install gcc")
    folder.mkdir()
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _LINKED))
    for soname in version.links:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(folder / soname), str(source)]
        subprocess.run(command, check=True, capture_output=True)


def parsed(module: str, dump: dict[str, Any]) -> Surface:
    """The surface, from what `dump.py` prints."""
    classes = {
        name: Class(
            name=name,
            bases=tuple(raw["bases"]),
            is_enum=raw["is_enum"],
            values=raw["enum"],
            members={key: _member(member) for key, member in raw["members"].items()},
        )
        for name, raw in dump["classes"].items()
    }
    return Surface(
        module=module,
        version=dump["version"],
        classes=classes,
        constants={name: (enumeration, member) for name, (enumeration, member) in dump["constants"].items()},
        functions={name: signatures(doc, method=False) for name, doc in dump["functions"].items()},
    )


def _member(raw: dict[str, Any]) -> Member:
    kind = raw["kind"]
    if kind in ("method", "static"):
        return Member(kind=kind, signatures=signatures(raw["doc"], method=kind == "method"))
    if kind == "property":
        return Member(
            kind=kind,
            signatures=signatures(raw["doc"], method=True),
            setters=signatures(raw["setter"], method=True),
            readable=raw["readable"],
            writable=raw["writable"],
        )
    return Member(kind=kind, target=raw.get("of") or raw["target"], value=raw.get("member", ""))
