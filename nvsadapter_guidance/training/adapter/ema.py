"""A moving average of the weights that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Dict

import torch
from torch import Tensor, nn

from nvsadapter_guidance.state import check_tensors


class MovingAverage:
    """Exponential moving average of parameters, float32, on their device.

    The n-th update (from 1) keeps the share min(decay, (1 + n) / (10 + n)) of what was, as in the released training,
    so that the first weights are soon forgotten.

    Args:
        parameters: by name; the average starts as a copy of them.
    """

    def __init__(self, parameters: Dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        self.tensors = {name: value.detach().float().clone() for name, value in parameters.items()}

    def share_kept(self) -> float:
        """What the update that was made last kept of the average."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights."""
        self.updates += 1
        now = [value.detach().float() for value in self.parameters.values()]
        torch._foreach_lerp_(list(self.tensors.values()), now, 1.0 - self.share_kept())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for the length of the block."""
        kept = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._fill(self.tensors)
        try:
            yield
        finally:
            self._fill(kept)

    def state_dict(self) -> Dict[str, Any]:
        """Tensors and counter."""
        return {"updates": self.updates, "tensors": self.tensors}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            InputError: it is of other parameters.
        """
        check_tensors(state["tensors"], self.tensors, "the checkpoint's moving average")
        self.updates = int(state["updates"])
        for name, value in state["tensors"].items():
            self.tensors[name].copy_(value)

    @torch.no_grad()
    def _fill(self, tensors: Dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.parameters[name].copy_(value)
