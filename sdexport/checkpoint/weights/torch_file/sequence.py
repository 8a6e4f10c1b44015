"""The format of torch.save before torch 1.6: pickles in sequence, then the bytes of the storages.

The pickles are a magic number, the version of the format, facts about the machine, the state dict, and the keys of the storages
in their order in the file. Each storage is the number of its elements (8 bytes) and their bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdexport.checkpoint.weights.torch_file.inert import read_pickle
from sdexport.checkpoint.weights.torch_file.tensors import Storage, storage_of
from sdruntime.adapters.safetensors import LONGEST_HEADER, MOST_TENSORS
from sdruntime.system.document import open_regular

# the end of the first pickle, after the protocol: the operation LONG1, 10 bytes, the number, STOP
MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
_VERSION = 1001


class PickleSequence:
    """A file in this format. Raises ValueError if it is cut off or damaged."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(LONGEST_HEADER)
            magic = read_pickle(data)
            version = read_pickle(data, magic.end)
            machine = read_pickle(data, version.end)
            if version.value != _VERSION or not isinstance(machine.value, dict):
                raise ValueError(f"it is not in version {_VERSION:,} of torch's older format")
            if machine.value.get("little_endian") is not True:
                raise ValueError("its byte order is not little: save it on a little-endian machine")
            described = read_pickle(data, machine.end)
            keys = read_pickle(data, described.end)
            self.value = described.value
            self._places: dict[str, tuple[int, int]] = {}  # key -> offset and size
            storages = {storage.key: storage for storage in map(_storage_or_none, described.references) if storage is not None}
            if not isinstance(keys.value, list) or len(keys.value) > MOST_TENSORS:
                raise ValueError("the list of its storages is damaged")
            place = keys.end
            for key in keys.value:
                if not isinstance(key, str) or key not in storages:
                    break  # of a type whose size is unknown: those after it cannot be located
                file.seek(place)
                place += 8
                if place > size:
                    break
                if int.from_bytes(file.read(8), "little") != storages[key].count:
                    raise ValueError(f"storage {key:.20} has not the {storages[key].count:,} numbers that its tensors expect")
                self._places[key] = place, storages[key].size
                place += storages[key].size
            if place > size:
                raise ValueError(f"{size:,} bytes, but its storages require at least {place:,}: cut off; download it again")

    def place(self, storage: Storage) -> int:
        """Return the offset of a storage."""
        offset, size = self._places.get(storage.key, (0, -1))
        if size != storage.size:
            raise ValueError(f"its storage {storage.key:.20} is missing, or after one of a type that is not supported")
        return offset


def _storage_or_none(reference: Any) -> Storage | None:
    try:
        return storage_of(reference)
    except ValueError:
        return None
