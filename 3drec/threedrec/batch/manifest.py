"""``manifest.jsonl``: what became of every image, one JSON line per attempt. The last line of an input counts.

Lines are only ever added, each flushed to the disk before the batch goes on, so a killed batch has lost at most the
attempts that were under way.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from threedrec.errors import InputError
from threedrec.files import jsonable, write_error

logger = logging.getLogger(__name__)

DONE, FAILED = "done", "failed"


@dataclass
class Line:
    """One attempt at one image."""

    input: str
    """Path of the image relative to the batch's root."""
    hash: str | None
    """SHA-256 of the image, None where it could not be read."""
    status: str
    """``done`` or ``failed``."""
    seconds: float
    """Wall-clock time of the attempt."""
    attempt: int
    """Counted from 1, as long as neither the image nor the config changes."""
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """One line: what went wrong and what to do."""
    kind: str = ""
    """Of a failure: ``input``, ``diverged``, ``error``, ``crash``, ``timeout``, ``memory`` or ``lost``."""
    config: str = ""
    """Fingerprint of the batch's config."""
    output: str = ""
    """Folder of the results, relative to the manifest's."""
    copy_of: str = ""
    """The input with the same content whose results these are."""

    def of(self, content: str | None, config: str) -> bool:
        """Whether the attempt was at this content with this config."""
        return self.hash == content and self.config == config


_REQUIRED = {"input", "hash", "status", "seconds", "attempt"}
_KNOWN = {entry.name for entry in fields(Line)}


class Manifest:
    """The lines of one file, in memory and on the disk."""

    def __init__(self, path: Path, repair: bool = True) -> None:
        """Read ``path``, which need not exist; with ``repair``, what a kill cut short at its end is removed.

        Raises:
            InputError: the file cannot be read or written.
        """
        self.path = Path(path)
        self.last: dict[str, Line] = {}
        """The line that counts, by input."""
        self._failures: dict[tuple[str, str | None, str], int] = {}
        if os.path.lexists(self.path):
            self._read(repair)

    def attempts(self, name: str, content: str | None, config: str) -> int:
        """How often this input has failed with this content and config."""
        return self._failures.get((name, content, config), 0)

    def append(self, line: Line) -> None:
        """Add a line, and wait until the disk has it.

        Raises:
            InputError: it cannot be written.
        """
        values = {key: value for key, value in jsonable(asdict(line)).items() if value != "" or key in _REQUIRED}
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        try:
            content = text.encode()
        except UnicodeEncodeError:  # a name with bytes that are no text
            content = json.dumps(values, allow_nan=False).encode()
        try:
            with self.path.open("ab") as file:
                file.write(content + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error
        self._take(line)

    def _take(self, line: Line) -> None:
        self.last[line.input] = line
        if line.status == FAILED:
            key = (line.input, line.hash, line.config)
            self._failures[key] = self._failures.get(key, 0) + 1

    def _read(self, repair: bool) -> None:
        try:
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if repair and whole < len(content):
                os.truncate(self.path, whole)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        for number, text in enumerate(content[:whole].split(b"\n"), start=1):
            if text.strip():
                line = _parse(text)
                if line is None:
                    logger.warning("%s, line %d: not a line of a manifest; left out", self.path, number)
                else:
                    self._take(line)


def _parse(text: bytes) -> Line | None:
    try:
        values = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    if not isinstance(values, dict) or not set(values) >= _REQUIRED or values["status"] not in (DONE, FAILED):
        return None
    return Line(**{key: value for key, value in values.items() if key in _KNOWN})
