"""What a process does to the files below a folder, operation by operation: to kill it at any of them, to let any of them fail,
and to work out which states a power cut could have left.

The model of a power cut is strict. A file's data lasts once the file has been synced; before, it may be missing, cut short, or
zeros. A name lasts once its folder has been synced; before, it may lead where it led at the last sync, or at any time since,
each name on its own. So nothing is taken from the order of operations but what a sync promises.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

Tree = dict[str, Union[bytes, "Tree"]]
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "ctypes.dlsym")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@contextlib.contextmanager
def watched(before: Callable[[], None], synced: Callable[[int], None] = lambda _: None) -> Iterator[None]:
    """Call `before` before each operation of this process that changes files or syncs them, `synced` with the open file after a
    sync. `before` may raise, and the operation fails. For a process of its own: the hook stays for its life."""
    state = {"on": True}

    def call(function: Callable[..., None], *arguments: Any) -> None:
        if state["on"]:
            state["on"] = False
            try:
                function(*arguments)
            finally:
                state["on"] = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES):
            call(before)

    def fsync(handle: int) -> None:
        call(before)
        sync(handle)
        call(synced, handle)

    sync, os.fsync = os.fsync, fsync
    sys.addaudithook(hook)
    try:
        yield
    finally:
        call(before)
        state["on"], os.fsync = False, sync


@dataclass
class Recorder:
    """The history of the files below `root`: inodes are numbered as they are seen, and kept open so that none is used again."""

    root: Path
    folders_last: bool = True  # whether a sync of a folder counts
    names: dict[tuple[int, str], list[tuple[int, int | None]]] = field(default_factory=dict)  # (folder, name) -> (step, inode)
    contents: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    folders: set[int] = field(default_factory=set)
    syncs: dict[int, list[int]] = field(default_factory=dict)
    step: int = 0
    _open: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.top = self.root.stat().st_ino
        self.look()
        self.syncs = {inode: [0] for inode in {*self.contents, *self.folders}}

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with watched(self.look, self.sync):
            yield

    def look(self) -> None:
        """Write down what has changed since the last look: one operation's worth."""
        found: dict[tuple[int, str], int] = {}
        changed = self._walk(self.root, found)
        for key, inode in found.items():
            changed |= self._note(self.names, key, inode)
        for key in self.names.keys() - found.keys():
            changed |= self._note(self.names, key, None)
        self.step += changed

    def _walk(self, folder: Path, found: dict[tuple[int, str], int]) -> bool:
        changed, at = False, folder.stat().st_ino
        self.folders.add(at)
        for entry in os.scandir(folder):
            inode = entry.inode()
            found[at, entry.name] = inode
            if inode not in self._open:
                self._open[inode] = os.open(entry.path, os.O_RDONLY)
            if entry.is_dir(follow_symlinks=False):
                changed |= self._walk(Path(entry.path), found)
            else:
                changed |= self._note(self.contents, inode, Path(entry.path).read_bytes())
        return changed

    def _note(self, history: dict[Any, list[tuple[int, Any]]], key: Any, value: Any) -> bool:
        versions = history.setdefault(key, [])
        if (versions[-1][1] if versions else None) == value:
            return False
        versions.append((self.step + 1 if self.syncs else 0, value))
        return True

    def sync(self, handle: int) -> None:
        status = os.fstat(handle)
        if self.folders_last or not stat.S_ISDIR(status.st_mode):
            self.step += 1
            self.syncs.setdefault(status.st_ino, []).append(self.step)

    def possible(self, history: list[tuple[int, Any]], synced: int, until: int) -> list[Any]:
        """What a power cut after step `until` may leave of something last synced at step `synced` (-1: never)."""
        lasting = [value for step, value in history if step <= synced][-1:] or [None]
        found = [*lasting, *(value for step, value in history if synced < step <= until)]
        return [value for index, value in enumerate(found) if value not in found[:index]]

    def _synced(self, inode: int, until: int) -> int:
        return max((step for step in self.syncs.get(inode, ()) if step <= until), default=-1)

    def choices(self, until: int) -> dict[tuple[int, str] | int, list[Any]]:
        """For each name and file that a power cut after step `until` may leave reachable: what it may be."""
        found: dict[tuple[int, str] | int, list[Any]] = {}
        waiting = [self.top]
        while waiting:
            inode = waiting.pop()
            if inode in found:
                continue
            if inode not in self.folders:
                found[inode] = self._possible_contents(inode, until)
                continue
            for key, history in self.names.items():
                if key[0] == inode and key not in found:
                    found[key] = self.possible(history, self._synced(inode, until), until)
                    waiting += [value for value in found[key] if value is not None]
        return found

    def _possible_contents(self, inode: int, until: int) -> list[bytes]:
        found = [value or b"" for value in self.possible(self.contents[inode], self._synced(inode, until), until)]
        unsynced = [value for step, value in self.contents[inode] if self._synced(inode, until) < step <= until]
        torn = [cut for value in unsynced for cut in (b"", value[: len(value) // 2], bytes(len(value)))]
        return list(dict.fromkeys([*found, *torn]))

    def states(self, *, most: int, seed: int = 0) -> Iterator[tuple[int, Tree]]:
        """(step, tree) for each different state that a power cut may leave: all of a step's, or `most` of them at random and each
        that differs from the oldest or from the newest in one choice."""
        dice = random.Random(seed)
        for until in range(self.step + 1):
            choices = self.choices(until)
            open_ones = [key for key, values in choices.items() if len(values) > 1]
            total = 1
            for key in open_ones:
                total *= len(choices[key])
            if total <= most:
                picks: Any = itertools.product(*(choices[key] for key in open_ones))
            else:
                picks = self._sampled([choices[key] for key in open_ones], most, dice)
            seen = set()
            for pick in picks:
                chosen = {key: values[0] for key, values in choices.items()} | dict(zip(open_ones, pick, strict=True))
                tree = self._tree(self.top, chosen)
                if (mark := repr(tree)) not in seen:
                    seen.add(mark)
                    yield until, tree

    def _sampled(self, values: list[list[Any]], most: int, dice: random.Random) -> Iterator[tuple[Any, ...]]:
        for end in (0, -1):
            base = [each[end] for each in values]
            yield tuple(base)
            for index, each in enumerate(values):
                yield from ((*base[:index], other, *base[index + 1 :]) for other in each)
        for _ in range(most):
            yield tuple(dice.choice(each) for each in values)

    def _tree(self, folder: int, chosen: dict[Any, Any]) -> Tree:
        tree: Tree = {}
        for key, inode in chosen.items():
            if isinstance(key, tuple) and key[0] == folder and inode is not None:
                tree[key[1]] = self._tree(inode, chosen) if inode in self.folders else chosen[inode]
        return tree


def write_tree(tree: Tree, place: Path) -> None:
    """The files of `tree` in the folder `place`, which must not exist."""
    place.mkdir()
    for name, value in tree.items():
        if isinstance(value, bytes):
            (place / name).write_bytes(value)
        else:
            write_tree(value, place / name)


def visible(tree: Tree) -> Tree:
    """What a reader sees: names that begin with a dot are omitted."""
    return {
        name: value if isinstance(value, bytes) else visible(value)
        for name, value in sorted(tree.items())
        if not name.startswith(".")
    }
