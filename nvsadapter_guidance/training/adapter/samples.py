"""What a data set gives for training, and the endless, reproducible stream of it."""

import random
from collections.abc import Iterator
from typing import Any, List, NotRequired, Tuple, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from nvsadapter_guidance.training.adapter.objective import sample_seed

DATA_SEED, ORDER_SEED = 1, 2
"""Told apart from the seeds of noise by these offsets."""


class Sample(TypedDict):
    """Views of one object."""

    support: Float[Tensor, "3 H W"]
    """In [-1, 1]."""
    queries: Float[Tensor, "n 3 H W"]
    c2w: Float[Tensor, "1+n 4 4"]
    """Support first, float32, rotations as the released training has them: -R of the OpenGL pose (R, t)."""
    key: str
    """Names the object."""
    control: NotRequired[Float[Tensor, "1+n 3 H W"]]
    """Control images in [0, 1], where a ControlNet is trained with."""
    number: NotRequired[int]
    """In the stream of all samples; `NumberedViews` adds it."""


class StreamSampler(Sampler[List[Tuple[int, int]]]):
    """Batches of one device out of the endless stream of all samples.

    Number p of the stream is object p mod N of the (p div N)-th shuffling of N objects. A step takes the next
    `batch_size * world_size` numbers, and device `rank` its part of them, so the same objects make a step whatever
    the number of devices; a run goes on at any number without having read the ones before.

    Yields:
        Lists of (object, number in the stream).
    """

    def __init__(self, objects: int, batch_size: int, rank: int, world_size: int, seed: int, start: int = 0) -> None:
        self.objects, self.batch_size, self.rank, self.world_size = objects, batch_size, rank, world_size
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        step = self.batch_size * self.world_size
        first = self.start + self.rank * self.batch_size
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        while True:
            batch = []
            for number in range(first, first + self.batch_size):
                if number // self.objects != epoch:
                    epoch = number // self.objects
                    generator = torch.Generator().manual_seed(sample_seed(self.seed + ORDER_SEED, epoch))
                    order = torch.randperm(self.objects, generator=generator)
                batch.append((int(order[number % self.objects]), number))
            yield batch
            first += step


class NumberedViews(Dataset[Sample]):
    """A data set whose random choices (views, augmentation) depend on the sample's number in the stream alone.

    Args:
        views: draws from the global generators of torch, numpy or Python, or from generators of its own that depend on
            the epoch, which it is then told by `set_epoch`.
    """

    def __init__(self, views: Any, seed: int) -> None:
        self.views, self.seed = views, seed

    def __getitem__(self, item: Tuple[int, int]) -> Sample:
        index, number = item
        seed = sample_seed(self.seed + DATA_SEED, number)
        if hasattr(self.views, "set_epoch"):
            self.views.set_epoch(number // len(self.views))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - for data sets that use the global generator
            random.seed(seed)
            sample: Sample = self.views[index]
        sample["number"] = number
        return sample
