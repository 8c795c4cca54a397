"""Datasets of novel-view samples: from folders of Zero-1-to-3 renderings, and from shards of them.

Both give `zero123.NovelViewSample`, which torch's default collation batches. Which views are drawn of an object depends
on the seed, the epoch and its name alone, so that a resumed run goes on as if it had never stopped.
"""

import glob
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import object_generator
from nvsadapter_guidance.training.shards import stored_sample
from nvsadapter_guidance.training.zero123 import (
    VIEWS_PER_OBJECT,
    NovelViewSample,
    SampleOptions,
    StoredViews,
    make_sample,
    stored_folder,
)


def _draw(views: StoredViews, options: SampleOptions, seed: int, epoch: int) -> NovelViewSample:
    return make_sample(views, options, object_generator(f"{epoch}:{views.name}", seed))


def _draw_from_shard(sample: dict[str, Any], options: SampleOptions, seed: int, epoch: int) -> NovelViewSample:
    return _draw(stored_sample(sample), options, seed, epoch)


class FolderViews(Dataset[NovelViewSample]):
    """Objects of a folder of Zero-1-to-3 renderings.

    Args:
        folder: holds one folder per object.
        names: objects to take; None for all folders that hold a ``000.png``, in the order of their names.
        views: per object.
        seed: of the views drawn.

    Raises:
        InputError: there is no object. Reading one raises it where a file is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        options: SampleOptions | None = None,
        names: Sequence[str] | None = None,
        views: int = VIEWS_PER_OBJECT,
        seed: int = 0,
    ) -> None:
        self.folder, self.options, self.views, self.seed = folder, options or SampleOptions(), views, seed
        self.names = sorted(path.parent.name for path in folder.glob("*/000.png")) if names is None else list(names)
        self.epoch = 0
        if not self.names:
            raise InputError(f"{folder}: no folder in it holds a 000.png; make some with: 3drec render MESHES -o DIR")

    def set_epoch(self, epoch: int) -> None:
        """Draw other views of the objects in this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> NovelViewSample:
        name = self.names[index]
        views = stored_folder(self.folder / name, name, self.views)
        return _draw(views, self.options, self.seed, self.epoch)


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Shards by patterns: ``*`` is matched here, ``{000000..000799}`` counts, addresses (``http://…``) stay.

    Raises:
        InputError: a pattern meets no file.
    """
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        urls = expand_urls(pattern)
        matched = [path for url in urls for path in ([url] if ":" in url else sorted(glob.glob(url)))]
        if len(matched) < len(urls):
            raise InputError(f"{pattern}: meets no shard, or not all it counts; give the .tar files")
        found += matched
    return found


def shard_views(
    shards: Sequence[str],
    options: SampleOptions | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle_buffer: int = 0,
    nodesplitter: Callable[..., Any] | None = None,
) -> Any:
    """A ``webdataset.WebDataset`` of the objects in shards, divided among nodes and among loader workers by shard.

    Args:
        shards: of `find_shards`.
        seed, epoch: of the views drawn and of the order.
        shuffle_buffer: objects held to be shuffled; 0 keeps the order of the shards, as validation wants it.
        nodesplitter: of webdataset, where shards are divided otherwise than one process after the other.
    """
    import webdataset as wds

    dataset = wds.WebDataset(
        list(shards),
        shardshuffle=len(shards) if shuffle_buffer else False,
        nodesplitter=nodesplitter or wds.split_by_node,
        workersplitter=wds.split_by_worker,
        seed=seed + epoch,
        empty_check=False,  # with more workers than shards some have none
    )
    if shuffle_buffer:
        dataset = dataset.shuffle(shuffle_buffer, seed=seed + epoch)
    return dataset.map(partial(_draw_from_shard, options=options or SampleOptions(), seed=seed, epoch=epoch))
