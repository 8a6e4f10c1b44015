"""Documents from elsewhere: how large, how deep and of which kind a file may be, and what reading one may cost."""

from __future__ import annotations

import difflib
import io
import json
import os
import signal
import socket
import tracemalloc
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from descriptors import open_files
from places import FIXTURE

from sdruntime.bundle.manifest import load_manifest
from sdruntime.bundle.records import DEEPEST, json_from_text, read_json, record_from_json, twins
from sdruntime.errors import BundleError, UnknownName
from sdruntime.system import document
from sdruntime.system.document import LARGEST, open_regular, read_document
from sdruntime.verification.npz import read_npz


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """A read that blocks ends the test, not the session."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name has 100 bytes at most
        try:
            listening.bind(path.name)
        finally:
            os.chdir(here)


SPECIAL = {
    "a FIFO": fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a socket": bound_socket,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    SPECIAL[kind](tmp_path / "manifest.json")
    opened: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(document.os, "open", lambda *arguments: opened.append(arguments))
        for read in (open_regular, read_document, read_json):
            with pytest.raises(ValueError, match=f"{kind}, not a regular file"):
                read(tmp_path / "manifest.json")
    assert opened == []  # opening a FIFO wakes who writes to it, opening a device may do anything
    with pytest.raises(BundleError, match=r"not a regular file|not a bundle"):
        load_manifest(tmp_path)


def test_a_fifo_that_takes_the_name_meanwhile_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("{}")
    real = os.open
    monkeypatch.setattr(document.os, "open", lambda path, flags: real(tmp_path / "pipe", flags))
    before = open_files()
    with pytest.raises(ValueError, match="a FIFO, not a regular file"):
        read_document(tmp_path / "file")
    assert open_files() == before


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == {"a": 1}


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes; at most 8,388,608 are read"):
        read_document(tmp_path / "sparse")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    (tmp_path / "whole").write_bytes(b" " * LARGEST)
    assert len(read_document(tmp_path / "whole")) == LARGEST
    assert read_document(tmp_path / "whole", most=LARGEST)[:1] == b" "


def test_a_file_that_grows_is_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of /proc, whose size is 0."""
    with pytest.raises(ValueError, match="11 bytes; at most 10 are read"):
        read_document("/proc/self/status" if Path("/proc/self/status").exists() else pytest.skip("no /proc"), most=10)


@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_nesting_has_a_limit(pair: str) -> None:
    def nested(depth: int) -> str:
        return pair[:-1] * (depth - 1) + pair.replace(":", ":1") + pair[-1] * (depth - 1)

    assert json_from_text(nested(DEEPEST))
    for depth in (DEEPEST + 1, 500, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            json_from_text(nested(depth))


@pytest.mark.parametrize("number", [0, 2**64, -(10**30), 10**308])
def test_whole_numbers_within_float64_are_read(number: int) -> None:
    assert json_from_text(str(number)) == number


@pytest.mark.parametrize("digits", ["9" * 309, "9" * 5000, "-" + "1" * 100_000])
def test_larger_whole_numbers_are_refused(digits: str) -> None:
    with pytest.raises(ValueError, match="is beyond float64"):
        json_from_text(f'{{"a": {digits}}}')


@dataclass(frozen=True, kw_only=True)
class Whole:
    number: int = 0


@pytest.mark.parametrize(("number", "fits"), [(2**64 - 1, True), (-(2**63), True), (2**64, False), (-(2**63) - 1, False)])
def test_a_whole_number_of_a_record_has_64_bits(number: int, fits: bool) -> None:
    faults: list[str] = []
    record_from_json(Whole, {"number": number}, where="", faults=faults)
    assert faults == [] if fits else faults == [f"number: expected a whole number of 64 bits, got {number}"]


class Counted(str):
    """Text that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_twins_are_found_without_comparing_all_with_all() -> None:
    names = [Counted(f"tensor{number}") for number in range(2000)] + [Counted("tensor7")]
    Counted.compared = 0
    assert twins(names) == ["tensor7"]
    assert Counted.compared < 10 * len(names)


def test_a_key_that_stands_twice_among_many() -> None:
    text = ",".join(f'"key{number}": 0' for number in range(100_000))
    with pytest.raises(ValueError, match="the key 'key7' appears twice"):
        json_from_text(f'{{{text}, "key7": 1}}')


@dataclass(frozen=True, kw_only=True)
class Small:
    name: str = ""


def test_many_unknown_keys_are_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    real = difflib.get_close_matches

    def counting(word: str, *more: Any, **named: Any) -> list[str]:
        compared.append(word)
        return real(word, *more, **named)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    faults: list[str] = []
    record_from_json(Small, {f"nam{number}": 0 for number in range(100_000)}, where="", faults=faults)
    assert len(faults) == 100_000
    assert "did you mean name?" in faults[0]
    assert len(compared) == 20
    with pytest.raises(UnknownName):
        raise UnknownName("sampler", "x" * 1_000_000, ["euler"])
    assert len(compared) == 20


def test_an_error_lists_a_hundred_faults_and_counts_the_rest() -> None:
    error = BundleError("here", [f"fault {number} " + "x" * 10_000 for number in range(100_000)])
    assert len(error.faults) == 100_000
    assert len(str(error)) < 110_000
    assert str(error).splitlines()[0] == "here: 100000 faults"
    assert str(error).splitlines()[-1] == "  - … and 99,900 more"


# ---- npz -------------------------------------------------------------------------------------------------------------


def packed(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def member(data: bytes, name: str = "a.npy", *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as zipped:
        zipped.writestr(name, data)
    return file.getvalue()


def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + body


def test_arrays_come_back_as_they_were_packed() -> None:
    arrays = {
        "picture.0": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "unet.smallest.out": np.linspace(-1, 1, 9, dtype=np.float32),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float16),
        "one": np.array(3, np.int64),
    }
    found = read_npz(packed(**arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert (found[name] == array).all()
    stored = io.BytesIO()
    np.savez(stored, **arrays)  # type: ignore[arg-type]
    assert list(read_npz(stored.getvalue())) == list(arrays)


def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_does() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped, zipped.open("a.npy", "w") as inner:
        for _ in range(64):
            inner.write(bytes(1 << 20))
    lying = bytearray(file.getvalue())
    for signature, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):  # the directory and the member say 100 bytes
        place = lying.index(signature) + at
        lying[place : place + 4] = (100).to_bytes(4, "little")
    for data in (file.getvalue(), bytes(lying)):
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"at most 16,777,216 are read|not a whole zip|not an array"):
            read_npz(data)
        assert tracemalloc.get_traced_memory()[1] < 8e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a whole zip file"),
        (packed(a=np.zeros(9))[:-9], "not a whole zip file"),
        (packed(a=np.array([{}], object)), "does not hold plain numbers"),
        (packed(a=np.zeros(2, [("x", "f4")])), "does not hold plain numbers"),
        (packed(a=np.asfortranarray(np.zeros((2, 3)))), "does not hold plain numbers"),
        (packed(a=np.array(["text"])), "does not hold plain numbers"),
        (member(b"text", "a.txt"), "not an array"),
        (member(b"", "a.npy"), "not an array"),
        (member(packed(), "a.npy", method=zipfile.ZIP_BZIP2), "not an array"),
        (member(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }")), "1000000000000"),
        (member(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999999), }")), "expected float32"),
        (
            member(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(4))),
            "expected float32 \\[2\\], got 4 bytes",
        ),
        (member(npy("{'descr': '<i3', 'fortran_order': False, 'shape': (2,), }", bytes(6))), "a.npy"),
        (member(npy("(" * 9000, b"")), "damaged"),
    ],
)
def test_a_damaged_file_of_arrays_is_told(data: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_npz(data)


def test_a_manifest_of_20_000_tensors_is_read(tmp_path: Path) -> None:
    """It took 13 seconds, and 1 MB over two minutes: each name was looked for among all."""
    manifest = json.loads((FIXTURE / "manifest.json").read_text())
    inputs = manifest["components"]["unet"]["inputs"]
    inputs += [{"name": f"t{number}", "dtype": "float32", "shape": ["batch"]} for number in range(20_000)]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(load_manifest(tmp_path).components["unet"].inputs) == 20_003
    inputs += inputs[-2:]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="tensor named twice: t19998, t19999"):
        load_manifest(tmp_path)
