"""One file over HTTP that may be cut at any time and goes on where it was.

What has arrived lies beside the target as ``NAME.part``. A later attempt asks for the rest only (RFC 9110, ranges), on
the condition that the server still has the same version (``If-Range`` with the entity tag kept in ``NAME.part.tag``);
a server that has another one, or knows no ranges, sends the whole file and the part begins anew.
"""

import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nvsadapter_guidance.errors import InputError

OnProgress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes of the whole file, None where the server does not say."""

CHUNK = 1 << 20
IDLE_SECONDS = 30.0
PATIENCE = 3
"""Attempts in a row that bring nothing new before a source is given up."""
USER_AGENT = "3drec (weights download)"


class SourceError(Exception):
    """A source cannot give the file; another one may. The message is one clause that says why."""


class _CutError(Exception):
    """The connection broke; the same source is worth another attempt."""


def part_of(target: Path) -> Path:
    """Where the unfinished download of ``target`` lies."""
    return target.with_name(f"{target.name}.part")


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def discard(part: Path) -> None:
    """Remove an unfinished download."""
    part.unlink(missing_ok=True)
    _tag_of(part).unlink(missing_ok=True)


def write_failure(path: Path, error: OSError) -> InputError:
    """What to tell somebody whose disk does not take ``path``."""
    reason = error.strerror or error
    return InputError(
        f"{path}: cannot be written: {reason}; free some space or choose another folder with --to "
        "(what has arrived is kept, and the same command goes on from there)"
    )


def check_space(folder: Path, needed: int) -> None:
    """Refuse a download that the disk has no room for.

    Raises:
        InputError: less than ``needed`` bytes are free where ``folder`` lies.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: {needed / 1e9:.1f} GB more are needed and the disk has {free / 1e9:.1f} GB free; "
            "free some space or choose another folder with --to"
        )


def fetch(
    url: str, part: Path, size: int | None = None, on_progress: OnProgress | None = None, pause: float = 1.0
) -> None:
    """Bring ``url`` into ``part``, going on from what is there.

    Args:
        size: bytes that the file must have; None when unknown.
        pause: seconds before another attempt, doubled at each that brings nothing.

    Raises:
        SourceError: the address does not answer, refuses, has another file, or breaks off again and again.
        InputError: ``part`` cannot be written, or the disk has no room.
    """
    if not url.startswith(("http://", "https://")):
        raise SourceError("is no http or https address")
    most, failures = _size(part), 0
    while True:
        try:
            _receive(url, part, size, on_progress)
            return
        except _CutError as error:
            failures = 0 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures >= PATIENCE:
                raise SourceError(str(error)) from error
            time.sleep(pause * 2.0**failures)


def _receive(url: str, part: Path, size: int | None, on_progress: OnProgress | None) -> None:
    """One attempt; returns when the file is whole."""
    response = _open(url, part, size)
    if response is None:
        return
    with response:
        start, total = _place(response, _size(part))
        if size is not None and total is not None and total != size:
            raise SourceError(f"offers {total:,} bytes where the file has {size:,}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise SourceError("answers with a web page instead of the file")
        done = start
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            check_space(part.parent, (total or start) - start)
            with part.open("ab" if start else "wb") as file:
                _keep_tag(response, part)
                for chunk in _chunks(response):
                    file.write(chunk)
                    done += len(chunk)
                    if on_progress is not None:
                        on_progress(done, total)
        except OSError as error:
            raise write_failure(part, error) from error
    if total is not None and done != total:
        raise _CutError(f"the connection was cut after {done:,} of {total:,} bytes")


def _open(url: str, part: Path, size: int | None) -> Any:
    """The server's answer to a request for what is missing; None when nothing is."""
    start = _size(part)
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        tag = _tag_of(part)
        if tag.is_file():
            headers["If-Range"] = tag.read_text()
    try:
        return _ask(url, headers)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            _check_end(url, part, size, error.headers.get("Content-Range", ""))
            return None
        if error.code in (408, 429) or error.code >= 500:
            raise _CutError(f"HTTP {error.code} {error.reason}") from error
        raise SourceError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _CutError(f"no connection: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"no answer: {error}") from error


def _ask(url: str, headers: dict[str, str]) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=IDLE_SECONDS)


def _check_end(url: str, part: Path, size: int | None, answer: str) -> None:
    """Make sure that ``part`` is whole where nothing comes after it; it is removed only if it is proven too long.

    Args:
        answer: the server's ``Content-Range``, which should tell the length but may be missing.
    """
    told, here = re.fullmatch(r"bytes \*/(\d+)", answer), _size(part)
    total = int(told[1]) if told else size
    if total is None:
        total = _length(url)
    if total is not None and total < here:
        discard(part)
        raise _CutError("the server has less of the file than is here")
    if total != here:
        raise SourceError(f"gives nothing after the {here:,} bytes in {part}; remove that file to begin anew")


def _length(url: str) -> int | None:
    """Bytes of the whole file by the beginning of an answer without a range; None where it does not say."""
    try:
        with _ask(url, {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}) as response:
            return _place(response, 0)[1]
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"no answer: {error}") from error


def _place(response: Any, start: int) -> tuple[int, int | None]:
    """Where in the file the answer begins, and the bytes of the whole file."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:
            raise SourceError("answers with another range than was asked for")
        return start, None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _keep_tag(response: Any, part: Path) -> None:
    """Keep what tells this version of the file from others; weak tags cannot serve ranges."""
    tag = response.headers.get("ETag", "")
    if not tag or tag.startswith("W/"):
        tag = response.headers.get("Last-Modified", "")
    if tag:
        _tag_of(part).write_text(tag)
    else:
        _tag_of(part).unlink(missing_ok=True)


def _chunks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _CutError(f"the connection was cut: {error}") from error
        if not chunk:
            return
        yield chunk


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
