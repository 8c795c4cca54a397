"""One folder for each image: names that no two images share, on any file system."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping

RESULTS = "objects"
"""The folder of all results; apart from the manifest and the gallery, so that no image's name can meet theirs."""

_AWKWARD = '<>:"\\|?*'
_LONGEST = 120
"""Characters of one folder's name; results inside add theirs."""


def result_folders(names: Iterable[str], before: Mapping[str, str]) -> dict[str, str]:
    """Return a folder for every input, relative to the batch's.

    An image keeps its path and its suffix (``chair.png`` and ``chair.jpg`` are two). Names that differ only in case or
    in how their accents are written, and names that some file systems refuse, get a mark made of their hash.

    Args:
        names: of the inputs.
        before: folders of an earlier sitting, which are kept.
    """
    folders: dict[str, str] = {}
    taken = {_key(folder): name for name, folder in before.items()}
    for name in sorted(names):
        if name in before:
            folders[name] = before[name]
            continue
        plain = "/".join([RESULTS, *(_safe(part) for part in name.split("/"))])
        unlike = plain != f"{RESULTS}/{name}"
        if unlike or taken.get(_key(plain), name) != name:
            plain = f"{plain}-{_mark(name)}"
        taken[_key(plain)] = name
        folders[name] = plain
    return folders


def _safe(part: str) -> str:
    kept = "".join("_" if _refused(letter) else letter for letter in part)[:_LONGEST]
    kept = kept.rstrip(". ") if kept.strip(". ") else "_" * len(kept)
    while len(kept.encode()) > 2 * _LONGEST:
        kept = kept[:-1]
    return kept


def _refused(letter: str) -> bool:
    return letter in _AWKWARD or unicodedata.category(letter) in ("Cc", "Cs")


def _key(folder: str) -> str:
    return unicodedata.normalize("NFC", folder).casefold()


def _mark(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
