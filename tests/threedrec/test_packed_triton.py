"""The renderer's Triton kernels against their PyTorch twins, in value and gradient.

On a GPU these are the compiled kernels; ``test_kernels_interpreted`` runs this file on the CPU.
"""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig, SolidBackground
from threedrec.rendering import DiffusePointLight, VolumeRenderer
from threedrec.rendering.compositing import composite, visible
from threedrec.rendering.marching import march
from threedrec.rendering.occupancy import OccupancyGrid

REAL = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if REAL else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
if not REAL:
    pytestmark = []

RAYS = 20_000 if REAL else 40
# The interpreter computes in float64 as well as the twin; a GPU is asked for what training uses.
KIND = torch.float32 if REAL else torch.float64
CLOSE = {"rtol": 1e-4, "atol": 1e-5} if REAL else {"rtol": 1e-9, "atol": 1e-9}
LENGTH = 0.05


def random_rays() -> tuple[Tensor, Tensor]:
    """Rays from all around to anywhere in the box, along axes, and past it."""
    origins = functional.normalize(torch.randn(RAYS, 3), dim=-1) * 2.5
    targets = torch.rand(RAYS, 3) * 2 - 1
    directions = functional.normalize(targets - origins, dim=-1)
    directions[:3] = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    directions[3] = functional.normalize(origins[3], dim=0)
    origins[4] = 0.0
    return origins.to(DEVICE, KIND), directions.to(DEVICE, KIND)


def grid_of_a_ball() -> OccupancyGrid:
    grid = OccupancyGrid(16, 1.0).to(DEVICE)
    grid.update(0, lambda points: 100.0 * (points.norm(dim=-1, keepdim=True) < 0.4), LENGTH, None)
    return grid


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("jittered", [True, False])
@pytest.mark.parametrize("limits", [(0.0, 1e10), (2.25, 2.875)])
def test_marching_finds_the_same_samples(skip, jittered, limits):
    from threedrec.rendering.packed_triton import march_packed

    rays_o, rays_d = random_rays()
    jitter = torch.rand(RAYS).to(rays_o) if jittered else None
    grid = grid_of_a_ball()
    want = march(rays_o, rays_d, grid, LENGTH, *limits, jitter, skip)
    starts, points, offsets = march_packed(rays_o, rays_d, grid, LENGTH, *limits, jitter, skip)
    counts = torch.bincount(want.ray_indices, minlength=RAYS)
    if REAL:
        # Rounding may move a middle across a cell's face.
        assert ((offsets.diff() - counts).abs() <= 2).all() and (offsets.diff() == counts).float().mean() > 0.999
        return
    assert torch.equal(offsets.diff(), counts) and 0 < len(starts) == offsets[-1]
    torch.testing.assert_close(starts, want.starts, **CLOSE)
    middles = rays_o[want.ray_indices] + want.middles[:, None] * rays_d[want.ray_indices]
    torch.testing.assert_close(points, middles, **CLOSE)


def packed(most: int) -> tuple[Tensor, Tensor]:
    """Ray indices and offsets of random numbers of samples, some of them none and one many."""
    counts = torch.randint(0, most, (RAYS,))
    counts[0], counts[1], counts[-1] = 0, 101, 0
    rays = torch.repeat_interleave(torch.arange(RAYS), counts)
    offsets = functional.pad(counts.cumsum(0), (1, 0))
    return rays.to(DEVICE), offsets.to(DEVICE)


def densities(count: int) -> Tensor:
    """From nothing through faint to more than opaque."""
    values = torch.exp(4.0 * torch.randn(count, dtype=KIND))
    values[::7] = 0.0
    values[3::50] = 1e6
    return values.to(DEVICE)


def test_visible_samples_are_the_same():
    from threedrec.rendering.packed_triton import visible_packed

    rays, offsets = packed(40)
    density, starts = densities(len(rays)), torch.rand(len(rays)).to(DEVICE, KIND)
    lengths = torch.full_like(density, LENGTH)
    keep = visible(density, lengths, rays, 1e-4, 0.01)
    got = visible_packed(density, starts, offsets, LENGTH, 1e-4, 0.01)
    if not REAL:
        assert torch.equal(got.ray_indices, rays[keep]) and torch.equal(got.starts, starts[keep])
    assert abs(len(got.starts) - int(keep.sum())) <= 1e-4 * len(rays)
    assert (got.ray_indices.diff() >= 0).all()
    torch.testing.assert_close(got.lengths, torch.full_like(got.starts, LENGTH), atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_normals", [True, False])
def test_sums_and_their_gradients_are_the_same(with_normals):
    from threedrec.rendering.packed_triton import composite_packed

    rays, _ = packed(70)
    count = len(rays)
    density = densities(count)[:, None].requires_grad_(True)
    distances = torch.rand(count, 1).to(DEVICE, KIND)
    colors, normals = (torch.randn(count, 3).to(DEVICE, KIND).requires_grad_(True) for _ in range(2))
    trained = [density, colors, *([normals] if with_normals else [])]
    got = composite_packed(density, LENGTH, distances, colors, normals if with_normals else None, rays, RAYS)

    exact = [value.detach().double().requires_grad_(True) for value in trained]
    lengths = torch.full_like(exact[0][:, 0], LENGTH)
    last = exact[2] if with_normals else None
    want = composite(exact[0], lengths, distances.double(), exact[1], last, rays, RAYS)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs.to(KIND), **CLOSE)

    pulls = [torch.randn(value.shape).to(DEVICE, KIND) for value in got]
    grads = torch.autograd.grad(got, trained, pulls)
    exact_grads = torch.autograd.grad(want, exact, [pull.double() for pull in pulls])
    for mine, theirs in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(mine, theirs.to(KIND), **CLOSE)


def test_no_samples_and_no_rays_give_nothing():
    from threedrec.rendering.packed_triton import composite_packed, march_packed

    empty = torch.zeros(0, 3, device=DEVICE, dtype=KIND)
    starts, points, offsets = march_packed(empty, empty, grid_of_a_ball(), LENGTH)
    assert len(starts) == len(points) == 0 and offsets.tolist() == [0]
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    weights, sums = composite_packed(empty[:, :1], LENGTH, empty[:, :1], empty, empty, none, 4)
    assert len(weights) == 0 and sums.abs().sum() == 0 and sums.shape == (4, 8)


def renderer_of(backend: str) -> VolumeRenderer:
    """A soft ball with a small field, the same for every backend."""
    torch.manual_seed(0)
    field = ImplicitVolume.Config(
        pos_encoding_config=EncodingConfig(n_levels=2, base_resolution=4, log2_hashmap_size=8, backend="torch"),
        mlp_network_config=MLPConfig(n_neurons=16),
        normal_type="analytic",
    )
    size = 128 if REAL else 16
    config = VolumeRenderer.Config(num_samples_per_ray=size, occupancy_resolution=size // 2, backend=backend)
    material, background = DiffusePointLight(DiffusePointLight.Config()), SolidBackground(SolidBackground.Config())
    renderer = VolumeRenderer(config, ImplicitVolume(field), material, background).to(DEVICE)
    renderer.update(0, torch.Generator(DEVICE).manual_seed(0))
    return renderer


@pytest.mark.parametrize("normals", [True, False])
def test_renders_and_their_gradients_are_those_of_plain_pytorch(normals):
    rays_o, rays_d = (rays.float() for rays in random_rays())
    found = []
    for backend in ("triton", "torch"):
        renderer = renderer_of(backend)
        output = renderer(rays_o, rays_d, normals=normals, generator=torch.Generator(DEVICE).manual_seed(1))
        assert len(output.samples.points) > 10
        loss = output.rgb.square().sum() + output.depth.sum() + output.samples.weights.square().sum()
        if normals:
            loss = loss + output.normal_image.square().sum()
        loss.backward()
        shown = (output.rgb, output.opacity, output.depth, *([output.normal] if normals else []))
        found.append([*shown, *(parameter.grad for parameter in renderer.geometry.parameters())])
    for mine, theirs in zip(*found, strict=True):
        # Rounding moves a sample into the next cell here and there.
        torch.testing.assert_close(
            mine, theirs, rtol=1e-2, atol=(1e-2 if REAL else 1e-4) * float(theirs.detach().abs().max())
        )
