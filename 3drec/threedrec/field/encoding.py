"""Encodings of points and directions as modules, chosen by ``otype``; every one knows its own derivative.

``forward(x)`` takes coordinates in [0, 1] and returns (N, C) features. ``with_jacobian(x)`` also returns their
derivative along x, (N, C, 3), itself differentiable in the parameters. ``update(step)`` opens levels or bands as the
optimisation goes on.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from threedrec.config_schema import limited
from threedrec.errors import InputError
from threedrec.field.backend import check_backend, use_triton
from threedrec.field.hashgrid import build_levels, encode, encode_with_jacobian
from threedrec.field.hashgrid_batched import encode_batched, encode_batched_with_jacobian

if TYPE_CHECKING:
    from threedrec.field.hashgrid_triton import Grid

Features = Float[Tensor, "N C"]
Jacobian = Float[Tensor, "N C 3"]
Pull = Callable[[Features], Float[Tensor, "N 3"]]
"""From g, (N, C), to J^T g, (N, 3), where J is the features' derivative along the coordinates."""

CHANNELS = (1, 2, 4, 8)
"""Features per level that the Triton kernels can hold side by side."""


@dataclass
class EncodingConfig:
    """Keys of ``pos_encoding_config`` and ``dir_encoding_config``; each ``otype`` reads its own."""

    otype: str = "HashGrid"
    """HashGrid, ProgressiveBandHashGrid, Frequency, ProgressiveBandFrequency or SphericalHarmonics."""
    include_xyz: bool = False
    """Put the coordinates themselves, scaled to [-1, 1], before the features."""
    n_levels: int = 16
    n_features_per_level: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = limited(1.447269237440378, ge=1)
    start_level: int = 4
    """ProgressiveBandHashGrid: levels open from the start, up to ``start_step``."""
    start_step: int = 0
    update_steps: int = 500
    """ProgressiveBandHashGrid: steps per further level."""
    n_frequencies: int = 6
    n_masking_step: int = 0
    """ProgressiveBandFrequency: step at which all bands are open; 0 opens them at once."""
    degree: int = 3
    """SphericalHarmonics: number of bands, 1 to 4."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Hash grids: "triton" (kernels for CUDA), "torch", or "auto": Triton on CUDA where it is installed, else PyTorch.
    Under PyTorch's deterministic algorithms, which a reconstruction asks for, both give the same from run to run."""
    half_precision: bool = False
    """Hash grids on Triton: read the table in float16, train it in float32. Rounds features to three digits."""


class Encoding(nn.Module, ABC):
    """Base of all encodings."""

    n_output_dims: int

    @abstractmethod
    def forward(self, x: Float[Tensor, "N 3"]) -> Features:
        """Return the features of coordinates in [0, 1]."""

    def with_jacobian(self, x: Float[Tensor, "N 3"]) -> tuple[Features, Jacobian]:
        """Return features and their derivative along x; encodings of directions have none."""
        raise TypeError(f"{type(self).__name__} encodes directions and has no derivative")

    def with_pull(self, x: Float[Tensor, "N 3"]) -> tuple[Features, Pull]:
        """Return features and what applies their transposed derivative; both differentiable once in the parameters.

        To be applied once where it is to be differentiated.
        """
        features, slopes = self.with_jacobian(x)
        return features, lambda g: torch.einsum("nc,ncd->nd", g, slopes)

    def update(self, step: int) -> None:
        """Set the state that belongs to an optimisation step."""


class HashGrid(Encoding):
    """Multiresolution hash grid."""

    def __init__(self, config: EncodingConfig, key: str = "pos_encoding_config") -> None:
        super().__init__()
        self.config, self.key = config, key
        self.levels = build_levels(
            config.n_levels, config.base_resolution, config.per_level_scale, config.log2_hashmap_size
        )
        self.n_output_dims = config.n_levels * config.n_features_per_level
        rows = self.levels[-1].start + self.levels[-1].rows
        # The paper's initialisation (section 4): small enough to start from the density bias alone.
        self.table = nn.Parameter(torch.empty(rows, config.n_features_per_level).uniform_(-1e-4, 1e-4))
        self.open_levels = config.n_levels

    def forward(self, x: Float[Tensor, "N 3"]) -> Features:
        """Return the features of coordinates in [0, 1]."""
        if (grid := self._grid(x)) is not None:
            from threedrec.field.hashgrid_triton import encode_triton

            return encode_triton(x, self.table, grid)
        lookup = encode_batched if _suits_batched(x) else encode
        return self._padded(lookup(x, self.table, self.levels[: self.open_levels]))

    def with_jacobian(self, x: Float[Tensor, "N 3"]) -> tuple[Features, Jacobian]:
        """Return features and their derivative along x."""
        lookup = encode_batched_with_jacobian if _suits_batched(x) else encode_with_jacobian
        features, slopes = lookup(x, self.table, self.levels[: self.open_levels])
        return self._padded(features), self._padded(slopes)

    def with_pull(self, x: Float[Tensor, "N 3"]) -> tuple[Features, Pull]:
        """Return features and what applies their transposed derivative; Triton needs no jacobian for it."""
        grid = self._grid(x)
        if grid is None:
            return super().with_pull(x)
        from threedrec.field.hashgrid_triton import encode_linked

        linked = encode_linked(x, self.table, grid)
        return linked.features, linked.pull

    def _grid(self, x: Tensor) -> "Grid | None":
        """Return what the kernels need, or None when PyTorch does the lookup (always where x wants a gradient)."""
        config, channels = self.config, self.config.n_features_per_level
        misfit = None if channels in CHANNELS else f"n_features_per_level is {channels}, not one of {CHANNELS}"
        if x.requires_grad or not use_triton(config.backend, x.device, misfit, self.key):
            return None
        from threedrec.field.hashgrid_triton import Grid

        # The copy is made each time: an optimiser may change the table without PyTorch's counter of versions noticing.
        table = self.table.detach().half() if config.half_precision else self.table.detach()
        return Grid(tuple(self.levels), self.open_levels, channels, table)

    def _padded(self, values: Tensor) -> Tensor:
        """Fill in zeros, along dimension 1, for the closed levels: leaving them out of the lookup saves their cost."""
        missing = self.n_output_dims - values.shape[1]
        if missing == 0:
            return values
        return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)


def _suits_batched(points: Tensor) -> bool:
    """Whether to look all levels up at once: on a GPU, where no gradient of the points is asked for."""
    return points.is_cuda and not points.requires_grad


class ProgressiveHashGrid(HashGrid):
    """Hash grid that opens its levels step by step; closed ones are zero."""

    def __init__(self, config: EncodingConfig, key: str = "pos_encoding_config") -> None:
        super().__init__(config, key)
        self.update(0)

    def update(self, step: int) -> None:
        """Set the state that belongs to an optimisation step."""
        config = self.config
        opened = config.start_level + max(step - config.start_step, 0) // max(config.update_steps, 1)
        self.open_levels = min(max(opened, 1), config.n_levels)

    def get_extra_state(self) -> Tensor:
        """What a checkpoint keeps beside the table."""
        # No buffer: that would live on the device, and every lookup would wait for it.
        return torch.tensor(self.open_levels)

    def set_extra_state(self, state: Tensor) -> None:
        """Open as many levels as the checkpoint had."""
        self.open_levels = int(state)


class Frequency(Encoding):
    """sin and cos of 2^k s x for k < n_frequencies (Mildenhall et al. 2020, equation 4), with a cosine window.

    "Frequency" is tiny-cuda-nn's (s = pi); "ProgressiveBandFrequency" is threestudio's (s = 1) and opens its bands one
    after another over ``n_masking_step`` steps (the window of Park et al. 2021, equation 8).
    """

    frequencies: Tensor
    window: Tensor

    def __init__(self, config: EncodingConfig, progressive: bool) -> None:
        super().__init__()
        self.n_masking_step = config.n_masking_step if progressive else 0
        self.n_output_dims = 6 * config.n_frequencies
        base = 1.0 if progressive else math.pi
        self.register_buffer("frequencies", base * 2.0 ** torch.arange(config.n_frequencies), persistent=False)
        # A checkpoint is rendered with the bands that were open when it was written.
        self.register_buffer("window", torch.ones(config.n_frequencies), persistent=progressive)
        self.update(0)

    def forward(self, x: Float[Tensor, "N 3"]) -> Features:
        """Return the features of coordinates in [0, 1]."""
        phase = x[:, None, :] * self.frequencies[:, None]
        waves = torch.stack([torch.sin(phase), torch.cos(phase)], dim=2) * self.window[:, None, None]
        return waves.flatten(1)

    def with_jacobian(self, x: Float[Tensor, "N 3"]) -> tuple[Features, Jacobian]:
        """Return features and their derivative along x."""
        phase = x[:, None, :] * self.frequencies[:, None]
        slopes = torch.stack([torch.cos(phase), -torch.sin(phase)], dim=2)
        slopes = slopes * (self.window * self.frequencies)[:, None, None]
        return self(x), torch.diag_embed(slopes).flatten(1, 3)

    def update(self, step: int) -> None:
        """Set the state that belongs to an optimisation step."""
        if self.n_masking_step <= 0:
            return
        count = len(self.frequencies)
        progress = step / self.n_masking_step * count - torch.arange(count, device=self.window.device)
        self.window.copy_(0.5 * (1.0 - torch.cos(math.pi * progress.clamp(0.0, 1.0))))


class SphericalHarmonics(Encoding):
    """Real spherical harmonics of a unit direction d, given as (d + 1) / 2 (Sloan 2008, appendix A2)."""

    def __init__(self, config: EncodingConfig) -> None:
        super().__init__()
        if not 1 <= config.degree <= 4:
            raise InputError(f"encoding.degree: SphericalHarmonics has 1 to 4 bands, got {config.degree}")
        self.n_output_dims = config.degree**2

    def forward(self, x: Float[Tensor, "N 3"]) -> Features:
        """Return the features of coordinates in [0, 1]."""
        x, y, z = (2.0 * x - 1.0).unbind(-1)
        xx, yy, zz = x * x, y * y, z * z
        bands = [
            torch.full_like(x, 0.28209479177387814),
            -0.4886025119029199 * y,
            0.4886025119029199 * z,
            -0.4886025119029199 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (3.0 * zz - 1.0),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
            0.5900435899266435 * y * (yy - 3.0 * xx),
            2.890611442640554 * x * y * z,
            0.4570457994644658 * y * (1.0 - 5.0 * zz),
            0.3731763325901154 * z * (5.0 * zz - 3.0),
            0.4570457994644658 * x * (1.0 - 5.0 * zz),
            1.445305721320277 * z * (xx - yy),
            0.5900435899266435 * x * (3.0 * yy - xx),
        ]
        return torch.stack(bands[: self.n_output_dims], dim=-1)


class WithCoordinates(Encoding):
    """Another encoding with the coordinates, scaled to [-1, 1], in front."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.encoding = encoding
        self.n_output_dims = 3 + encoding.n_output_dims

    def forward(self, x: Float[Tensor, "N 3"]) -> Features:
        """Return the features of coordinates in [0, 1]."""
        return torch.cat([2.0 * x - 1.0, self.encoding(x)], dim=-1)

    def with_jacobian(self, x: Float[Tensor, "N 3"]) -> tuple[Features, Jacobian]:
        """Return features and their derivative along x."""
        features, slopes = self.encoding.with_jacobian(x)
        own = 2.0 * torch.eye(3, device=x.device, dtype=x.dtype).expand(len(x), 3, 3)
        return torch.cat([2.0 * x - 1.0, features], dim=-1), torch.cat([own, slopes], dim=1)

    def with_pull(self, x: Float[Tensor, "N 3"]) -> tuple[Features, Pull]:
        """Return features and what applies their transposed derivative."""
        features, pull = self.encoding.with_pull(x)
        return torch.cat([2.0 * x - 1.0, features], dim=-1), lambda g: 2.0 * g[:, :3] + pull(g[:, 3:])

    def update(self, step: int) -> None:
        """Set the state that belongs to an optimisation step."""
        self.encoding.update(step)


def build_encoding(config: EncodingConfig, key: str = "pos_encoding_config") -> Encoding:
    """Return the encoding that ``config.otype`` names.

    Raises:
        InputError: an unknown ``otype`` or an impossible size; the message starts with ``key``.
    """
    builders = {
        "HashGrid": lambda: HashGrid(config, key),
        "ProgressiveBandHashGrid": lambda: ProgressiveHashGrid(config, key),
        "Frequency": lambda: Frequency(config, progressive=False),
        "ProgressiveBandFrequency": lambda: Frequency(config, progressive=True),
        "SphericalHarmonics": lambda: SphericalHarmonics(config),
    }
    if config.otype not in builders:
        raise InputError(f"{key}.otype: unknown encoding {config.otype!r}; use one of {', '.join(builders)}")
    check_backend(config.backend, key)
    if config.half_precision and config.backend == "torch":
        raise InputError(f"{key}.half_precision: needs the Triton backend, but {key}.backend is torch")
    sizes = ("n_levels", "n_features_per_level", "log2_hashmap_size", "base_resolution", "n_frequencies")
    for name in sizes:
        if getattr(config, name) < 1:
            raise InputError(f"{key}.{name}: must be at least 1, got {getattr(config, name)}")
    encoding = builders[config.otype]()
    return WithCoordinates(encoding) if config.include_xyz else encoding
