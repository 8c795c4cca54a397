"""Muon: momentum whose matrix-shaped updates are made orthogonal before they are applied.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the update is scaled to the size of an Adam step as in Liu et
al. 2025 (arXiv 2502.16982, Eq. 4), so that one learning rate and one weight decay serve both optimisers.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that drives every singular value towards one."""


def orthogonalise(matrices: Float[Tensor, "batch rows cols"], steps: int = 5) -> Float[Tensor, "batch rows cols"]:
    """Replace the singular values of each matrix by values near one (between about 0.7 and 1.2)."""
    a, b, c = NEWTON_SCHULZ
    dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    x = matrices.to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for tensors with at least two dimensions; kernels are read as (out, in * height * width) matrices.

    Args:
        params: the weight matrices and kernels of hidden layers.
        lr: learning rate on Adam's scale.
        momentum: Nesterov momentum.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; tensors of one shape are orthogonalised in one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.flatten(1).shape].append(p)
            for (rows, cols), params in by_shape.items():
                updates = torch.stack([self._nesterov(p, group["momentum"]).flatten(1) for p in params])
                # 0.2 is the usual root-mean-square of an Adam update.
                updates = orthogonalise(updates) * (0.2 * max(rows, cols) ** 0.5)
                torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
                flat = [u.view_as(p) for u, p in zip(updates, params, strict=True)]
                torch._foreach_add_(params, flat, alpha=-group["lr"])

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        grad = p.grad
        if grad is None:
            raise RuntimeError("a parameter lost its gradient")
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(grad, 1.0 - momentum)
        return grad.lerp(state["momentum"], momentum)


def split_parameters(module: torch.nn.Module, first_and_last: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Divide trainable parameters into (for Muon, for AdamW).

    Vectors, embeddings and layers whose names contain one of ``first_and_last`` go to AdamW, as Muon's authors advise.
    """
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim >= 2 and min(p.flatten(1).shape) > 1
        (rest if not is_matrix or any(part in name for part in first_and_last) else hidden).append(p)
    return hidden, rest
