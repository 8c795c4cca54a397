"""Objects in WebDataset shards at random: an index of where each lies, so that a run shuffles and resumes exactly.

Reading shards from their beginning would have to read everything again that a resumed run has seen, and shuffles within
a buffer only. An object's files lie side by side in a shard, so it is one read of the disk.
"""

import io
import json
import logging
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from torch.utils.data import Dataset

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import object_generator
from nvsadapter_guidance.training.shards import stored_sample
from nvsadapter_guidance.training.zero123 import NovelViewSample, SampleOptions, make_sample

log = logging.getLogger(__name__)

Place = Tuple[str, int, int]
"""Name of an object, first and last byte of its files in the shard."""
_THREADS = 16


def find_split(root: Path, split: str) -> List[Path]:
    """Shards of a folder that have ``train`` or ``val`` in their names.

    Raises:
        InputError: there is none.
    """
    shards = sorted(path for path in root.glob("*.tar") if split in path.name)
    if not shards:
        raise InputError(
            f"data.root: {root} holds no *{split}*.tar; make some with objaverse_renderings_to_webdataset.py"
        )
    return shards


def index_shard(shard: Path) -> List[Place]:
    """Where the objects of a shard lie; kept in ``SHARD.index.json`` beside it for the next time.

    Raises:
        InputError: the shard is damaged.
    """
    cache = shard.with_name(f"{shard.name}.index.json")
    stamp = [shard.stat().st_size, shard.stat().st_mtime_ns]
    if cache.is_file():
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["shard"] == stamp:
            return [(name, first, last) for name, first, last in known["objects"]]
    places = _scan(shard)
    scratch = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(json.dumps({"shard": stamp, "objects": places}), encoding="utf-8")
        os.replace(scratch, cache)
    except OSError as error:
        log.warning("%s: cannot be written (%s); the shard will be scanned again next time", cache, error.strerror)
    return places


def _scan(shard: Path) -> List[Place]:
    places: Dict[str, Tuple[int, int]] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name = member.name.split(".", 1)[0]
                last = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places[name] = (places.get(name, (member.offset, 0))[0], last)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{shard}: is no whole tar ({error}); pack it again") from error
    return [(name, first, last) for name, (first, last) in places.items()]


class ShardViews(Dataset[NovelViewSample]):
    """Objects of shards, with the views that `FolderViews` would draw of the same renderings.

    Args:
        shards: files.
        seed: of the views drawn.

    Raises:
        InputError: a shard is damaged or empty.
    """

    def __init__(self, shards: Sequence[Path], options: SampleOptions, seed: int = 0) -> None:
        self.shards, self.options, self.seed, self.epoch = list(shards), options, seed, 0
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(index_shard, self.shards))
        self.places = [(number, place) for number, places in enumerate(found) for place in places]
        if not self.places:
            raise InputError(f"{self.shards[0].parent}: the shards hold no object; pack them again")

    def set_epoch(self, epoch: int) -> None:
        """Draw other views of the objects in this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> NovelViewSample:
        number, (name, first, last) = self.places[index]
        with self.shards[number].open("rb") as file:
            file.seek(first)
            content = file.read(last - first)
        sample: Dict[str, Any] = {"__key__": name, "__url__": str(self.shards[number])}
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if stream is not None and member.name.split(".", 1)[0] == name:
                    sample[member.name.split(".", 1)[1]] = stream.read()
        return make_sample(stored_sample(sample), self.options, object_generator(f"{self.epoch}:{name}", self.seed))
