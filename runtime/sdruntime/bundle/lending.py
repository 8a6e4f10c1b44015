"""Large files that a library takes in: hashed meanwhile, watched for changes, and never all in memory.

A map of a file shows whatever is in the file. So a library must copy what it needs from a map, and a file that is written to
before it has done so is a fault (`watching`).
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

Verify = Callable[[str, str], None]  # path and the hash that was found; raises where it is another one


@contextlib.contextmanager
def hashing(files: Mapping[str, int], verify: Verify) -> Iterator[None]:
    """While the block runs, hash open files on a thread; `verify` is called with each hash at the end of the block.

    What `verify` raises takes the place of what went wrong in the block.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        hashes = {path: pool.submit(hash_of, descriptor, stopped.is_set) for path, descriptor in files.items()}
        try:
            yield
        except Exception:
            for path, found in hashes.items():
                verify(path, found.result())
            raise
        except BaseException:
            stopped.set()
            raise
        for path, found in hashes.items():
            verify(path, found.result())


@contextlib.contextmanager
def watching(files: Mapping[str, int], changed: Callable[[list[str]], Exception]) -> Iterator[None]:
    """Raise `changed(paths)` at the end of the block, or in place of its error, if open files were written to in it."""
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
    """Map an open file, read-only, for as long as the view is used. Touched after the file was cut short, it ends the process."""
    if os.fstat(descriptor).st_size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


@contextlib.contextmanager
def giving_back(view: memoryview) -> Iterator[None]:
    """While a library takes in a view that `mapped` returned: its pages go back to the system again and again, so that they are
    never all in memory beside what the library makes of them. Touched later, a byte is read from the file again. Where the system
    has no such call, nothing."""
    done = threading.Event()
    giver = threading.Thread(target=_give_back, args=(view.obj, done), daemon=True)
    giver.start()
    try:
        yield
    finally:
        done.set()
        giver.join()


def _give_back(mapping: object, done: threading.Event) -> None:
    last = not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED")
    while not last:
        last = done.wait(_PAUSE)
        mapping.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
