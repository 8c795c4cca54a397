"""Which images a batch is about: folders, files and patterns in, a sorted list out, and why the rest is left out."""

import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from threedrec.errors import InputError
from threedrec.image import companion_path

READABLE = frozenset({".png", ".jpg", ".jpeg", ".webp"})
OTHER_IMAGES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jxl", ".svg", ".tga", ".tif", ".tiff"}
)
"""Pictures that cannot be read: each is a task that fails with the reason, rather than a file that is passed over."""

MAPS = ("depth", "normal")
"""Kinds of maps that may lie beside an image."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Input:
    """One image of a batch."""

    name: str
    """Path relative to the batch's root, with slashes: what the manifest calls it."""
    path: str
    """Absolute path."""
    problem: str = ""
    """Why there is nothing to try: a folder that cannot be opened, a name that cannot be written down."""


@dataclass
class Inputs:
    """What was found."""

    root: Path
    images: list[Input] = field(default_factory=list)
    """Sorted by name."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """What is no image of the batch: name and reason."""


def find_inputs(sources: Sequence[str], output: Path) -> Inputs:
    """Find the images of files, folders (with all folders inside) and patterns (``**`` means any folders).

    Args:
        sources: as typed; what exists is a name, even with a ``*`` in it.
        output: the batch's folder, which is never searched.

    Raises:
        InputError: nothing of that name, or no image at all.
    """
    named: list[tuple[Path, bool]] = []  # each with whether a person named this very file
    roots = []
    for source in sources:
        found, root = _expand(source)
        named += found
        roots.append(root)
    root = Path(os.path.commonpath([os.path.abspath(path) for path in roots]))
    search = _Search(root, output)
    for path, exact in named:
        search.add(path, exact)
    search.leave_out_companions()
    if not search.images:
        left = f" ({len(search.skipped)} other files)" if search.skipped else ""
        raise InputError(f"{', '.join(sources)}: holds no image{left}; give a folder with PNG, JPEG or WebP files")
    images = sorted(search.images.values(), key=lambda image: image.name)
    return Inputs(root, images, sorted(search.skipped))


def _expand(source: str) -> tuple[list[tuple[Path, bool]], Path]:
    """Return the paths that a source means, and the folder that their names are relative to."""
    path = Path(os.path.expanduser(source))
    if os.path.lexists(path):
        folder = os.path.isdir(path)
        return [(path, not folder)], path if folder else path.parent
    if not glob.has_magic(source):
        raise InputError(f"{source}: no such file or folder")
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise InputError(f"{source}: matches no file; quote patterns, so that they arrive as they are")
    return [(Path(match), False) for match in matches], Path(*fixed) if fixed else Path(".")


class _Search:
    """Walks through folders, each once."""

    def __init__(self, root: Path, output: Path) -> None:
        self.root = root
        self.images: dict[str, Input] = {}
        self.skipped: list[tuple[str, str]] = []
        self._folders: dict[tuple[int, int], str] = {}
        self._output = _identity(output)

    def add(self, path: Path, exact: bool) -> None:
        """Take a file or all of a folder in."""
        if os.path.isdir(path):
            later = [path]
            # Folders behind links come last, so that a folder is found under its own name first.
            while later:
                later = [link for folder in later for link in self._walk(folder)]
        else:
            self._file(path, exact)

    def leave_out_companions(self) -> None:
        """Leave out the depth and normal maps that lie beside images of the batch."""
        paths = {image.path for image in self.images.values()}
        maps = {companion_path(path, kind): path for path in paths for kind in MAPS}
        for name, image in list(self.images.items()):
            owner = maps.get(image.path)
            if owner is not None and owner != image.path:
                del self.images[name]
                self.skipped.append((name, f"belongs to {os.path.basename(owner)}"))

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(os.path.abspath(path), self.root)).as_posix()

    def _walk(self, folder: Path) -> Iterator[Path]:
        """Take in a folder and those inside; return the links to folders that were met."""
        identity = _identity(folder)
        if identity is not None and identity == self._output:
            self.skipped.append((self._name(folder), "is the output folder"))
            return
        if identity in self._folders:
            if self._folders[identity] != self._name(folder):
                self.skipped.append((self._name(folder), f"is the same folder as {self._folders[identity]}"))
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            name = self._name(folder)
            self.images[name] = Input(name, str(folder), f"the folder cannot be opened: {error.strerror or error}")
            return
        if identity is not None:
            self._folders[identity] = self._name(folder)
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                self.skipped.append((self._name(path), "is hidden"))
            elif not os.path.isdir(path):
                self._file(path, exact=False)
            elif os.path.islink(path):
                yield path
            else:
                yield from self._walk(path)

    def _file(self, path: Path, exact: bool) -> None:
        suffix = path.suffix.lower()
        name = self._name(path)
        if exact or suffix in READABLE or suffix in OTHER_IMAGES:
            absolute = os.path.abspath(path)
            problem = "" if _is_text(absolute) else "its name is no valid UTF-8; rename it"
            self.images[name] = Input(name, absolute, problem)
        else:
            self.skipped.append((name, "is no image by its name"))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def hash_file(path: str) -> str | None:
    """SHA-256 of a regular file, None of what cannot be read (or would block, like a pipe)."""
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _hash_input(image: Input) -> str | None:
    """SHA-256 of the image; with maps beside it, of the hashes of all, so that a changed map is a changed input."""
    own = None if image.problem else hash_file(image.path)
    maps = {companion_path(image.path, kind) for kind in MAPS} - {image.path}
    beside = [hash_file(path) for path in sorted(maps)]
    if own is None or not any(beside):
        return own
    return hashlib.sha256(" ".join([own, *(content or "" for content in beside)]).encode()).hexdigest()


def hash_inputs(images: Sequence[Input], on_file: Callable[[], None] = lambda: None) -> dict[str, str | None]:
    """Return the hash of every image by name, None where there is nothing to try; ``on_file`` is called after each."""
    hashes: dict[str, str | None] = {}
    with ThreadPoolExecutor(max_workers=8) as threads:
        found = threads.map(_hash_input, images)
        for image, value in zip(images, found, strict=True):
            hashes[image.name] = value
            on_file()
    return hashes
