"""Files of named tensors, opened without reading them: ``.safetensors`` and the archives of ``torch.save``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvsadapter_guidance.checkpoints.pickle_reader import Placeholder, TensorRecord, TorchArchive
from nvsadapter_guidance.errors import InputError, one_line

STATE_KEY = "state_dict"
"""Where training frameworks keep the tensors among the other things in their checkpoints."""
_PARTIAL_SUFFIXES = (".part", ".partial", ".crdownload", ".incomplete", ".download", ".tmp", ".aria2")


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a file by name. Each is mapped from the file when asked for; nothing is read before it is used.

    Raises:
        InputError: the file is missing, half downloaded, damaged, malicious, or of another kind; names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: Optional[TorchArchive] = None
        self._records: Dict[str, TensorRecord] = {}
        self._safe: Any = None
        beginning = _beginning(path)
        if beginning[:2] == b"PK":
            self._archive = TorchArchive(path)
            self._records = _state_records(self._archive)
            self._names = list(self._records)
        elif path.suffix == ".safetensors" or beginning[8:9] == b"{":
            self._safe = _open_safetensors(path)
            self._names = list(self._safe.keys())
        else:
            raise InputError(f"{path}: {_what_else(beginning)}")
        self._known = frozenset(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if self._archive is not None:
            return self._archive.tensor(self._records[name])
        try:
            return self._safe.get_tensor(name)
        except (SafetensorError, AttributeError) as error:  # a precision that this version of torch does not have
            raise InputError(f"{self.path}: tensor {name!r} cannot be read ({one_line(error)})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def check_sums(self, on_bytes: Optional[Callable[[int], None]] = None) -> None:
        """Compare the file's own check sums where its format has some (safetensors has none).

        Raises:
            InputError: a part of the file is not what was written.
        """
        if self._archive is not None:
            self._archive.check_sums(on_bytes)


def _beginning(path: Path) -> bytes:
    if path.name.endswith(_PARTIAL_SUFFIXES):
        raise InputError(f"{path}: is a download that has not ended; let it end, or start it again")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give a checkpoint file") from error


def _what_else(beginning: bytes) -> str:
    text = beginning.lstrip().lower()
    if not beginning:
        return "is empty; download it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a checkpoint; the download was answered with an error, download it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull`, or download the file"
    if not any(beginning):
        return "begins with zeros, as a download does that has not ended; download it again"
    if beginning[:1] == b"\x80":
        return "is a bare pickle, which is not read because it can run code; save it as .safetensors"
    return "is neither safetensors nor a file of torch.save; give a .safetensors or .ckpt checkpoint"


def _open_safetensors(path: Path) -> Any:
    size = path.stat().st_size
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: is no whole safetensors file of {size} bytes, half downloaded or damaged ({one_line(error)}); "
            "download it again"
        ) from error


def _state_records(archive: TorchArchive) -> Dict[str, TensorRecord]:
    content = archive.content
    state = content.get(STATE_KEY, content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise InputError(f"{archive.path}: holds no dictionary of tensors; give a checkpoint")
    for name, value in state.items():
        if isinstance(value, TensorRecord) and isinstance(name, str):
            continue
        found = value.global_name if isinstance(value, Placeholder) else type(value).__name__
        if isinstance(value, type) and issubclass(value, Placeholder):
            found = value.global_name
        raise InputError(
            f"{archive.path}: {name!r} is no tensor but {found or 'an unknown object'}, which is not loaded; "
            "the file is damaged or of another model"
        )
    return dict(state)
