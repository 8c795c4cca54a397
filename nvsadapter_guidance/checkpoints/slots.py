"""Where our tensors lie in a file of another layout: taking them out, strictly and without copies, and putting back."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Dict, List, Optional

import torch
from torch import Tensor

from nvsadapter_guidance.errors import InputError


@dataclass(frozen=True)
class Slot:
    """A tensor's place in another layout."""

    key: str
    """Name of the tensor there."""
    third: Optional[int] = None
    """0, 1 or 2: queries, keys or values of a fused projection, stacked along the first dimension."""
    transpose: bool = False
    """A matrix that is applied from the other side there."""
    pointwise: bool = False
    """A linear layer that is a 1x1 convolution there."""

    def take(self, stored: Tensor) -> Tensor:
        """Ours from theirs; a view, except for transposed matrices.

        Raises:
            ValueError: the stored tensor cannot be what this slot expects.
        """
        if self.third is not None:
            if stored.shape[0] % 3:
                raise ValueError("cannot be divided into queries, keys and values")
            return stored.chunk(3)[self.third]
        if self.pointwise and stored.ndim == 4:
            if stored.shape[2:] != (1, 1):
                raise ValueError("is no 1x1 convolution")
            return stored[:, :, 0, 0]
        return stored.T.contiguous() if self.transpose else stored

    def give(self, ours: Tensor) -> Tensor:
        """Theirs from ours; a third of a fused projection alone."""
        if self.pointwise:
            return ours[:, :, None, None]
        return ours.T.contiguous() if self.transpose else ours


WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Precisions that weights are read in; smaller ones carry scales, which no layout here knows."""

Slots = Dict[str, Slot]
"""Our name to its place."""


def prefixed(slots: Mapping[str, Slot], ours: str = "", theirs: str = "") -> Slots:
    """The same places with a prefix on our names and one on theirs."""
    return {
        ours + name: Slot(theirs + slot.key, slot.third, slot.transpose, slot.pointwise) for name, slot in slots.items()
    }


def plain(names: Mapping[str, str], ours: str = "", theirs: str = "") -> Slots:
    """Places of tensors that are only called differently."""
    return {ours + name: Slot(theirs + key) for name, key in names.items()}


def take(
    tensors: Mapping[str, Tensor],
    slots: Mapping[str, Slot],
    wanted: Mapping[str, Tensor],
    source: str,
    surplus: Collection[str] = (),
    check_finite: bool = True,
    on_bytes: Optional[Callable[[int], None]] = None,
) -> Dict[str, Tensor]:
    """Our tensors from a file of another layout.

    Args:
        slots: our names to places; every place must be filled.
        wanted: our names to tensors of the right shape, e.g. a state dict on the meta device.
        source: what to call the file in messages.
        surplus: further names that the file may hold; any other is an error.
        on_bytes: told of the size of every tensor that was looked at.

    Raises:
        InputError: names `source` and the first tensor that is missing, not known, of another shape or not finite.
    """
    places = {slot.key for slot in slots.values()}
    _check_names(tensors.keys(), places, surplus, source)
    found = {}
    for name, slot in slots.items():
        stored = tensors[slot.key]
        if stored.dtype not in WEIGHT_DTYPES:
            raise InputError(
                f"{source}: tensor '{slot.key}' holds {stored.dtype}; weights are read in "
                "16 bits or more, give another file"
            )
        try:
            found[name] = slot.take(stored)
        except (ValueError, IndexError, RuntimeError) as error:
            raise _wrong_shape(source, slot.key, stored, str(error)) from error
        if found[name].shape != wanted[name].shape:
            raise _wrong_shape(source, slot.key, found[name], f"needed is {tuple(wanted[name].shape)}")
        if check_finite and not is_finite(found[name]):
            raise InputError(f"{source}: tensor '{slot.key}' holds NaN or infinite values; download it again")
        if on_bytes is not None:
            on_bytes(found[name].nbytes)
    return found


def give(ours: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> Dict[str, Tensor]:
    """Inverse of `take`: tensors under the names and in the shapes of the other layout."""
    pieces: Dict[str, Dict[int, Tensor]] = {}
    for name, slot in slots.items():
        pieces.setdefault(slot.key, {})[slot.third or 0] = slot.give(ours[name])
    return {
        key: torch.cat([parts[index] for index in sorted(parts)]) if len(parts) > 1 else parts[0]
        for key, parts in pieces.items()
    }


def shape_of(tensors: Mapping[str, Tensor], key: str, dimensions: int, source: str) -> List[int]:
    """Sizes of a tensor that has so many dimensions, none of them empty.

    Raises:
        InputError: names `source` and the tensor that is missing or of another shape.
    """
    if key not in tensors:
        raise InputError(f"{source}: tensor '{key}' is missing; the file is of another model or not whole")
    shape = list(tensors[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise _wrong_shape(source, key, tensors[key], f"needed are {dimensions} sizes above 0")
    return shape


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; needs no memory of its size."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_names(found: Iterable[str], places: Collection[str], surplus: Collection[str], source: str) -> None:
    found = set(found)
    for key in sorted(set(places) - found):
        raise InputError(f"{source}: tensor '{key}' is missing; the file is of another model or not whole")
    for key in sorted(found - set(places) - set(surplus)):
        raise InputError(f"{source}: tensor {key!r} is not known; the file is of another model")


def _wrong_shape(source: str, key: str, found: Tensor, why: str) -> InputError:
    return InputError(f"{source}: tensor '{key}' has shape {tuple(found.shape)}, {why}; the file is of another model")
