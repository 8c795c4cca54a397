"""The restricted reader: equal to torch where tensors are, inert everywhere else, refusals in one line."""

import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.errors import InputError


class Callback:
    """Something that training frameworks leave in their checkpoints."""

    def __init__(self) -> None:
        self.best = 1.0


class Command:
    """Unpickling it runs a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        TensorFile(path).check_sums()
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.ckpt"


def test_tensors_are_those_that_torch_reads(path: Path) -> None:
    state = collections.OrderedDict(
        plain=torch.randn(3, 4),
        half=torch.nn.Parameter(torch.randn(5).half()),
        scalar=torch.tensor(3),
        strided=torch.randn(4, 6).t()[1:3, ::2],
        empty=torch.zeros(0, 2),
        flags=torch.tensor([True, False]),
        bfloat=torch.randn(2).bfloat16(),
    )
    shared = torch.randn(10)
    state["first"], state["second"] = shared[:4], shared[2:]
    torch.save({"state_dict": state, "epoch": 3}, path)
    file = TensorFile(path)
    assert list(file) == list(state) and len(file) == len(state)
    for key, value in torch.load(path, weights_only=True)["state_dict"].items():
        assert torch.equal(file[key], value) and file[key].dtype == value.dtype, key
    file.check_sums()


def test_changing_a_tensor_leaves_the_file_as_it_was(path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    TensorFile(path)["a"].fill_(1.0)
    assert path.read_bytes() == before


def test_objects_beside_the_tensors_are_inert(path: Path) -> None:
    others = {
        "callbacks": {Callback: {"state": Callback(), "score": numpy.float64(0.5)}},
        "array": numpy.arange(3),
        "device": [torch.device("cpu"), torch.float16, slice(1, 2)],
        "default": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
    }
    torch.save({"state_dict": {"a": torch.ones(2)}, **others}, path)
    file = TensorFile(path)
    assert torch.equal(file["a"], torch.ones(2))


@pytest.mark.parametrize("where", ["beside", "inside", "nested"])
@pytest.mark.parametrize(
    "function, arguments",
    [(os.system, ("touch {mark}",)), (eval, ("open('{mark}', 'w')",)), (exec, ("open('{mark}', 'w')",))],
    ids=["os.system", "eval", "exec"],
)
def test_a_malicious_pickle_is_refused_and_nothing_runs(
    path: Path, tmp_path: Path, function: Any, arguments: tuple[str, ...], where: str
) -> None:
    mark = tmp_path / "was-run"
    command = Command(function, *(text.format(mark=mark) for text in arguments))
    places = {
        "beside": {"state_dict": {"a": torch.ones(1)}, "hook": command},
        "inside": {"state_dict": {"a": command}},
        "nested": {"state_dict": {"a": torch.ones(1)}, "x": [{"y": (command,)}]},
    }
    torch.save(places[where], path)
    assert "malicious" in refusal(path)
    assert not mark.exists()


def test_getattr_and_own_classes_are_never_called(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    chain = Command(getattr, Command(Path, str(mark)), "touch")
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Command(map, chain, [])}, path)
    assert list(TensorFile(path)) == ["a"]
    assert not mark.exists()


def test_an_object_where_a_tensor_belongs_is_named(path: Path) -> None:
    torch.save({"state_dict": {"layer.weight": Callback()}}, path)
    assert "'layer.weight' is no tensor but" in refusal(path) and "Callback" in refusal(path)
    torch.save({"state_dict": {"layer.weight": 3}}, path)
    assert "'layer.weight' is no tensor but int" in refusal(path)


def rewrite(path: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Replace or remove (None) entries of the archive, by the end of their names."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            new = next((value for end, value in change.items() if name.endswith(end)), content)
            if new is not None:
                archive.writestr(name, new)


@pytest.mark.parametrize(
    "change",
    [
        {"data.pkl": b"\x80\x02}q\x00X"},
        {"data.pkl": b""},
        {"data.pkl": pickle.dumps({"state_dict": "no dictionary"})},
        {"data.pkl": None},
        {"byteorder": b"big"},
    ],
    ids=["cut pickle", "empty pickle", "no dictionary", "no pickle", "big endian"],
)
def test_damaged_archives_are_refused(path: Path, change: dict[str, bytes | None]) -> None:
    torch.save({"state_dict": {"a": torch.ones(8)}}, path)
    rewrite(path, change)
    refusal(path)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], numel: int = 8, offset: int = 0) -> bytes:
    """``{"a": tensor}`` of a float32 storage, whatever its sizes."""
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride))
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + b"\x89NtR"
    return b"\x80\x02}" + text("a") + tensor + b"s."


@pytest.mark.parametrize(
    "sizes",
    [
        ((2**70,), (0,)),
        ((2**40, 2**40), (0, 0)),
        ((0,), (2**70,)),
        ((0,), (1,), 8, 2**70),
        ((0,), (1,), -3),
        ((2,), (1,), 2**70),
    ],
)
def test_absurd_sizes_are_refused(path: Path, sizes: Any) -> None:
    torch.save({"a": torch.ones(8)}, path)
    rewrite(path, {"data.pkl": tensor_pickle((8,), (1,))})
    assert torch.equal(TensorFile(path)["a"], torch.ones(8))
    rewrite(path, {"data.pkl": tensor_pickle(*sizes)})
    with pytest.raises(InputError, match="is damaged"):
        TensorFile(path)["a"]


@pytest.mark.parametrize("method", ["get", "items"])
@pytest.mark.parametrize("on_class", [False, True], ids=["object", "class"])
def test_a_pickle_cannot_change_the_dictionaries_it_is_read_into(path: Path, method: str, on_class: bool) -> None:
    torch.save({"a": torch.ones(8)}, path)
    attribute = b"}" + text(method) + b"K\x05s"
    build = b"N" + attribute + b"\x86b)R." if on_class else b")R" + attribute + b"b."
    rewrite(path, {"data.pkl": b"\x80\x02ccollections\nOrderedDict\n" + build})
    if on_class:
        assert "damaged" in refusal(path)
    else:
        assert len(TensorFile(path)) == 0


def patched(content: bytes, entry: bytes, offset: int, value: bytes) -> bytes:
    """Change bytes of the central directory's record of an entry."""
    name = content.rindex(entry)
    start = content.rindex(b"PK\x01\x02", 0, name)
    return content[: start + offset] + value + content[start + offset + len(value) :]


LIES: dict[str, tuple[bytes, int, bytes]] = {
    "encrypted pickle": (b"data.pkl", 8, b"\x01\x00"),
    "encrypted numbers": (b"data/0", 8, b"\x01\x00"),
    "unknown compression": (b"data.pkl", 10, b"\x63\x00"),
    "name that is no UTF-8": (b"data/0", 8, b"\x00\x08"),
    "pickle beyond the end": (b"data.pkl", 42, struct.pack("<I", 2**30)),
}


@pytest.mark.parametrize("lie", LIES)
def test_archives_that_lie_are_refused(path: Path, lie: str) -> None:
    torch.save({"a": torch.ones(8)}, path)
    rewrite(path, {})
    content = patched(path.read_bytes(), *LIES[lie])
    if "UTF-8" in lie:
        content = patched(content, b"data/0", 46, b"\xff\xfe")
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("where", ["size", "extra"])
def test_numbers_beyond_the_end_of_the_file_are_refused(path: Path, where: str) -> None:
    torch.save({"a": torch.ones(8)}, path)
    rewrite(path, {"data.pkl": tensor_pickle((2**20,), (1,), 2**20)} if where == "size" else {})
    content = path.read_bytes()
    if where == "size":
        content = patched(content, b"data/0", 24, struct.pack("<I", 2**22))
    else:
        start = content.rindex(b"PK\x03\x04", 0, content.index(b"data/0"))
        content = content[: start + 28] + b"\xff\xff" + content[start + 30 :]
    path.write_bytes(content)
    with pytest.raises(InputError, match="numbers of storage 0 are missing"):
        TensorFile(path)["a"]


@pytest.mark.parametrize(
    "change, compressed, message",
    [
        ({"data.pkl": b"\x80\x02Nr" + struct.pack("<I", 2**26) + b"."}, False, "under the number 67108864"),
        ({"data.pkl": b"\x80\x02(" + b"}" * 2**23 + b"t."}, False, "data.pkl' has 8388613 bytes"),
        ({"byteorder": bytes(2**10)}, False, "byteorder' has 1024 bytes"),
        ({}, True, "not one that torch.save wrote"),
    ],
    ids=["memo", "objects", "byte order", "compressed"],
)
def test_small_files_cannot_take_much_memory(
    path: Path, change: dict[str, bytes | None], compressed: bool, message: str
) -> None:
    torch.save({"a": torch.ones(8)}, path)
    rewrite(path, change, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    assert message in refusal(path)


@pytest.mark.parametrize("change", [{"data/0": None}, {"data/0": b"\x00" * 8}], ids=["missing", "short"])
def test_missing_numbers_are_refused_when_asked_for(path: Path, change: dict[str, bytes | None]) -> None:
    torch.save({"state_dict": {"a": torch.ones(8)}}, path)
    rewrite(path, change)
    with pytest.raises(InputError, match="damaged.*storage 0"):
        TensorFile(path)["a"]


def test_a_tensor_cannot_reach_beyond_its_storage(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(8)}}, path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("model/data.pkl")
    # The shape (8,) is written as a one-byte integer in a tuple of one.
    assert content.count(b"K\x08\x85") == 1
    rewrite(path, {"data.pkl": content.replace(b"K\x08\x85", b"K\x80\x85")})
    with pytest.raises(InputError, match="larger than its storage"):
        TensorFile(path)["a"]


def test_flipped_bits_are_found_by_the_check_sums(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(4096)}}, path)
    content = bytearray(path.read_bytes())
    middle = content.index(torch.ones(64).numpy().tobytes()) + 8192
    content[middle] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(path: Path, share: float) -> None:
    torch.save({"state_dict": {"a": torch.ones(4096)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "download it again" in refusal(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html><html>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"\x00" * 1000, "has not ended"),
        (pickle.dumps({"a": 1}), "bare pickle"),
        (b"something else entirely", "neither safetensors nor"),
    ],
)
def test_other_files_are_named_for_what_they_are(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    assert message in refusal(path)


def test_half_downloads_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt.part").write_bytes(b"PK")
    assert "has not ended" in refusal(tmp_path / "model.ckpt.part")
    assert "cannot be read" in refusal(tmp_path / "absent.ckpt")
