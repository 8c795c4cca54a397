"""Every Triton kernel compiles for the GPUs it is meant for, without any of them.

Triton's interpreter, by which kernels are tested on the CPU, takes programs that its compiler refuses. Here the product
launches its kernels on small CPU tensors of real types and widths. A launch runs nothing, but compiles what its
arguments ask for down to machine code; what is in the tensors is left to chance.
"""

import importlib
import importlib.util
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import nn

from nvsadapter_guidance import triton_support
from nvsadapter_guidance.feed_forward import gate
from nvsadapter_guidance.group_norm import branch_group_norm_silu, group_norm_silu
from nvsadapter_guidance.lean_layers import add, enlarge
from nvsadapter_guidance.token_ops import normalise, place
from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig, backend
from threedrec.rendering.occupancy import OccupancyGrid

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes that one program may have, by compute capability: more compiles, and fails at its launch."""
WIDTHS = (320, 640, 1280)
"""Channels of Stable Diffusion's UNet."""
POINTS = 100


def missing() -> str | None:
    """Say what keeps kernels from being compiled here, if anything."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return "needs Triton (part of the dev extra on Linux)"
    if triton_support.is_interpreted():
        return "Triton was asked to interpret"
    bundled = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", "ptxas")
    try:
        subprocess.run([os.environ.get("TRITON_PTXAS_PATH", bundled), "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"Triton's assembler does not run: {error}"
    return None


REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def tokens(dtype: torch.dtype, *widths: int) -> None:
    """Launch what lies between the products of a transformer block."""
    for width in widths:
        x, delta, positional = torch.empty(3, 4, 16, width, dtype=dtype)
        vectors, bias, norm = x[:2, 0], x[0, 0], nn.LayerNorm(width, dtype=dtype).requires_grad_(False)
        place(x, delta, positional)
        normalise(x, norm)
        normalise(x, norm, delta, bias=bias)
        normalise(x, norm, None, vectors[:1], 0, 2.0, bias)
        normalise(x, norm, delta, vectors, 2, bias=bias, out=delta)
        gate(torch.empty(4, 16, 8 * width, dtype=dtype))


def images(dtype: torch.dtype, side: int, *widths: int) -> None:
    """Launch what lies between the convolutions of the UNet and of the autoencoder, and its backward pass."""
    for channels in widths:
        x = torch.empty(1, channels, side, side, dtype=dtype, memory_format=torch.channels_last)
        leaf, offset = x.detach().requires_grad_(), torch.empty(1, channels, dtype=dtype)
        norm = nn.GroupNorm(32, channels, dtype=dtype).requires_grad_(False)
        plain, moved = group_norm_silu(leaf, norm), group_norm_silu(leaf, norm, offset)
        for result in (plain, moved, group_norm_silu(leaf, norm, silu=False), add(leaf, x, offset[0])):
            torch.autograd.grad(result, leaf, x)
        torch.autograd.grad(branch_group_norm_silu(leaf, norm, offset), leaf, (x, x))
        bordered = add(leaf, x, offset[0], border=True)
        torch.autograd.grad(bordered, leaf, bordered.detach())
        enlarge(x, (2 * side, 2 * side))


def field(precision: Literal["float32", "tf32", "float16"], layers: int, half: bool = False) -> ImplicitVolume:
    """Launch density, features and normals of a field of the released sizes, and their backward pass."""
    mlp = MLPConfig(backend="triton", n_neurons=64, n_hidden_layers=layers, precision=precision)
    encoding = EncodingConfig(backend="triton", n_levels=16, n_features_per_level=2, half_precision=half)
    config = ImplicitVolume.Config(normal_type="analytic", pos_encoding_config=encoding, mlp_network_config=mlp)
    volume = ImplicitVolume(config)
    torch.cat(volume(torch.rand(POINTS, 3), normals=True), dim=1).sum().backward()
    return volume


def parts_of_field() -> None:
    """Launch each part of a field alone, also where sums must not depend on their order."""
    volume, points = field("tf32", 2), torch.rand(POINTS, 3)
    for repeatable in (False, True):
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=repeatable):
            for find in (volume.density, volume.features, volume.normal):
                find(points).sum().backward()
            density, _, normals = volume(points, normals=True)
            density.sum().backward(retain_graph=True)
            (density.sum() + normals.sum()).backward()


def rendering() -> None:
    """Launch marching, visibility, and compositing with its backward pass."""
    from threedrec.rendering.packed_triton import composite_packed, march_packed, visible_packed

    rays, grid, length = torch.rand(8, 3), OccupancyGrid(128, 1.0), 0.01
    march_packed(rays, rays, grid, length, skip=False)
    offsets = march_packed(rays, rays, grid, length)[2]
    density, distances = torch.rand(POINTS, 1, requires_grad=True), torch.rand(POINTS, 1)
    visible_packed(density[:, 0], distances[:, 0], offsets, length)
    vectors, indices = torch.rand(POINTS, 3), torch.arange(POINTS) * 8 // POINTS
    for normals in (None, vectors):
        weights, sums = composite_packed(density, length, distances, vectors, normals, indices, 8)
        (weights.sum() + sums.sum()).backward()


LAUNCHES: dict[str, Callable[[], object]] = {
    "tokens": partial(tokens, torch.bfloat16, *WIDTHS),
    "tokens-float16": partial(tokens, torch.float16, 320),
    "tokens-float32": partial(tokens, torch.float32, 320),
    "images": partial(images, torch.bfloat16, 8, *WIDTHS),
    "images-float16": partial(images, torch.float16, 8, 320),
    "images-float32": partial(images, torch.float32, 8, 320),
    "encoder": partial(images, torch.bfloat16, 256, 128, 512),
    "field": parts_of_field,
    "field-float32": partial(field, "float32", 1),  # with two layers it compiles for half a minute
    "field-float16": partial(field, "float16", 2, half=True),
    "rendering": rendering,
}


@pytest.fixture
def on_launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Let the product launch kernels on CPU tensors; say what each launch calls, with the kernel and its arguments."""
    from triton.runtime.jit import KernelInterface

    for module in (triton_support, backend):
        monkeypatch.setattr(module, "is_interpreted", lambda: True)

    def replace(function: Callable[..., object]) -> None:
        monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: partial(function, kernel))

    return replace


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.mark.parametrize(
    ("name", "capability"),
    # Where memory is short, only networks come near its end.
    [(name, number) for name in LAUNCHES for number in SHARED_MEMORY if number != 89 or name.startswith("field")],
)
def test_kernels_compile(name, capability, on_launch, monkeypatch, tmp_path):
    def compile_only(kernel, *arguments, **options):
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
        assert "cubin" in compiled.asm
        shared = compiled.metadata.shared
        assert shared <= SHARED_MEMORY[capability], f"{kernel} takes {shared} bytes of shared memory: {options}"

    from threedrec.field import mlp_triton

    ample = SHARED_MEMORY[capability] > 128 * 1024
    assert ample == ((capability // 10, capability % 10) in mlp_triton.AMPLE_MEMORY)
    monkeypatch.setattr(mlp_triton, "has_ample_memory", lambda device: ample)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # an empty one: nothing is taken from an earlier run
    monkeypatch.setattr("triton.runtime.jit.driver", SimpleNamespace(active=AbsentGPU(capability)))
    on_launch(compile_only)
    LAUNCHES[name]()


def test_no_kernel_is_forgotten(on_launch, repository):
    from triton.runtime.jit import JITFunction

    kernels, called, launched = set(), set(), set()
    for root in (repository / "nvsadapter_guidance", repository / "3drec" / "threedrec"):
        for path in root.rglob("*.py"):
            if "@triton.jit" in path.read_text(encoding="utf-8"):
                module = importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
                here = [part for part in vars(module).values() if isinstance(part, JITFunction)]
                kernels |= {full_name(part) for part in here}
                # What no other kernel calls is there to be launched.
                used = {name for part in here for name in part.fn.__code__.co_names}
                called |= {full_name(part) for part in here if part.__name__ in used}
    on_launch(lambda kernel, *arguments, **options: launched.add(full_name(kernel)))
    for launch in LAUNCHES.values():
        launch()
    assert launched and launched == kernels - called


def full_name(kernel: Any) -> str:
    return f"{kernel.__module__}.{kernel.__name__}"
