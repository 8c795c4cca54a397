"""Keys and values of the support view, which no query view, ray or timestep can change."""

from dataclasses import dataclass
from typing import Callable, Dict, Sequence, Tuple, Union

import torch
from jaxtyping import Int
from torch import Tensor

from nvsadapter_guidance.errors import InputError


@dataclass(frozen=True)
class SupportCache:
    """Keys and values of view attention on the support tokens, by block path; each [batch, tokens, inner]."""

    entries: Dict[str, Tuple[Tensor, Tensor]]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return next(iter(self.entries.values()))[0].shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "SupportCache":
        """A cache with `function` applied to every tensor."""
        return SupportCache({path: (function(k), function(v)) for path, (k, v) in self.entries.items()})

    def to(self, target: Union[str, torch.device, torch.dtype]) -> "SupportCache":
        """Move to a device or convert to a dtype."""
        return self.map(lambda tensor: tensor.to(target))

    def expand(self, repeats: int) -> "SupportCache":
        """Every sample `repeats` times in a row: [a, b] becomes [a, a, b, b] for 2."""
        if self.batch == 1:
            return self.map(lambda tensor: tensor.expand(repeats, -1, -1))
        return self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def select(self, index: Union[slice, Int[Tensor, "samples"]]) -> "SupportCache":
        """Samples by slice or index."""
        return self.map(lambda tensor: tensor[index])

    @staticmethod
    def cat(caches: Sequence["SupportCache"]) -> "SupportCache":
        """One cache of all samples, in order, e.g. of [unconditional, conditional].

        Raises:
            InputError: there is no cache, or they are of different models.
        """
        if not caches or any(cache.entries.keys() != caches[0].entries.keys() for cache in caches):
            raise InputError("support caches: none given, or made by different models; encode the support again")
        entries = {}
        for path in caches[0].entries:
            pairs = [cache.entries[path] for cache in caches]
            entries[path] = (torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs]))
        return SupportCache(entries)
