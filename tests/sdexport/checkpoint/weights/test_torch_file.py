"""Weights in files of torch.save: read where they lie, and nothing in the file is run."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hostile import Planted

torch = pytest.importorskip("torch")

from sdexport.checkpoint.weights.torch_file.file import is_torch_file, read_torch_file  # noqa: E402
from sdexport.checkpoint.weights.torch_file.inert import read_pickle  # noqa: E402
from sdexport.checkpoint.weights.torch_file.tensors import axes_in_file  # noqa: E402

FORMATS = (True, False)


def saved(value: Any, *, zipped: bool = True, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped, **options)
    return file.getvalue()


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def archive(path: Path, described: bytes, **changes: bytes) -> Path:
    """A file of torch.save with another data.pkl, and other entries where `changes` has them."""
    with zipfile.ZipFile(path, "w") as file:
        entries = {"data.pkl": described, "byteorder": b"little", "data/0": bytes(64), "version": b"3\n"}
        for name, data in (entries | {name.replace("_", "/"): data for name, data in changes.items()}).items():
            file.writestr(f"archive/{name}", data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  every text is checked by the caller
        read_torch_file(path)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def tensors() -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=random)

    base = normal(6, 4)
    return {
        "float32": normal(2, 3),
        "float64": normal(3).double(),
        "float16": normal(3).half(),
        "bfloat16": normal(3).bfloat16(),
        "number": torch.tensor(3.5),
        "none": torch.empty(0, 3),
        "one": normal(1, 1),
        "parameter": torch.nn.Parameter(normal(4)),
        "frozen": torch.nn.Parameter(normal(4), requires_grad=False),
        "transposed": normal(3, 5).T,
        "channels last": normal(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "channels last, a matrix": normal(4, 3, 1, 1).to(memory_format=torch.channels_last),
        "permuted": normal(2, 3, 4, 5).permute(2, 0, 3, 1),
        "shared, whole": base,
        "shared, rows": base[2:4],
        "shared, a row": base[5],
        "shared, turned": base.T,
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", FORMATS)
def test_the_values_are_those_of_torch(zipped: bool, protocol: int, tmp_path: Path) -> None:
    expected = tensors()
    if zipped:  # the older format has no storages of these
        expected |= {"e4m3": expected["float32"].to(torch.float8_e4m3fn), "e5m2": expected["float32"].to(torch.float8_e5m2)}
    path = written(tmp_path / "w.pt", saved(OrderedDict(expected), zipped=zipped, pickle_protocol=protocol))
    assert is_torch_file(path)
    found = read_torch_file(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        values = found[name].read()
        assert values.shape == found[name].shape == tuple(tensor.shape), name
        assert values.flags.c_contiguous, name
        assert torch.equal(torch.from_numpy(values.astype("float64")), tensor.detach().double()), name


@pytest.mark.parametrize("zipped", FORMATS)
def test_other_types_keep_their_names(zipped: bool, tmp_path: Path) -> None:
    kinds = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    weights = {name: torch.ones(2, dtype=kind) for name, kind in kinds.items()}
    found = read_torch_file(written(tmp_path / "w.pt", saved(weights, zipped=zipped)))
    assert [(tensor.dtype, tensor.size, tensor.readable) for tensor in found.values()] == [
        (name, weights[name].nbytes, False) for name in kinds
    ]


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_training_checkpoint_is_read_for_its_state_dict(zipped: bool, tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    whole = {
        "epoch": 3,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": module.state_dict(),
        "callbacks": {Path: {"best": torch.tensor(1.0, dtype=torch.complex64), (1, (2, 3)): {4}, None: frozenset((5,))}},
        "optimizer_states": [optimizer.state_dict()],
        "numbers": [1.5, -7, 2**70, 1 + 2j, b"bytes", bytearray(b"x"), slice(1, 2), range(4)],
    }
    found = read_torch_file(written(tmp_path / "w.ckpt", saved(whole, zipped=zipped)))
    assert {name: tensor.read().tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("zipped", FORMATS)
def test_no_weight_is_in_memory_until_it_is_read(zipped: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "w.pt", saved({"large": torch.zeros(1 << 23), "small": torch.ones(3)}, zipped=zipped))
    tracemalloc.start()
    try:
        found = read_torch_file(path)
        if zipped:
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        else:  # the length of the pickles is not known before they are read
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert found["small"].read().tolist() == [1.0] * 3


def test_the_order_of_axes_in_the_file() -> None:
    assert axes_in_file((2, 3), (3, 1)) == ()
    assert axes_in_file((2, 3), (1, 2)) == (1, 0)
    assert axes_in_file((1, 3), (99, 1)) == ()
    assert axes_in_file((2, 3, 4), (1, 8, 2)) == (1, 2, 0)
    assert axes_in_file((2, 1, 4), (1, 7, 2)) == (2, 0, 1)
    assert axes_in_file((0, 3), (5, 7)) == ()
    assert axes_in_file((), ()) == ()
    for shape, strides in (((2, 3), (0, 1)), ((2, 3), (4, 1)), ((4,), (2,)), ((2, 2), (1, 1)), ((3,), (0,))):
        with pytest.raises(ValueError, match="is not dense"):
            axes_in_file(shape, strides)


def test_views_of_a_permuted_tensor(tmp_path: Path) -> None:
    weight = torch.arange(120.0).reshape(6, 4, 5)
    turned, swapped = weight.permute(2, 0, 1), torch.arange(6.0).reshape(2, 3).T
    path = written(tmp_path / "w.pt", saved({"last": weight.mT.contiguous().mT, "turned": turned, "swapped": swapped}))
    found = read_torch_file(path)
    assert (found["last"].axes, found["turned"].axes, found["swapped"].axes) == ((0, 2, 1), (1, 2, 0), (1, 0))
    for index in range(3):  # the first axis is the outermost in the file too
        assert found["last"].rows(index, 3).read().tolist() == weight[2 * index : 2 * index + 2].tolist()
    with pytest.raises(ValueError, match=r"a tensor of \[5, 6, 4\] in the order \[1, 2, 0\] has no 5 equal parts"):
        found["turned"].rows(0, 5)
    with pytest.raises(ValueError, match="cannot take the shape"):
        found["turned"].reshaped((30, 4))
    assert found["swapped"].transposed().read().tolist() == swapped.T.tolist()
    assert found["swapped"].transposed().transposed().read().tolist() == swapped.tolist()


def test_storages_beyond_four_gigabytes(tmp_path: Path) -> None:
    """A sparse archive whose last entry has its offset in a zip64 field, as in a checkpoint of seven gigabytes."""
    path, values = tmp_path / "w.pt", torch.arange(4.0)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", tensor_pickle())
        file.start_dir = (5 << 30) + 3
        file.writestr("archive/data/0", values.numpy().tobytes())
    found = read_torch_file(path)["x"]
    assert found.offset > 5 << 30
    assert found.read().tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_what_is_no_state_dict_is_one_clear_error(tmp_path: Path) -> None:
    whole = saved({"x": torch.ones(3)})
    older = saved({"x": torch.ones(300)}, zipped=False)
    wide = torch.ones(4, 4)
    cases = {
        "": (b"", "not a file of torch.save"),
        "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "not a file of torch.save"),
        "a plain pickle": (pickle.dumps({"x": [1.0]}), "not a file of torch.save"),
        "cut": (whole[: len(whole) // 2], "cut off"),
        "older, cut": (older[: len(older) - 100], "bytes, but its storages require at least"),
        "older, cut in a pickle": (older[:120], "the pickle is cut off after 120 bytes"),
        "list": (saved([torch.ones(3)]), "a list, not a state dict"),
        "number": (saved(7), "a int, not a state dict"),
        "no tensors": (saved({"epoch": 3}), "'epoch': a int, not a plain tensor; 0 of 1 entries are tensors by name"),
        "numbered": (saved({1: torch.ones(3)}), "1: its name is not text; 0 of 1"),
        "nothing": (saved({}), "0 of 0 entries"),
        "sparse": (saved({"x": torch.eye(3).to_sparse()}), "'x': a torch._utils._rebuild_sparse_tensor, not a plain tensor"),
        "complex": (saved({"x": torch.ones(3, dtype=torch.complex128)}), "stored as torch.ComplexDoubleStorage, which is not"),
        "negative": (saved({"x": torch.ones(3, dtype=torch.complex64).conj().imag}), "'x': "),
        "meta": (saved({"x": torch.ones(3, device="meta")}), "_rebuild_meta_tensor_no_storage, not a plain tensor"),
        "module": (saved(torch.nn.Linear(2, 2)), "a torch.nn.modules.linear.Linear, not a state dict"),
        "repeated": (saved({"x": torch.ones(1).expand(3)}), "shape [3] with strides [0] is not dense"),
        "columns": (saved({"x": wide[:, :2], "y": wide}), "shape [4, 2] with strides [4, 1] is not dense"),
        "another zip": (saved({"x": wide}).replace(b"data.pkl", b"data.pck"), "0 entries are NAME/data.pkl"),
    }
    for name, (data, text) in cases.items():
        assert text in refusal(written(tmp_path / "w.pt", data)), name


def tensor_pickle(
    *, count: int = 4, offset: int = 0, shape: Any = (2, 2), strides: Any = (2, 1), more: tuple[Any, ...] = ()
) -> bytes:
    """The data.pkl of a state dict whose one tensor is anything."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> Any:
            arguments = (Storage(), offset, shape, strides, False, OrderedDict(), *more)
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"x": Tensor()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("described", "text"),
    [
        ({"offset": 1}, "F32 [2, 2] from byte 4 ends beyond its storage of 16 bytes"),
        ({"offset": -1}, "an invalid offset"),
        ({"shape": (2, 3), "strides": (3, 1)}, "ends beyond its storage"),
        ({"shape": (1 << 39, 1 << 39), "strides": (1 << 39, 1)}, "ends beyond its storage"),
        ({"shape": (2, -2)}, "an invalid offset"),
        ({"shape": (2, 2.0)}, "an invalid offset"),
        ({"shape": (True, 2)}, "an invalid offset"),
        ({"shape": [2, 2]}, "an invalid offset"),
        ({"strides": (2,)}, "an invalid offset"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "an invalid offset"),
        ({"count": 17}, "storage 0 has 64 bytes, not 68"),
        ({"count": -4}, "its storage has no name or no size"),
        ({"count": 1 << 60}, "its storage has no name or no size"),
        ({"more": ({"neg": True},)}, "a tensor whose conjugate or negation is meant"),
    ],
)
def test_a_tensor_lies_in_its_storage_as_a_whole(described: dict[str, Any], text: str, tmp_path: Path) -> None:
    assert [*read_torch_file(archive(tmp_path / "whole.pt", tensor_pickle()))] == ["x"]
    assert text in refusal(archive(tmp_path / "w.pt", tensor_pickle(**described)))


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    assert "byte order is b'big'" in refusal(archive(path, tensor_pickle(), byteorder=b"big"))
    archive(path, tensor_pickle())
    path.write_bytes(path.read_bytes().replace(b"data/0", b"data/1"))
    assert "no entry archive/data/0" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_pickle())
    assert "compressed or encrypted" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a", "b"):
            file.writestr(f"{name}/data.pkl", tensor_pickle())
    assert "2 entries are NAME/data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        for name in ("archive/data.pkl", "archive/data.pkk"):
            file.writestr(name, tensor_pickle())
    path.write_bytes(path.read_bytes().replace(b"data.pkk", b"data.pkl"))
    assert "the zip archive has 2 entries archive/data.pkl" in refusal(path)
    # the directory says that it is at the first byte and has 2 GB, of a file that has them (sparsely)
    data = bytearray(archive(path, tensor_pickle()).read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = (2 << 30).to_bytes(4, "little")
    with path.open("wb") as sparse:
        sparse.write(data[:end])
        sparse.seek(3 << 30)
        sparse.write(data[end:])
    assert "directory has 2,147,483,648 bytes" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    assert "a FIFO, not a regular file" in refusal(tmp_path / "w.pt")


# nothing runs


class Built(Planted):
    """Runs it as an entry of the state that BUILD sets."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"x": Planted(self.path)}


class Stated:
    """Runs code of its own when BUILD sets its state."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: Any) -> None:
        state["path"].touch()


class Storage:
    """Written as a storage of torch, named by a planted object."""


class Referring(pickle.Pickler):
    path: Path

    def persistent_id(self, value: Any) -> Any:
        return ("storage", Planted(self.path), "0", "cpu", 4) if isinstance(value, Storage) else None


def planted(path: Path) -> dict[str, bytes]:
    """Pickles that touch `path` when Python reads them."""
    command = f"touch {path}".encode()
    text = b"X" + len(command).to_bytes(4, "little") + command
    values = {
        "the whole": Planted(path),
        "an entry": {"x": Planted(path)},
        "beside other entries": {"state_dict": {"w": 1}, "callbacks": [[{"x": (Planted(path),)}]]},
        "in the state of BUILD": Built(path),
        "by the state of BUILD": {"x": Stated(path)},
        "nested in arguments": {"x": (OrderedDict, [Planted(path)])},
    }
    pickles = {f"{name}, {protocol}": pickle.dumps(value, protocol) for protocol in (2, 4) for name, value in values.items()}
    file = io.BytesIO()
    referring = Referring(file, 2)
    referring.path = path
    referring.dump({"x": Storage()})
    return pickles | {
        "in the name of a storage": file.getvalue(),
        "as a key": b"\x80\x02}(cos\nsystem\n" + text + b"\x85RK\x01u.",
        "by STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
        "by NEWOBJ": b"\x80\x02cbuiltins\nfrozenset\ncbuiltins\nmap\ncos\nsystem\n]" + text + b"a\x86\x81\x85\x81.",
        "dropped from the stack": b"\x80\x02cos\nsystem\n" + text + b"\x85R0}.",
    }


class Harmful(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


NAMES = list(planted(Path("x")))


def older_format(described: bytes) -> bytes:
    """A file of torch before 1.6 whose state dict is the pickle `described`."""
    whole, end = saved({}, zipped=False), 0
    for _ in range(3):
        end = read_pickle(whole, end).end
    return whole[:end] + described + pickle.dumps([], 2)


@pytest.mark.skipif(os.name != "posix", reason="the planted command is `touch`")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_pickle_runs(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = planted(canary)[name]
    modules = set(sys.modules)
    for path in (archive(tmp_path / "w.ckpt", data), written(tmp_path / "older.ckpt", older_format(data))):
        assert is_torch_file(path)
        refusal(path)
    assert not canary.exists()
    assert set(sys.modules) == modules, "nothing is imported"
    Harmful(io.BytesIO(data)).load()
    assert canary.exists(), "the test's pickle does run a command"


@pytest.mark.skipif(os.name != "posix", reason="the planted command is `touch`")
@pytest.mark.parametrize("zipped", FORMATS)
def test_weights_beside_a_planted_object_are_read_and_it_is_not_run(zipped: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    value = {"state_dict": {"x": torch.ones(3)}, "callbacks": {"y": Planted(canary)}, "state": Built(canary)}
    path = written(tmp_path / "w.ckpt", saved(value, zipped=zipped))
    assert read_torch_file(path)["x"].read().tolist() == [1.0] * 3
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "torch does run it"
