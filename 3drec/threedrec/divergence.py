"""Whether an optimisation still has finite values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from threedrec.errors import InputError


class DivergenceError(InputError):
    """The optimisation produced values that are not finite."""


@dataclass
class _Question:
    """What was asked about a step."""

    where: str
    loss: Tensor
    terms: dict[str, Tensor]
    answer: Tensor
    """Whether all is finite; on the host, once ``arrived``."""
    arrived: torch.cuda.Event | None


class FiniteCheck:
    """Asks the device whether a step's loss and gradients are finite.

    On a CPU the answer is looked at at once. On a GPU it is looked at when the next step has been launched, so that the
    host prepares that one while the device works, or by `read`, which has to come before anything that is kept of the
    step. The optimiser has taken the bad step by then; that does no harm, for the run ends and nothing of it is saved.
    """

    def __init__(self, late: bool) -> None:
        """Look at answers one step late, or at once."""
        self.late = late
        self._open: _Question | None = None

    def ask(
        self, where: str, loss: Tensor, terms: Mapping[str, Tensor | float], parameters: Sequence[nn.Parameter]
    ) -> None:
        """Ask about a step's loss and the gradients of ``parameters``; read the answer about the step before.

        Args:
            where: names the step.
            loss: a scalar.
            terms: what the loss is made of, by name, to tell which of them are not finite.
            parameters: those of them that have gradients are asked about.

        Raises:
            DivergenceError: see `read`.
        """
        self.read()
        # One question, since every answer has to be waited for; one sum is one pass without a mask, and is not finite
        # as soon as one entry is not.
        sums = [parameter.grad.sum() for parameter in parameters if parameter.grad is not None]
        answer = torch.stack([loss.detach(), *sums]).isfinite().all()
        kept = {name: torch.as_tensor(value).detach() for name, value in terms.items()}
        # Without blocking, a copy from a GPU goes to pinned memory, and is there when the event says so.
        self._open = _Question(where, loss.detach(), kept, answer.to("cpu", non_blocking=True), _recorded(answer))
        if not self.late:
            self.read()

    def read(self) -> None:
        """Wait for the answer that is still open, if there is one.

        Raises:
            DivergenceError: the step that it is about was not finite; names the step and what was not.
        """
        asked, self._open = self._open, None
        if asked is None:
            return
        if asked.arrived is not None:
            asked.arrived.synchronize()
        if not bool(asked.answer):
            raise DivergenceError(_describe(asked))


def _recorded(value: Tensor) -> torch.cuda.Event | None:
    """An event behind all that the device of ``value`` was told to do so far."""
    if not value.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(value.device))
    return event


def _describe(asked: _Question) -> str:
    if bool(asked.loss.isfinite()):
        what = "a gradient is not finite"
    else:
        bad = [name for name, value in asked.terms.items() if not bool(value.isfinite().all())]
        what = f"the loss is not finite ({', '.join(bad) or 'their sum'})"
    return f"{asked.where}: {what}; lower the learning rate (system.optimizer.args.lr)"
