"""What the reconstruction asks of a guidance, and what it gets back.

A guidance judges rendered views. The reconstruction meets every guidance through this protocol alone, so that another
package can bring its own (``threedrec.plugins`` entry points, see ``threedrec.registry``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from threedrec.cameras import Cameras
from threedrec.image import SupportView


@dataclass
class GuidanceOutput:
    """One judgement of a batch of views."""

    loss: Float[Tensor, ""]
    """Scalar; its gradient with respect to the rendered rgb is the guidance."""
    diagnostics: dict[str, float | Tensor] = field(default_factory=dict)
    """Scalars to log (``timestep``, ``grad_norm``, ...)."""


@runtime_checkable
class Guidance(Protocol):
    """A judge of rendered views."""

    description: str
    """One line for people: which model, which weights."""

    def prepare(self, support: SupportView) -> None:
        """Do once what does not change between steps (encode the support view)."""

    def __call__(
        self, rgb: Float[Tensor, "B H W 3"], cameras: Cameras, step: int, generator: torch.Generator
    ) -> GuidanceOutput:
        """Judge ``rgb`` in [0, 1], seen from ``cameras``."""

    def preview(
        self, rgb: Float[Tensor, "B H W 3"], cameras: Cameras, step: int, generator: torch.Generator
    ) -> Float[Tensor, "B H W 3"]:
        """Return what the guidance would rather see from the same cameras, in [0, 1]."""


@runtime_checkable
class ViewSampler(Protocol):
    """A guidance that can also imagine views without a field; what a warm start needs."""

    description: str

    def sample_views(
        self,
        cameras: Cameras,
        generator: torch.Generator,
        num_inference_steps: int,
        guidance_scale: float,
        on_step: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "B H W 3"]:
        """Sample mutually consistent views in [0, 1], as many as there are cameras.

        ``on_step`` is called with the number of denoising steps that are over.
        """
