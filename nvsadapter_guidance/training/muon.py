"""Muon: momentum whose matrix-shaped updates are made orthogonal before they are applied.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the update is scaled to the size of an Adam step as in Liu et
al. 2025 (arXiv 2502.16982, Eq. 4), so that one learning rate and one weight decay serve both optimisers.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nvsadapter_guidance.cuda_graphs import capture

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that drives every singular value towards one."""


def orthogonalise(matrices: Float[Tensor, "batch rows cols"], steps: int = 5) -> Float[Tensor, "batch rows cols"]:
    """Replace the singular values of each matrix by values near one (between about 0.7 and 1.2).

    Fewer rows than columns make it cheap. Rows and columns of zeros stay zero and change nothing else.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def orthogonalise_all(updates: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise tensors of many shapes, read as ``(out, rest)`` matrices, in a few batches.

    Launching kernels costs more than these products, so matrices of similar size share a batch, padded with zeros.
    """
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    matrices = [u.flatten(1) for u in updates]
    matrices = [m if m.shape[0] <= m.shape[1] else m.mT for m in matrices]
    for index, matrix in enumerate(matrices):
        short, long = matrix.shape
        batches[-(-short // 64) * 64, 1 << (long - 1).bit_length()].append(index)
    results: list[Tensor] = [torch.empty(0)] * len(updates)
    for (short, long), members in batches.items():
        batch = matrices[0].new_zeros(len(members), short, long)
        places = [batch[row, : matrices[i].shape[0], : matrices[i].shape[1]] for row, i in enumerate(members)]
        torch._foreach_copy_(places, [matrices[i] for i in members])
        solved = orthogonalise(batch)
        for row, i in enumerate(members):
            out = solved[row, : matrices[i].shape[0], : matrices[i].shape[1]]
            rows, cols = updates[i].flatten(1).shape
            results[i] = (out if rows <= cols else out.mT).reshape(updates[i].shape)
    return results


class Muon(torch.optim.Optimizer):
    """Muon for tensors with at least two dimensions; kernels are read as (out, in * height * width) matrices.

    On a GPU an update is captured once and replayed: it is made of thousands of small kernels, whose launches take
    longer than they do.

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
        self._captured: dict[int, CapturedUpdate] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            if not all(p.is_cuda for p in params):
                muon_update(
                    params, momenta, gradients, torch.tensor(group["lr"]), group["momentum"], group["weight_decay"]
                )
                continue
            captured = self._captured.get(index)
            if captured is None or not captured.is_of(params, momenta, group):
                self._captured[index] = captured = CapturedUpdate(params, momenta, gradients, group)
            captured(gradients, group["lr"])


def muon_update(
    params: list[Tensor],
    momenta: list[Tensor],
    gradients: list[Tensor],
    lr: Float[Tensor, ""],
    momentum: float,
    weight_decay: float,
) -> None:
    """Move parameters and their momenta, in place."""
    torch._foreach_lerp_(momenta, gradients, 1.0 - momentum)
    updates = orthogonalise_all(torch._foreach_lerp(gradients, momenta, momentum))
    # 0.2 is the usual root-mean-square of an Adam update.
    sizes = [-0.2 * max(p.flatten(1).shape) ** 0.5 for p in params]
    torch._foreach_mul_(params, 1.0 - lr * weight_decay)
    torch._foreach_add_(params, torch._foreach_mul(torch._foreach_mul(updates, sizes), lr))


class CapturedUpdate:
    """`muon_update` on a GPU as one launch, for the tensors that it is made with."""

    def __init__(
        self, params: list[Tensor], momenta: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        self._key = self._key_of(params, momenta, group)
        self._gradients = [g.clone() for g in gradients]
        self._lr = torch.tensor(group["lr"], device=params[0].device)
        state = [*params, *momenta]
        before = [t.clone() for t in state]
        momentum, decay = group["momentum"], group["weight_decay"]
        self._graph, _ = capture(
            lambda: muon_update(params, momenta, self._gradients, self._lr, momentum, decay), pool=None
        )
        # Warming up for the capture has moved everything.
        torch._foreach_copy_(state, before)

    def is_of(self, params: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> bool:
        """Whether it moves these tensors, where they lie now, with these constants."""
        return self._key == self._key_of(params, momenta, group)

    @staticmethod
    def _key_of(params: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> tuple[float, ...]:
        return (group["momentum"], group["weight_decay"], *(t.data_ptr() for t in (*params, *momenta)))

    def __call__(self, gradients: list[Tensor], lr: float) -> None:
        """Apply one update."""
        torch._foreach_copy_(self._gradients, gradients)
        self._lr.fill_(lr)
        self._graph.replay()


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
