"""Data sets by name, and the loaders of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from nvsadapter_guidance.cameras import RELEASED
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.adapter.config import DataOptions
from nvsadapter_guidance.training.adapter.indexed_shards import ShardViews, find_split
from nvsadapter_guidance.training.adapter.samples import NumberedViews, Sample, StreamSampler
from nvsadapter_guidance.training.adapter.synthetic import SyntheticViews
from nvsadapter_guidance.training.novel_view_data import FolderViews
from nvsadapter_guidance.training.shards import split_names
from nvsadapter_guidance.training.zero123 import SampleOptions


@dataclass(frozen=True)
class ViewRequest:
    """What a model needs of a data set."""

    options: DataOptions
    num_query: int
    size: int
    """Side of the images in pixels."""
    control: bool
    """Whether control images are needed."""
    seed: int

    @property
    def sample_options(self) -> SampleOptions:
        """The same for the readers of renderings."""
        return SampleOptions(self.num_query, self.size, RELEASED)

    @property
    def root(self) -> Path:
        """The folder to read.

        Raises:
            InputError: none is given, or it is none.
        """
        if self.options.root is None:
            raise InputError(f"data.root: missing; give the folder of the {self.options.kind}, data.root=DIR")
        root = Path(self.options.root).expanduser()
        if not root.is_dir():
            raise InputError(f"data.root: no folder at '{root}'; give the folder of the {self.options.kind}")
        if self.control:
            raise InputError(f"data.kind: '{self.options.kind}' has no control images, model.controlnet needs them")
        return root


Splits = Tuple[Dataset[Any], Dataset[Any]]
"""Objects to train on, and to validate on."""


class Renamed(Dataset[Sample]):
    """Renderings as the training takes them; the epoch, which decides the views drawn, follows from the stream."""

    def __init__(self, views: Any) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def set_epoch(self, epoch: int) -> None:
        """Draw other views of the objects in this epoch."""
        self.views.set_epoch(epoch)

    def __getitem__(self, index: int) -> Sample:
        found = self.views[index]
        return {
            "support": found["support_rgb"],
            "queries": found["query_rgb"],
            "c2w": found["c2w"],
            "key": found["name"],
        }


def synthetic_splits(request: ViewRequest) -> Splits:
    """Balls of `synthetic`; a quarter as many others are validated on."""
    objects, shape = request.options.objects, (request.num_query, request.size)
    train = SyntheticViews(objects, *shape, control=request.control)
    return train, SyntheticViews(max(1, objects // 4), *shape, first=objects, control=request.control)


def folder_splits(request: ViewRequest) -> Splits:
    """A folder of Zero-1-to-3 renderings, one folder per object."""
    options = request.sample_options
    names = FolderViews(request.root, options).names
    if len(names) < 2:
        raise InputError(f"data.root: {request.root} holds one object; two are needed, the last is validated on")
    train, val = (FolderViews(request.root, options, part, seed=request.seed) for part in split_names(names))
    return Renamed(train), Renamed(val)


def shard_splits(request: ViewRequest) -> Splits:
    """Shards of Zero-1-to-3 renderings; those with ``val`` in their names are validated on."""
    train, val = (
        ShardViews(find_split(request.root, split), request.sample_options, request.seed) for split in ("train", "val")
    )
    return Renamed(train), Renamed(val)


DATASETS: Dict[str, Callable[[ViewRequest], Splits]] = {
    "folder": folder_splits,
    "shards": shard_splits,
    "synthetic": synthetic_splits,
}
"""`data.kind` to what makes its two parts; other packages may add theirs."""


def make_splits(request: ViewRequest) -> Splits:
    """The data set that a configuration names.

    Raises:
        InputError: there is none of that name, or its files cannot be used.
    """
    kind = request.options.kind
    if kind not in DATASETS:
        raise InputError(f"data.kind '{kind}' is unknown; use one of {', '.join(DATASETS)}")
    return DATASETS[kind](request)


class AdapterData(LightningDataModule):
    """Loaders of a run.

    Args:
        request: what to load.
        val_batches: validation batches per device at most.

    Attributes:
        samples_seen: where in the stream of samples training stands, over all devices.
    """

    def __init__(self, request: ViewRequest, val_batches: int) -> None:
        super().__init__()
        self.request, self.val_batches = request, val_batches
        self.train_views, self.val_views = make_splits(request)
        self.samples_seen = 0

    def train_dataloader(self) -> DataLoader[Any]:
        """An endless loader that goes on where the stream stands."""
        trainer, batch = self._placed(), self.request.options.batch_size
        sampler = StreamSampler(
            len(self.train_views),  # type: ignore[arg-type]
            batch, trainer.global_rank, trainer.world_size, self.request.seed, self.samples_seen,
        )  # fmt: skip
        return self._loader(NumberedViews(self.train_views, self.request.seed), batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """The same views of the same objects at every validation, divided among the devices."""
        trainer, batch = self._placed(), self.request.options.batch_size
        count = len(self.val_views)  # type: ignore[arg-type]
        first = self.val_batches * batch * trainer.world_size
        numbers = list(range(min(count, first)))[trainer.global_rank :: trainer.world_size]
        items: List[List[Tuple[int, int]]] = [
            [(i, i) for i in numbers[start : start + batch]] for start in range(0, len(numbers), batch)
        ]
        # Devices must agree on the number of batches; where objects are few, some see theirs again.
        shared = -(-min(count, first) // (batch * trainer.world_size)) or 1
        items = [items[i % len(items)] if items else [(0, 0)] for i in range(shared)]
        return self._loader(NumberedViews(self.val_views, self.request.seed), batch_sampler=items)

    def first_objects(self, count: int) -> Any:
        """A batch of the first objects that are validated on, for looking at."""
        views = NumberedViews(self.val_views, self.request.seed)
        count = min(count, len(self.val_views))  # type: ignore[arg-type]
        return torch.utils.data.default_collate([views[(i, i)] for i in range(count)])

    def _placed(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("loaders are made inside a Trainer")
        return self.trainer

    def _loader(self, views: Dataset[Any], batch_sampler: Any) -> DataLoader[Any]:
        workers = self.request.options.num_workers
        return DataLoader(
            views,
            batch_sampler=batch_sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
