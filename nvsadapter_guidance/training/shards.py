"""WebDataset shards of Zero-1-to-3 renderings, as the release packs them: written, resumed and read.

A shard is a tar; an object ``NAME`` is in it as ``NAME.png_000``, ``NAME.npy_000``, …, ``NAME.png_011``,
``NAME.npy_011``: the files of its folder, unchanged.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.zero123 import VIEWS_PER_OBJECT, StoredViews, stored_folder

_TAR_BLOCK = 512


@dataclass(frozen=True)
class ShardOptions:
    """How objects are packed; the defaults are the release's.

    Raises:
        InputError: a limit is not positive.
    """

    max_objects: int = 100_000
    """Objects in one shard at most."""
    max_bytes: float = 1e9
    """A shard is closed by the object that makes it larger than this."""
    views: int = VIEWS_PER_OBJECT

    def __post_init__(self) -> None:
        for name in ("max_objects", "max_bytes", "views"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of shards is {getattr(self, name)}; use 1 or more")


def read_paths(path: Path) -> list[str]:
    """Names of objects from a JSON list, each a folder below the base path.

    Raises:
        InputError: no such file, no list of names, an empty list, or a name that a shard cannot hold or that is there
            twice.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a JSON list of object folders") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); give a list of object folders") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{path}: is no list of names; give a JSON list of object folders")
    seen: set[str] = set()
    for name in names:
        if "." in name or name in seen:
            problem = "is there twice" if name in seen else "has a dot in it, which names in shards cannot have"
            raise InputError(f"{path}: '{name}' {problem}")
        seen.add(name)
    return names


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation objects: the first 99 of a hundred and the rest, as the release does."""
    first = len(names) * 99 // 100
    return list(names[:first]), list(names[first:])


class ShardWriter:
    """Writes shards of one split, one after the other.

    ``PREFIX.json`` beside the shards records which objects of the list are packed and which were broken. It is brought
    up to date with every finished shard, so an interrupted call loses one unfinished shard at most.

    Args:
        names: objects, in order.
        base: the folder that holds their folders.
        output: folder for the shards ``PREFIX_000000.tar``, ….

    Raises:
        InputError: the record in the folder is of another list or of other options.
    """

    def __init__(
        self, names: Sequence[str], base: Path, output: Path, prefix: str, options: ShardOptions | None = None
    ) -> None:
        self.names, self.base, self.output, self.prefix = list(names), base, output, prefix
        self.options = options or ShardOptions()
        self._record = output / f"{prefix}.json"
        listed = zlib.crc32("\n".join(self.names).encode())
        limits = [self.options.max_objects, self.options.max_bytes, self.options.views]
        self._state: dict[str, Any] = {"list": listed, "limits": limits, "done": 0, "shards": [], "broken": []}
        if self._record.exists():
            self._state = self._earlier()

    def _earlier(self) -> dict[str, Any]:
        try:
            state = json.loads(self._record.read_text(encoding="utf-8"))
            same = all(state[key] == self._state[key] for key in ("list", "limits"))
            done, shards, broken = state["done"], state["shards"], state["broken"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._record}: cannot be read ({error}); delete it to pack again") from error
        if not same:
            raise InputError(f"{self._record}: is of another list or other limits; choose another output folder")
        return {**self._state, "done": done, "shards": shards, "broken": broken}

    @property
    def done(self) -> int:
        """How many objects of the list are dealt with."""
        return int(self._state["done"])

    @property
    def broken(self) -> list[dict[str, str]]:
        """Name and reason of the objects that were skipped."""
        return list(self._state["broken"])

    @property
    def shards(self) -> list[Path]:
        """Finished shards."""
        return [self.output / shard["file"] for shard in self._state["shards"]]

    def write(self, workers: int = 4) -> Iterator[str]:
        """Pack the objects that are not packed yet; broken ones are skipped and recorded.

        Args:
            workers: threads that read and check objects ahead.

        Yields:
            the name of every object, packed or broken.
        """
        from webdataset import TarWriter

        self.output.mkdir(parents=True, exist_ok=True)
        pending = iter(self._read_ahead(self.names[self.done :], workers))
        position, ended = self.done, self.done == len(self.names)
        while not ended:
            file = f"{self.prefix}_{len(self._state['shards']):06d}.tar"
            partial = self.output / f".{file}.partial"
            packed, size, broken = 0, 0, []
            with partial.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0.0) as tar:
                while packed < self.options.max_objects and size <= self.options.max_bytes:
                    item = next(pending, None)
                    if item is None:
                        ended = True
                        break
                    name, content = item
                    position += 1
                    if isinstance(content, str):
                        broken.append({"name": name, "reason": content})
                    else:
                        tar.write({"__key__": name, **content})
                        packed += 1
                        size += sum(_TAR_BLOCK + -(-len(x) // _TAR_BLOCK) * _TAR_BLOCK for x in content.values())
                    yield name
            self._finish(partial, file, packed, position, broken)

    def _finish(self, partial: Path, file: str, packed: int, position: int, broken: list[dict[str, str]]) -> None:
        if packed:
            partial.replace(self.output / file)
            self._state["shards"].append({"file": file, "objects": packed})
        else:
            partial.unlink()
        self._state["broken"].extend(broken)
        self._state["done"] = position
        temporary = self._record.with_name(f".{self._record.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self._state, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._record)

    def _read_ahead(self, names: Sequence[str], workers: int) -> Iterator[tuple[str, dict[str, bytes] | str]]:
        with ThreadPoolExecutor(workers) as pool:
            remaining = iter(names)
            while group := list(islice(remaining, 4 * workers)):
                yield from zip(group, pool.map(self._read, group), strict=True)

    def _read(self, name: str) -> dict[str, bytes] | str:
        """Files of an object, or what is wrong with it."""
        try:
            views = stored_folder(self.base / name, name, self.options.views)
            contents = [path.read_bytes() for path in (*views.images, *views.cameras) if isinstance(path, Path)]
            count = len(views)
            StoredViews(name, contents[:count], contents[count:]).check()
        except (InputError, OSError) as error:
            return str(error)
        pairs = zip(contents[:count], contents[count:], strict=True)
        return {key: x for i, pair in enumerate(pairs) for key, x in zip((f"png_{i:03d}", f"npy_{i:03d}"), pair)}


def stored_sample(sample: dict[str, Any]) -> StoredViews:
    """The views of one object of a shard, as WebDataset gives it.

    Raises:
        InputError: there are none, or a picture lacks its camera.
    """
    name = str(sample.get("__key__", "object"))
    numbers = sorted(key.removeprefix("png_") for key in sample if key.startswith("png_"))
    missing = [number for number in numbers if f"npy_{number}" not in sample]
    if not numbers or missing:
        lack = f"npy_{missing[0]}" if missing else "png_000"
        raise InputError(f"{sample.get('__url__', 'shard')}: {name} lacks {lack}; pack the renderings again")
    return StoredViews(name, [sample[f"png_{n}"] for n in numbers], [sample[f"npy_{n}"] for n in numbers])
