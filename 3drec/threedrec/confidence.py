"""How far sampled views are believed, and which of their pixels to look at.

Sampled views are sharp but do not agree: a diffusion model may turn one of them the wrong way or give it another
colour. The field is fitted to all of them at once, with weights that follow the agreement: a view, or a part of one,
that stays far from what the others make of it counts less and less (iteratively reweighted least squares with the
Geman-McClure function, Geman and McClure 1987; in Barron, CVPR 2019, eq. 1 with alpha = -2). The reference photograph
is not judged; it is always believed.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from threedrec.warm_start import ViewSet

SMALLEST_SCALE = 0.1
"""Colour difference in [0, 1]."""


class Confidence:
    """How far each part of each view is believed: running residuals on a coarse grid over every view.

    The weight of a part is the product of its own Geman-McClure weight, ``1 / (1 + (r / c)²)²``, and its view's, with
    residuals r measured against ``c = tolerance ×`` the median over the parts that show the object. c does not fall
    below ``SMALLEST_SCALE``: once views agree, what is left is no disagreement but detail that is not fitted yet.
    """

    def __init__(self, views: ViewSet, tolerance: float, cells: int = 16, memory: float = 0.9) -> None:
        """Start with full confidence.

        Args:
            views: the views to judge.
            tolerance: see `WarmStartConfig.tolerance`.
            cells: the grid has ``cells × cells`` parts.
            memory: share of the running mean that an update keeps.
        """
        count, height, width = views.rgb.shape[:3]
        mask = views.mask.permute(0, 3, 1, 2)
        self._object = torch.nn.functional.adaptive_max_pool2d(mask, cells)[:, 0] > 0.5
        self._size = (height, width)
        self.tolerance, self.cells, self.memory = tolerance, cells, memory
        self.residual = torch.zeros(count, cells, cells, device=views.rgb.device)
        self.seen = torch.zeros_like(self.residual, dtype=torch.bool)

    def update(self, view: Int[Tensor, " R"], y: Int[Tensor, " R"], x: Int[Tensor, " R"], error: Tensor) -> None:
        """Take in the residuals ``error`` (R,) of pixels (view, y, x)."""
        cell = self._cell(view, y, x)
        total = torch.zeros_like(self.residual.view(-1)).index_add_(0, cell, error.detach().float())
        count = torch.zeros_like(total).index_add_(0, cell, torch.ones_like(error, dtype=torch.float32))
        mean = (total / count.clamp(min=1)).view_as(self.residual)
        new = (count > 0).view_as(self.residual)
        first = new & ~self.seen
        running = self.memory * self.residual + (1 - self.memory) * mean
        self.residual = torch.where(first, mean, torch.where(new, running, self.residual))
        self.seen |= new

    def weight(self, view: Int[Tensor, " R"], y: Int[Tensor, " R"], x: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
        """Weights in (0, 1] of pixels (view, y, x)."""
        return self.weights().view(-1)[self._cell(view, y, x)]

    def weights(self) -> Float[Tensor, "V G G"]:
        """Weights in (0, 1] of all parts of all views."""
        known = self._object & self.seen
        # Written without choosing entries by a mask, for which a GPU would be waited for.
        median = torch.where(known, self.residual, torch.nan).nanmedian()
        parts = _geman_mcclure(self.residual, self.tolerance * median)
        inside = self.residual * known
        view_residual = inside.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)
        # Whole views differ less among themselves than parts do, so their own median is the measure.
        views = _geman_mcclure(view_residual, self.tolerance * view_residual.median())
        return torch.where(known.any(), parts * views[:, None, None], 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Running state, for checkpoints."""
        return {"residual": self.residual, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state that `state_dict` gave."""
        self.residual = state["residual"].to(self.residual)
        self.seen = state["seen"].to(self.seen)

    def _cell(self, view: Tensor, y: Tensor, x: Tensor) -> Tensor:
        height, width = self._size
        return (view * self.cells + y * self.cells // height) * self.cells + x * self.cells // width


def _geman_mcclure(residual: Tensor, scale: Tensor) -> Tensor:
    return (1.0 + (residual / scale.clamp(min=SMALLEST_SCALE)).square()).reciprocal().square()


class RaySampler:
    """Draws pixels of the views: mostly around the silhouettes, some from the whole frame."""

    def __init__(self, mask: Float[Tensor, "V H W 1"], foreground_share: float) -> None:
        near = torch.nn.functional.max_pool2d(mask.permute(0, 3, 1, 2), 9, stride=1, padding=4)[:, 0] > 0.5
        self._near = near.reshape(-1).nonzero()[:, 0]
        self._shape = near.shape
        self.foreground_share = foreground_share

    def __call__(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return (view, y, x), each an (n,) tensor of int64."""
        device = self._near.device
        total = math.prod(self._shape)
        inside = min(n, round(n * self.foreground_share)) if len(self._near) else 0
        everywhere = torch.randint(total, (n - inside,), generator=generator, device=device)
        if inside:
            pick = torch.randint(len(self._near), (inside,), generator=generator, device=device)
            everywhere = torch.cat([self._near[pick], everywhere])
        _, height, width = self._shape
        return everywhere // (height * width), everywhere // width % height, everywhere % width
