"""Named activations of the configuration, among them the exponential with a bounded gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from threedrec.errors import InputError

MAX_EXPONENT = 15.0


class _TruncatedExp(torch.autograd.Function):
    """exp(x) whose gradient is exp(min(x, 15)), so that one huge density cannot wreck the optimiser's state.

    Densities follow instant-NGP (Mueller et al. 2022, section 5.4), which optimises in log space with this guard.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.exp(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * torch.exp(x.clamp(max=MAX_EXPONENT))


def trunc_exp(x: Tensor) -> Tensor:
    """Return exp(x), any shape, with the gradient of exp(min(x, 15))."""
    return _TruncatedExp.apply(x)


def identity(x: Tensor) -> Tensor:
    """Return ``x`` itself."""
    return x


def linear_to_srgb(x: Tensor) -> Tensor:
    """Return the sRGB transfer curve (IEC 61966-2-1) of linear values, clipped to [0, 1]."""
    curved = 1.055 * x.clamp(min=0.0031308) ** (1.0 / 2.4) - 0.055
    return torch.where(x > 0.0031308, curved, 12.92 * x).clamp(0.0, 1.0)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": identity,
    "relu": functional.relu,
    "softplus": functional.softplus,
    "shifted_softplus": lambda x: functional.softplus(x - 1.0),
    "exp": torch.exp,
    "shifted_exp": lambda x: torch.exp(x - 1.0),
    "trunc_exp": trunc_exp,
    "shifted_trunc_exp": lambda x: trunc_exp(x - 1.0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "lin2srgb": linear_to_srgb,
    "scale_-11_01": lambda x: 0.5 * x + 0.5,
}


def activation(name: str | None, key: str = "activation") -> Callable[[Tensor], Tensor]:
    """Return the elementwise function called ``name`` (case does not matter, None means "none").

    Raises:
        InputError: an unknown name; the message starts with ``key``, the configuration key that held it.
    """
    function = ACTIVATIONS.get("none" if name is None else name.lower())
    if function is None:
        raise InputError(f"{key}: unknown activation {name!r}; use one of {', '.join(ACTIVATIONS)}")
    return function
