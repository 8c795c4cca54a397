"""Download a known weight file: sources in order, size and checksum checked, in place only when whole."""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvsadapter_guidance import http_download
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.http_download import CHUNK, OnProgress, SourceError, part_of, write_failure
from nvsadapter_guidance.weight_files import WeightFile

log = logging.getLogger(__name__)

HUB_STAGING = ".downloads"
"""Folder beside the targets where Hugging Face downloads grow; on the same disk, so that they move at once."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENOTDIR}


@dataclass
class Downloaded:
    """Outcome of :func:`download`."""

    path: Path
    source: str
    """Address or repository; empty when the file was there already."""
    checked: str
    """One clause for people: what the file was compared with."""


def sha256_of(path: Path, on_progress: OnProgress | None = None) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, total)
    return digest.hexdigest()


def download(
    file: WeightFile, folder: Path, sources: Sequence[str] = (), on_progress: OnProgress | None = None
) -> Downloaded:
    """Put ``file`` into ``folder`` unless it is there, from the first source that has it.

    Args:
        sources: addresses (``https://…``) and Hugging Face repositories (``owner/name``) instead of the known ones.

    Raises:
        InputError: no source gave the file (each is named with its reason), the file that is there is another one, or
            the disk does not take it.
    """
    target = folder / file.name
    if target.exists():
        return Downloaded(target, "", _check_present(file, target, on_progress))
    reasons, is_new = [], not folder.exists()
    for source in sources or file.sources:
        log.info("%s from %s", file.name, source)
        try:
            return Downloaded(target, source, _from(source, file, target, on_progress))
        except SourceError as error:
            reasons.append(f"{source}: {error}")
            log.warning("%s: %s", source, error)
    if is_new:
        with contextlib.suppress(OSError):  # something arrived and waits for the next attempt
            folder.rmdir()
    raise InputError(
        f"{file.name}: cannot be downloaded ({'; '.join(reasons)}); put the file into {folder} yourself, or name "
        "another source with --hub-id or --url"
    )


def _from(source: str, file: WeightFile, target: Path, on_progress: OnProgress | None) -> str:
    """Download from one source and check; returns what was checked."""
    if "://" in source:
        arrived, published = part_of(target), None
        http_download.fetch(source, arrived, file.size, on_progress)
    else:
        arrived, published = _from_hub(source, file, target.parent)
    wanted = file.sha256 or published
    problem = _difference(file, arrived, wanted, on_progress)
    if problem:
        http_download.discard(arrived)
        raise SourceError(problem)
    try:
        os.replace(arrived, target)
    except OSError as error:
        raise write_failure(target, error) from error
    http_download.discard(part_of(target))
    _clear_staging(file, target.parent)
    return "SHA-256 as published" if wanted else "no published checksum; try: 3drec weights verify"


def _from_hub(repository: str, file: WeightFile, folder: Path) -> tuple[Path, str | None]:
    """Download through ``huggingface_hub``, which goes on after a cut and shows its own progress bar.

    Returns the file in its staging folder, and the SHA-256 that the hub publishes for it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    staging = folder / HUB_STAGING / file.name / repository.replace("/", "--")
    try:
        path = Path(hf_hub_download(repository, file.name, local_dir=staging))
        tag = "" if file.sha256 else get_hf_file_metadata(hf_hub_url(repository, file.name)).etag or ""
    except Exception as error:  # the hub's client has many kinds of failures, and another source may do
        if isinstance(error, OSError) and error.errno in _DISK:
            raise write_failure(staging, error) from error
        _clear_without_data(staging, folder)
        raise SourceError(_first_line(error)) from error
    # For large files the entity tag is their SHA-256, for small ones a git hash of another length.
    return path, tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None


def _clear_without_data(staging: Path, folder: Path) -> None:
    """Remove the locks and marks of a hub download of which no byte has arrived."""
    if any(path.stat().st_size for path in staging.rglob("*.incomplete")):
        return
    shutil.rmtree(staging, ignore_errors=True)
    with contextlib.suppress(OSError):
        staging.parent.rmdir()
        (folder / HUB_STAGING).rmdir()


def _clear_staging(file: WeightFile, folder: Path) -> None:
    """Remove what the hub's client left of this file; unfinished downloads of others stay."""
    shutil.rmtree(folder / HUB_STAGING / file.name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / HUB_STAGING).rmdir()


def _check_present(file: WeightFile, target: Path, on_progress: OnProgress | None) -> str:
    problem = _difference(file, target, file.sha256, on_progress)
    if problem:
        raise InputError(
            f"{target}: {problem}; remove it to download it again, or rename it to {part_of(target).name} to go on "
            "from what is there"
        )
    return "SHA-256 as published" if file.sha256 else "no published checksum; try: 3drec weights verify"


def _difference(file: WeightFile, path: Path, sha256: str | None, on_progress: OnProgress | None) -> str:
    """How ``path`` differs from what is published; empty when it does not."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size:,} bytes where the file has {file.size:,}"
    if sha256 is not None:
        found = sha256_of(path, on_progress)
        if found != sha256:
            return f"its SHA-256 is {found[:16]}… where {sha256[:16]}… is published"
    return ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
