"""Map large files for a library: hash them while it reads, detect changes, and never keep all of them in memory.

A map shows the current content of its file. So the library must copy what it needs, and it is a fault if the file is written to
before it has done so (`watching`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from sdruntime.system.files import Stamp, hash_of

_PAUSE = 0.05  # seconds

Verify = Callable[[str, str], None]  # takes a path and its SHA-256; raises if the hash is wrong


@contextlib.contextmanager
def hashing(files: Mapping[str, int], verify: Verify) -> Iterator[None]:
    """Hash open files on a thread while the block runs, and call `verify` with each hash at its end.

    An error of `verify` replaces an error of the block.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        hashes = {path: pool.submit(hash_of, descriptor, stopped.is_set) for path, descriptor in files.items()}
        try:
            yield
        except Exception:
            for path, future in hashes.items():
                verify(path, future.result())
            raise
        except BaseException:
            stopped.set()
            raise
        for path, future in hashes.items():
            verify(path, future.result())


@contextlib.contextmanager
def watching(files: Mapping[str, int], changed: Callable[[list[str]], Exception]) -> Iterator[None]:
    """Raise `changed(paths)` at the end of the block, or in place of its error, if open files were written to meanwhile."""
    stamps = {path: Stamp.of(descriptor) for path, descriptor in files.items()}

    def written() -> list[str]:
        return [path for path, stamp in stamps.items() if not stamp.holds(files[path])]

    try:
        yield
    except Exception as error:
        if paths := written():
            raise changed(paths) from error
        raise
    if paths := written():
        raise changed(paths)


def mapped(descriptor: int) -> memoryview:
    """Map an open file, read-only, while the view is in use. Reading it after the file was truncated kills the process."""
    if os.fstat(descriptor).st_size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


@contextlib.contextmanager
def releasing_pages(view: memoryview) -> Iterator[None]:
    """Release the pages of a view from `mapped` again and again while the block runs.

    So they are never all in memory beside the library's copy. A released page is read from the file again when it is accessed.
    Does nothing if the system has no madvise.
    """
    done = threading.Event()
    thread = threading.Thread(target=_release_pages, args=(view.obj, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _release_pages(mapping: object, done: threading.Event) -> None:
    last = not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED")
    while not last:
        last = done.wait(_PAUSE)
        mapping.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
