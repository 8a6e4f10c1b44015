"""What is lent to a library: its hash, its memory, and changes by others while it is read."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.lending import mapped, releasing_pages
from sdruntime.errors import BundleError
from sdruntime.system import files
from sdruntime.system.files import Stamp


def mapped_file(path: Path) -> memoryview:
    with path.open("rb") as file:
        return mapped(file.fileno())


def test_a_view_that_is_given_back_keeps_its_bytes(bundle: Bundle) -> None:
    before = threading.active_count()
    for path in bundle.manifest.files:
        view = mapped_file(bundle.folder / path)
        with releasing_pages(view):
            for _ in range(3):
                assert bytes(view) == (bundle.folder / path).read_bytes()
                time.sleep(0.06)
        assert bytes(view) == (bundle.folder / path).read_bytes()
    with releasing_pages(memoryview(b"of no file")):
        pass
    assert threading.active_count() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_view_that_is_given_back_is_not_held_in_memory(tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(1 << 26))

    def resident() -> int:
        return int(
            next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")).split()[1]
        )

    before = resident()
    view = mapped_file(large)
    assert sum(view[:: mmap.PAGESIZE]) > 0
    assert resident() - before > 60_000
    with releasing_pages(view):
        pass
    assert resident() - before < 10_000


def test_what_is_lent_is_what_read_gives(bundle: Bundle) -> None:
    before = threading.active_count()
    with bundle.lending(bundle.manifest.files) as lent:
        taken = {path: bytes(view) for path, view in lent.items()}
    assert taken == {path: bytes(bundle.read(path)) for path in bundle.manifest.files}
    with bundle.lending([]) as lent:
        assert lent == {}
    assert threading.active_count() == before


@pytest.fixture
def changed(bundle: Bundle) -> str:
    """A file that another of the same size has taken the place of."""
    path = max(bundle.manifest.files, key=lambda path: bundle.manifest.files[path].size)
    place = bundle.folder / path
    place.write_bytes(bytes(place.stat().st_size))
    return path


def test_what_is_lent_and_was_changed_is_told_after_the_block(bundle: Bundle, changed: str) -> None:
    reached = False
    with pytest.raises(BundleError, match=f"{changed}: changed since it was written"), bundle.lending([changed]):
        reached = True
    assert reached


def test_a_change_is_told_in_place_of_what_it_led_to(bundle: Bundle, changed: str) -> None:
    with pytest.raises(BundleError, match=f"{changed}: changed since it was written"), bundle.lending([changed]):
        raise RuntimeError("these weights make no sense")
    sound = next(path for path in bundle.manifest.files if path != changed)
    with pytest.raises(RuntimeError, match="another reason"), bundle.lending([sound]):
        raise RuntimeError("another reason")
    with pytest.raises(BundleError, match=r"unlisted\.bin: not among the manifest's files"), bundle.lending(["unlisted.bin"]):
        pass


def test_an_interrupt_does_not_wait_for_the_hash(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, interrupted = [], threading.Event()
    path = max(bundle.manifest.files, key=lambda path: bundle.manifest.files[path].size)

    class Digest:
        def update(self, data: memoryview) -> None:
            hashed.append(len(data))
            interrupted.wait()
            time.sleep(0.001)  # the block's end comes before that of the file

        def hexdigest(self) -> str:
            return ""

    def interrupt() -> None:
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.hashlib, "sha256", Digest)
    monkeypatch.setattr(files, "_CHUNK", 1)
    with pytest.raises(KeyboardInterrupt), bundle.lending([path]):
        interrupt()
    assert len(hashed) < bundle.manifest.files[path].size


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def cut_short(path: Path) -> None:
    os.truncate(path, 1)


def write_and_restore_the_time(path: Path) -> None:
    before = path.stat()
    write_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [write_in_place, cut_short, write_and_restore_the_time])
@pytest.mark.parametrize("verified", [False, True])
def test_a_file_that_is_written_to_while_it_is_lent_is_a_fault(
    bundle: Bundle, change: Callable[[Path], None], verified: bool
) -> None:
    """Also where the hash is of the old bytes: the library may have seen the new ones."""
    path = "tokenizer/vocab.json"
    with pytest.raises(BundleError, match=rf"{path}: changed while it was read"), bundle.lending([path], verified=verified):
        change(bundle.folder / path)
    with pytest.raises(BundleError, match=path):
        bundle.read(path)


def test_what_a_change_led_to_is_not_what_is_raised(bundle: Bundle) -> None:
    path = "tokenizer/vocab.json"
    with pytest.raises(BundleError, match="changed while it was read"), bundle.lending([path], verified=True):  # noqa: PT012
        write_in_place(bundle.folder / path)
        raise RuntimeError("these weights make no sense")


def test_another_file_of_the_name_and_another_link_are_no_change(bundle: Bundle, tmp_path: Path) -> None:
    """What is lent stays what it was when its name goes to another file (`sdexport build` over an open bundle)."""
    path = "tokenizer/vocab.json"
    place, other = bundle.folder / path, tmp_path / "other"
    kept = place.read_bytes()
    other.write_bytes(b"x" * len(kept))
    with bundle.lending([path]):
        os.link(place, tmp_path / "link")
    with bundle.lending([path]) as lent:
        other.rename(place)
        assert bytes(lent[path]) == kept
    with pytest.raises(BundleError, match="changed since it was written"):
        bundle.read(path)


def test_names_are_lent_only_while_they_lead_to_what_was_hashed(bundle: Bundle, tmp_path: Path) -> None:
    path = "tokenizer/vocab.json"
    with bundle.lending_names([path]):
        pass
    kept = (bundle.folder / path).rename(tmp_path / "kept")
    (bundle.folder / path).write_bytes(kept.read_bytes())
    with pytest.raises(BundleError, match="changed while it was read"), bundle.lending_names([path]):  # noqa: PT012
        (bundle.folder / path).unlink()
        (bundle.folder / path).symlink_to(kept)
    with pytest.raises(BundleError, match="not a regular file"), bundle.lending_names([path]):
        pass


def test_a_stamp_is_taken_of_a_file_at_rest(tmp_path: Path) -> None:
    """Writes within one tick of the kernel's clock carry one time: each must be seen all the same."""
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        for number in range(30):
            file.write(b"x")
            stamp = Stamp.of(file.fileno())
            assert stamp.holds(file.fileno())
            file.seek(0)
            file.write(b"y")
            assert not stamp.holds(file.fileno()), number


def test_what_was_read_is_this_processs_own(bundle: Bundle) -> None:
    path = "tokenizer/vocab.json"
    data = bundle.read(path)
    kept = bytes(data)
    cut_short(bundle.folder / path)
    assert bytes(data) == kept
    assert data.readonly


def test_an_open_bundle_is_the_folder_that_was_opened(bundle: Bundle) -> None:
    """Another folder that took its name is another bundle."""
    kept = {path: bytes(bundle.read(path)) for path in bundle.manifest.files}
    bundle.folder.rename(bundle.folder.with_name("moved"))
    bundle.folder.mkdir()
    assert {path: bytes(bundle.read(path)) for path in bundle.manifest.files} == kept


READS = """
import os, sys
from sdruntime.bundle.bundle import Bundle
from sdruntime.errors import BundleError
bundle = Bundle.open(sys.argv[1])
data = bundle.read("tokenizer/vocab.json")
os.truncate(sys.argv[1] + "/tokenizer/vocab.json", 0)
print(sum(data))
try:
    with bundle.lending(["tokenizer/vocab.json"]) as lent:
        print(sum(lent["tokenizer/vocab.json"]))
except BundleError:
    sys.exit(5)
"""


def test_a_file_that_is_cut_short_does_not_end_the_process(bundle: Bundle) -> None:
    done = subprocess.run([sys.executable, "-c", READS, str(bundle.folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert len(done.stdout.split()) == 1
