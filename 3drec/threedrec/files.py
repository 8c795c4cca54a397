"""Writing files so that an interruption leaves the old file or the new one, never half of one.

Everything is written to a hidden temporary name in the same folder, flushed to the disk and renamed. A file that cannot
be written (no permission, full disk, a folder in its place) is a user's problem to solve, hence an ``InputError``.
"""

import errno
import json
import math
import os
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from threedrec.errors import InputError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file is too large for this disk or for the process's limit; choose another folder",
    errno.EACCES: "permission denied; change the folder's permissions or choose another folder",
    errno.EPERM: "permission denied; change the folder's permissions or choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.ENOTDIR: "part of its path is a file, not a folder; choose another folder",
    errno.EEXIST: "part of its path is a file, not a folder; choose another folder",
    errno.EISDIR: "a folder of that name is in the way; move it or choose another name",
    errno.ENOTEMPTY: "a folder of that name is in the way; move it or choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOENT: "its folder has disappeared; do not move it while the run lasts",
    errno.EIO: "the disk reports an input/output error; choose another folder",
}


def write_error(path: str | os.PathLike[str], error: OSError) -> InputError:
    """Say in one line why ``path`` could not be written and what to do about it."""
    advice = _ADVICE.get(error.errno or 0, f"{error.strerror or error}; choose another folder")
    return InputError(f"{path}: cannot be written: {advice}")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block succeeds.

    The temporary name keeps the suffix, so writers that look at it work. Missing folders are created. When the block
    fails, the temporary file is removed and an earlier ``path`` stays as it was.

    Raises:
        InputError: the file cannot be written; names ``path`` and what to do.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        yield temporary
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except Exception as error:
        cause = _write_failure(error, target.parent)
        if cause is None:
            raise
        raise write_error(target, cause) from error
    finally:
        _discard(temporary)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder inside ``folder`` whose files move into ``folder`` when the block succeeds.

    For files that belong together (a mesh, its material and its texture): when the block fails, none of them appears.
    Files move in the order of their writing, so that what refers to another file is best written last.

    Raises:
        InputError: a file cannot be written; names the folder and what to do.
    """
    target = Path(folder)
    temporary = _temporary_name(target / "files")
    try:
        target.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target / "files")
        temporary.mkdir(exist_ok=True)
        yield temporary
        written = sorted(temporary.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for file in written:
            _sync(file)
        for file in written:
            os.replace(file, target / file.name)
        _sync(target)
    except Exception as error:
        cause = _write_failure(error, target)
        if cause is None:
            raise
        raise write_error(target, cause) from error
    finally:
        _discard(temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically.

    Tensors, arrays and numpy scalars become numbers and lists; paths become strings; NaN and infinities, which JSON
    does not know, become ``null``.
    """
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); delete it or restore it") from error


def jsonable(value: Any) -> Any:
    """Turn ``value`` into plain numbers, strings, lists and dictionaries; what is not finite into ``None``."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and numpy scalars
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _temporary_name(target: Path) -> Path:
    """Name by machine and process, so that neither a second writer nor a leftover is ever written into."""
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}.tmp{target.suffix}")


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _remove_leftovers(target: Path) -> None:
    """Remove what processes of this machine that were killed left of earlier attempts at ``target``."""
    prefix = f".{target.name}.{_host()}-"
    for file in target.parent.iterdir():
        if file.name.startswith(prefix) and not _alive(file.name[len(prefix) :].split(".")[0]):
            _discard(file)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:
        return True
    return int(process) != os.getpid()


def _discard(path: Path) -> None:
    """Remove a temporary file or folder; a failure to do so must not hide the error that led here."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def _write_failure(error: Exception, folder: Path) -> OSError | None:
    """The failure to write behind ``error``, or None where the block failed for a reason of its own."""
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename
        ours = name is None or os.path.abspath(os.fspath(name)).startswith(os.path.abspath(folder))
        above = name is not None and os.path.abspath(folder).startswith(os.path.abspath(os.fspath(name)))
        return error if ours or above else None
    text = str(error)
    # torch.save and safetensors report a full disk as errors of their own.
    if "os error 28" in text or "PytorchStreamWriter failed writing" in text or "unexpected pos" in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None
