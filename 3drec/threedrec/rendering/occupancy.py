"""Which cells of the box hold something: a coarse grid that lets rays skip empty space.

Each cell keeps a decaying maximum of the opacity of one ray step inside it (Mueller et al. 2022, appendix E.2); cells
above a threshold are occupied, and so are their neighbours across a face: a test at a random point of a cell that the
surface just enters often misses it, and a hole in the grid would be a hole in the object.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

DensityFunction = Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 1"]]


class OccupancyGrid(nn.Module):
    """A binary grid over [-radius, radius]^3, all occupied until the first update.

    Args:
        resolution: cells per axis.
        radius: half side of the box, world units.
        threshold: opacity of one ray step above which a cell is occupied; the grid's mean when that is lower, so that
            a field that is faint everywhere keeps its better half.
        decay: factor of the stored opacity per update.
        warmup_steps: updates up to this step test all cells, later ones a quarter of them and the occupied ones.
        chunk: points per call of the density function.
    """

    opacity: Tensor
    binary: Tensor
    bounds: Tensor

    def __init__(
        self,
        resolution: int,
        radius: float,
        threshold: float = 0.01,
        decay: float = 0.95,
        warmup_steps: int = 256,
        chunk: int = 131072,
    ) -> None:
        super().__init__()
        self.resolution, self.radius = resolution, radius
        self.threshold, self.decay, self.warmup_steps, self.chunk = threshold, decay, warmup_steps, chunk
        self.register_buffer("opacity", torch.zeros(resolution**3))
        self.register_buffer("binary", torch.ones(resolution**3, dtype=torch.bool))
        self.register_buffer("bounds", torch.tensor([[-radius] * 3, [radius] * 3]))
        self._measured: tuple[Tensor, Tensor, tuple[int, int], tuple[float, float]] | None = None

    @torch.no_grad()
    def update(self, step: int, density: DensityFunction, step_size: float, generator: torch.Generator | None) -> None:
        """Test cells and refresh the binary grid and the box around its occupied cells (``bounds``).

        Args:
            step: optimisation step; decides which cells are tested.
            density: the field.
            step_size: length of one ray step, world units.
            generator: source of the test points.
        """
        cells = None if step < self.warmup_steps else self._sample_cells(generator)
        fresh = self._test(cells, density, step_size, generator)
        if cells is None:
            self.opacity = torch.maximum(self.opacity * self.decay, fresh)
        else:
            # Decay once per cell, however often it was drawn.
            self.opacity[cells] = self.opacity[cells] * self.decay
            self.opacity.scatter_reduce_(0, cells, fresh, reduce="amax")
        self._binarise()

    @torch.no_grad()
    def refresh(
        self, density: DensityFunction, step_size: float, generator: torch.Generator | None = None, tests: int = 4
    ) -> None:
        """Forget the past and test every cell ``tests`` times; what evaluation of a finished field needs."""
        fresh = self._test(None, density, step_size, generator)
        for _ in range(tests - 1):
            fresh = torch.maximum(fresh, self._test(None, density, step_size, generator))
        self.opacity = fresh
        self._binarise()

    @property
    def mean_opacity(self) -> float:
        """Mean of the stored opacities."""
        return self._measures()[0]

    @property
    def diagonal(self) -> float:
        """Length of the diagonal of ``bounds``, world units."""
        return self._measures()[1]

    def _measures(self) -> tuple[float, float]:
        """Mean opacity and diagonal; asked of the device only when the grid has changed, since asking means waiting."""
        versions = (self.opacity._version, self.bounds._version)
        known = self._measured
        if known is None or known[0] is not self.opacity or known[1] is not self.bounds or known[2] != versions:
            both = torch.stack([self.opacity.mean(), (self.bounds[1] - self.bounds[0]).norm()]).tolist()
            known = self._measured = (self.opacity, self.bounds, versions, (both[0], both[1]))
        return known[3]

    def occupied(self, points: Float[Tensor, "N 3"]) -> Bool[Tensor, " N"]:
        """Return whether the cells of world points are occupied; points outside take the nearest cell."""
        index = ((points + self.radius) * (self.resolution / (2 * self.radius))).int().clamp(0, self.resolution - 1)
        x, y, z = index.unbind(-1)
        return self.binary.index_select(0, (x * self.resolution + y) * self.resolution + z)

    def _sample_cells(self, generator: torch.Generator | None) -> Int[Tensor, " M"]:
        total = self.resolution**3
        device = self.opacity.device if generator is None else generator.device
        uniform = torch.randint(total, (total // 4,), generator=generator, device=device).to(self.opacity.device)
        return torch.cat([uniform, self.binary.nonzero()[:, 0]])

    def _test(
        self,
        cells: Int[Tensor, " M"] | None,
        density: DensityFunction,
        step_size: float,
        generator: torch.Generator | None,
    ) -> Float[Tensor, " M"]:
        device = self.opacity.device
        if cells is None:
            cells = torch.arange(self.resolution**3, device=device)
        results = []
        for part in cells.split(self.chunk):
            corner = torch.stack([part // self.resolution**2, part // self.resolution % self.resolution, part], dim=-1)
            corner[:, 2] %= self.resolution
            draw_on = device if generator is None else generator.device
            inside = torch.rand((len(part), 3), generator=generator, device=draw_on).to(device)
            points = (corner + inside) * (2 * self.radius / self.resolution) - self.radius
            results.append(-torch.expm1(-density(points)[:, 0].float() * step_size))
        return torch.cat(results)

    def _binarise(self) -> None:
        size = self.resolution
        # All of this stays on the device: to read a number would be to wait for it.
        occupied = self.opacity > self.opacity.mean().clamp(max=self.threshold)
        # An empty field would never be sampled, hence never change: look everywhere.
        cube = _grown((occupied | ~occupied.any()).view(size, size, size))
        self.binary = cube.reshape(-1)
        numbers = torch.arange(size, device=cube.device)
        low, high = [], []
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            taken = cube.any(dim=others[1]).any(dim=others[0])
            low.append(torch.where(taken, numbers, size).amin())
            high.append(torch.where(taken, numbers, -1).amax() + 1)
        corners = torch.stack(low + high).view(2, 3)
        self.bounds = corners * (2 * self.radius / size) - self.radius


def _grown(cube: Bool[Tensor, "G G G"]) -> Bool[Tensor, "G G G"]:
    """Return the cells that are set or share a face with one that is."""
    grown = cube.clone()
    for axis in range(3):
        count = cube.shape[axis] - 1
        grown.narrow(axis, 1, count).logical_or_(cube.narrow(axis, 0, count))
        grown.narrow(axis, 0, count).logical_or_(cube.narrow(axis, 1, count))
    return grown


def step_length(radius: float, num_samples: int) -> float:
    """Return the length of a ray step: the diagonal of the box over the number of samples."""
    return 2.0 * math.sqrt(3.0) * radius / num_samples
