"""Weights that are kept side by side, so that layers which read the same tensor are one product.

They are buffers named ``merged_<name>`` that are no part of a module's state, and None until they are made.
"""

from collections.abc import Iterable

from torch import Tensor, nn


def register_merged(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module its buffers."""
    for name in names:
        module.register_buffer(f"merged_{name}", None, persistent=False)


def keep_merged(module: nn.Module, made: dict[str, Tensor]) -> None:
    """Fill a module's buffers; those that fit already stay where they lie, for captured graphs go on reading them."""
    for name, value in made.items():
        known = getattr(module, f"merged_{name}")
        if known is not None and _alike(known, value):
            known.copy_(value)
        else:
            setattr(module, f"merged_{name}", value)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def drop_merged(module: nn.Module) -> None:
    """Empty a module's buffers."""
    for name in module._buffers:
        if name.startswith("merged_"):
            setattr(module, name, None)
