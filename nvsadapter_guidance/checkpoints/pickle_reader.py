"""A reader for ``.ckpt`` and ``.bin`` files of ``torch.save`` that runs nothing of what they hold.

A pickle is a program: unpickling imports any global it names and calls it. Here only plain containers and the records
of tensors are built. Every other global becomes an inert placeholder, neither imported nor called, and a pickle that
asks for a way to run commands is refused. Tensors are not read but described; `TorchArchive.tensor` maps them from
the file, so that nothing is copied and only what is used is read.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from nvsadapter_guidance.errors import InputError, one_line

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_FORBIDDEN_MODULES = {
    "os", "posix", "nt", "subprocess", "shutil", "socket", "sys", "importlib", "runpy", "ctypes", "pty", "webbrowser",
    "multiprocessing", "asyncio", "pickle", "marshal",
}  # fmt: skip
"""Nothing of these modules would be called, but a checkpoint that names them was not made to be loaded."""
_FORBIDDEN_BUILTINS = {"eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint"}
_MAX_PICKLE_BYTES = 2**22
"""The pickle of a checkpoint holds names and sizes, less than a megabyte; tensors lie beside it. One byte of a pickle
can make an object of hundreds, so this bounds memory too."""
_MAX_BYTEORDER_BYTES = 16
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, LookupError, EOFError)
"""What `zipfile` raises for archives that are damaged, encrypted or compressed in ways that it does not know."""
_MALFORMED = (
    pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError, ValueError,
    OverflowError, RecursionError, MemoryError, struct.error,
)  # fmt: skip


class StorageType(NamedTuple):
    """Stands for a storage class of torch."""

    dtype: torch.dtype


class StorageRecord(NamedTuple):
    """A block of numbers in the archive."""

    key: str
    dtype: torch.dtype
    numel: int


class TensorRecord(NamedTuple):
    """A tensor in the archive, not read yet."""

    storage: StorageRecord
    offset: int
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]


class Placeholder:
    """An object of a class that is not built. Nothing it is told has an effect."""

    global_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        """An empty object, whatever it is made from."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        """Itself, whatever it is called with."""
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore `value`."""

    def extend(self, values: Any) -> None:
        """Ignore `values`."""


class _Dictionary(dict[Any, Any]):
    """Stands for ``OrderedDict``."""

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes, such as the metadata of state dicts; on the class itself, calling this fails."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, source: str) -> None:
        super().__init__(file, encoding="utf-8")
        self.source = source
        self.known = _known_globals()

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global: something of ours, never the global itself."""
        root = module.split(".")[0]
        builtin = module in ("builtins", "__builtin__")
        if root in _FORBIDDEN_MODULES or (builtin and name in _FORBIDDEN_BUILTINS):
            raise InputError(
                f"{self.source}: its pickle asks for {module}.{name}, which no checkpoint needs; the file is malicious "
                "or damaged, do not use it (nothing was run)"
            )
        if (module, name) in self.known:
            return self.known[module, name]
        return type("Placeholder", (Placeholder,), {"global_name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> StorageRecord:
        """Describe a storage; its numbers stay in the file."""
        kind, storage, key, _, numel = pid
        if kind != "storage" or not isinstance(storage, StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        return StorageRecord(key, storage.dtype, int(numel))


def _known_globals() -> Dict[Tuple[str, str], Any]:
    """Stand-ins for the globals that are understood, new ones at every call so that a pickle cannot change them."""

    def rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> TensorRecord:
        if not isinstance(storage, StorageRecord):
            raise pickle.UnpicklingError("a tensor without a storage")
        return TensorRecord(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))

    def rebuild_parameter(data: Any, *_: Any) -> Any:
        return data

    known: Dict[Tuple[str, str], Any] = {("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()}
    known["torch._utils", "_rebuild_tensor"] = known["torch._utils", "_rebuild_tensor_v2"] = rebuild_tensor
    known["torch._utils", "_rebuild_parameter"] = rebuild_parameter
    known["collections", "OrderedDict"] = type("Dictionary", (_Dictionary,), {})
    return known


class TorchArchive:
    """An opened file of ``torch.save``: `content` is the pickled object with `TensorRecord` in place of tensors.

    Raises:
        InputError: the file is truncated, damaged, of a format that is not understood, or its pickle is malicious.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = {info.filename: info for info in archive.infolist()}
                self._root = self._find_root()
                self.content = self._unpickle(archive)
        except InputError:
            raise
        except _BAD_ARCHIVE as error:
            raise InputError(f"{path}: is truncated or damaged ({one_line(error)}); download it again") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        self._mapped: Optional[torch.UntypedStorage] = None

    def tensor(self, record: TensorRecord) -> Tensor:
        """The tensor of `record`, a private mapping of the file: changing it does not change the file.

        Raises:
            InputError: the file holds fewer numbers than the tensor needs.
        """
        storage, itemsize = record.storage, record.storage.dtype.itemsize
        info = self._entries.get(f"{self._root}data/{storage.key}")
        if info is None or not 0 <= storage.numel * itemsize <= info.file_size:
            raise self._damaged(f"numbers of storage {storage.key} are missing")
        last = record.offset + sum((size - 1) * step for size, step in zip(record.shape, record.stride))
        if min(record.offset, *record.shape, *record.stride, 0) < 0 or len(record.shape) != len(record.stride):
            raise self._damaged(f"a tensor of storage {storage.key} has no sensible shape")
        if math.prod(record.shape) > storage.numel or (0 not in record.shape and last >= storage.numel):
            raise self._damaged(f"a tensor is larger than its storage {storage.key}")
        start, mapped = self._data_offset(info), self._map()
        stop = start + storage.numel * itemsize
        if stop > mapped.nbytes():
            raise self._damaged(f"numbers of storage {storage.key} are missing")
        whole = torch.empty(0, dtype=storage.dtype)
        try:
            return whole.set_(mapped[start:stop], record.offset, record.shape, record.stride)  # type: ignore[call-overload]
        except (RuntimeError, TypeError, ValueError) as error:  # numbers beyond 64 bits, or too many dimensions
            raise self._damaged(f"a tensor of storage {storage.key}: {one_line(error)}") from error

    def check_sums(self, on_bytes: Optional[Callable[[int], None]] = None) -> None:
        """Read the whole file and compare its check sums; `on_bytes` is told of every piece read.

        Raises:
            InputError: a part of the file is not what was written.
        """
        with zipfile.ZipFile(self.path) as archive:
            for name in self._entries:
                try:
                    with archive.open(name) as part:
                        while piece := part.read(2**22):
                            if on_bytes is not None:
                                on_bytes(len(piece))
                except (*_BAD_ARCHIVE, OSError) as error:
                    raise self._damaged(f"{name!r}: {one_line(error)}") from error

    def _find_root(self) -> str:
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.endswith("/data.pkl")]
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in self._entries.values())
        if len(roots) != 1 or not stored:
            raise InputError(f"{self.path}: is a zip file, but not one that torch.save wrote; give a checkpoint")
        return roots[0]

    def _unpickle(self, archive: zipfile.ZipFile) -> Any:
        order = f"{self._root}byteorder"
        if order in self._entries and self._read(archive, order, _MAX_BYTEORDER_BYTES) != b"little":
            raise InputError(f"{self.path}: was written by a big-endian machine; save it again on another one")
        content = self._read(archive, f"{self._root}data.pkl", _MAX_PICKLE_BYTES)
        try:
            _check_memo(content)
            return _Unpickler(io.BytesIO(content), str(self.path)).load()
        except InputError:
            raise
        except _MALFORMED as error:
            raise self._damaged(f"its pickle cannot be followed: {one_line(error)}") from error

    def _read(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        if (size := self._entries[name].file_size) > limit:
            raise self._damaged(f"{name!r} has {size} bytes")
        return archive.read(name)

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        # The central directory does not know how long the extra field in front of the data is (torch aligns with it).
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise self._damaged(f"'{info.filename}' has no header")
        name, extra = struct.unpack("<HH", header[26:30])
        return info.header_offset + 30 + name + extra

    def _map(self) -> torch.UntypedStorage:
        if self._mapped is None:
            size = self.path.stat().st_size
            self._mapped = torch.UntypedStorage.from_file(str(self.path), False, size)  # type: ignore[assignment]
        return self._mapped  # type: ignore[return-value]

    def _damaged(self, what: str) -> InputError:
        first = (what.splitlines() or [""])[0]
        return InputError(f"{self.path}: is damaged ({first}); download it again")


def _check_memo(content: bytes) -> None:
    """Refuse a memo with gaps: `pickle` makes a table as long as the largest number that an object is kept under."""
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and argument is not None and argument > len(content):
            raise pickle.UnpicklingError(f"it keeps an object under the number {argument}")
