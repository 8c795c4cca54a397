"""The hash encoding against its definition, finite differences and hand-computed tables; the other encodings too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from threedrec.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from threedrec.errors import InputError
from threedrec.field import backend, hashgrid_batched
from threedrec.field.encoding import EncodingConfig, build_encoding
from threedrec.field.hashgrid import (
    PRIMES,
    Level,
    build_levels,
    corner_rows,
    encode,
    encode_plain,
    encode_with_jacobian,
    jacobian_plain,
)
from threedrec.field.hashgrid_batched import FixedPointSums, encode_batched, encode_batched_with_jacobian

LEVELS = build_levels(n_levels=4, base_resolution=3, per_level_scale=1.7, log2_hashmap_size=7)


def table(channels: int = 2) -> Tensor:
    rows = LEVELS[-1].start + LEVELS[-1].rows
    return torch.randn(rows, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def points(count: int = 30) -> Tensor:
    return torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_levels_follow_the_released_numbers():
    levels = build_levels(16, 16, 1.447269237440378, 19)
    assert [level.resolution for level in levels[:3]] == [16, 24, 34]
    assert levels[0].rows == 4096 and not levels[0].hashed
    assert levels[-1].resolution == 4096 and levels[-1].rows == 2**19 and levels[-1].hashed
    assert [level.hashed for level in levels].index(True) == 5
    assert all(level.rows % 8 == 0 for level in levels)
    assert levels[-1].start == sum(level.rows for level in levels[:-1])


def test_rows_of_dense_and_hashed_levels_by_hand():
    dense = Level(scale=3.0, resolution=4, rows=64, start=0, hashed=False)
    cell = torch.tensor([[1], [2], [0]], dtype=torch.int32)
    assert corner_rows(cell, dense)[:, 0].tolist() == [9, 10, 13, 14, 25, 26, 29, 30]
    hashed = Level(scale=99.0, resolution=100, rows=2**10, start=0, hashed=True)
    cell = torch.tensor([[41], [77], [63]], dtype=torch.int32)
    expected = [
        ((41 + (k & 1)) * PRIMES[0] ^ (77 + (k >> 1 & 1)) * PRIMES[1] ^ (63 + (k >> 2)) * PRIMES[2]) % 2**10
        for k in range(8)
    ]
    assert corner_rows(cell, hashed)[:, 0].tolist() == expected


def test_grid_points_return_their_row_and_middles_the_mean():
    levels = build_levels(1, 5, 2.0, 10)
    rows = torch.arange(125, dtype=torch.float64)[:, None].expand(-1, 2).contiguous()
    # Scale 4, offset one half: x = 0.375 lies on cell 2, x = 0.5 halfway between cells 2 and 3.
    at = torch.tensor([[0.375, 0.125, 0.125], [0.5, 0.125, 0.125]], dtype=torch.float64)
    values = encode(at, torch.cat([rows, torch.zeros(3, 2, dtype=torch.float64)]), levels)
    torch.testing.assert_close(values[:, 0], torch.tensor([2.0 + 5 + 25, 2.5 + 5 + 25], dtype=torch.float64))


def test_fast_lookup_equals_the_definition_in_value_and_gradient():
    x, rows = points().requires_grad_(True), table().requires_grad_(True)
    features, slopes = encode_with_jacobian(x, rows, LEVELS)
    expected, expected_slopes = encode_plain(x, rows, LEVELS), jacobian_plain(x, rows, LEVELS)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(slopes, expected_slopes)
    torch.testing.assert_close(encode(x, rows, LEVELS), expected)

    generator = torch.Generator().manual_seed(2)
    pull = torch.randn(features.shape, dtype=torch.float64, generator=generator)
    pull_slopes = torch.randn(slopes.shape, dtype=torch.float64, generator=generator)
    got = torch.autograd.grad((features * pull).sum() + (slopes * pull_slopes).sum(), (x, rows))
    want = torch.autograd.grad((expected * pull).sum() + (expected_slopes * pull_slopes).sum(), (x, rows))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_lookup_of_all_levels_at_once_equals_the_definition_in_value_and_gradient():
    x, rows = points(), table().requires_grad_(True)
    # Beyond the ends, where points are clamped and corners wrap round, too.
    x = torch.cat([x, torch.tensor([[0.0, 1.0, 1.2], [-0.3, 0.5, 1.0]], dtype=torch.float64)])
    features, slopes = encode_batched_with_jacobian(x, rows, LEVELS)
    expected, expected_slopes = encode_plain(x, rows, LEVELS), jacobian_plain(x, rows, LEVELS)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(slopes, expected_slopes)
    torch.testing.assert_close(encode_batched(x, rows, LEVELS), expected)

    pull, pull_slopes = torch.randn_like(features), torch.randn_like(slopes)
    (got,) = torch.autograd.grad((features * pull).sum() + (slopes * pull_slopes).sum(), rows)
    (want,) = torch.autograd.grad((expected * pull).sum() + (expected_slopes * pull_slopes).sum(), rows)
    torch.testing.assert_close(got, want)
    (got,) = torch.autograd.grad((encode_batched(x, rows, LEVELS) * pull).sum(), rows)
    (want,) = torch.autograd.grad((encode_plain(x, rows, LEVELS) * pull).sum(), rows)
    torch.testing.assert_close(got, want)


def test_points_in_several_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch):
    x, rows = points(), table().requires_grad_(True)

    def both() -> list[Tensor]:
        features, slopes = encode_batched_with_jacobian(x, rows, LEVELS)
        return [features, slopes, torch.autograd.grad(features.sum() + (slopes**2).sum(), rows)[0]]

    whole = both()
    monkeypatch.setattr(hashgrid_batched, "MOST_CORNERS", 8 * len(LEVELS) * 7)
    for one, other in zip(both(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_points_have_no_features_and_no_gradient():
    rows = table().requires_grad_(True)
    features, slopes = encode_batched_with_jacobian(points()[:0], rows, LEVELS)
    assert features.shape == (0, 8) and slopes.shape == (0, 8, 3)
    (grad,) = torch.autograd.grad(features.sum() + slopes.sum(), rows)
    assert torch.equal(grad, torch.zeros_like(rows))


def row_sums(values: Tensor, rows: Tensor, count: int) -> Tensor:
    sums = FixedPointSums((count, values.shape[1]), values.abs().amax(), len(values), values.device)
    sums.add(values, rows)
    return sums.values(values.dtype)


def test_sums_of_rows_do_not_depend_on_the_order_of_addition():
    generator = torch.Generator().manual_seed(3)
    # Sizes ten orders of magnitude apart: float32 sums differ from order to order.
    values = torch.randn(4096, 2, generator=generator) * 10 ** torch.randint(-6, 5, (4096, 1), generator=generator)
    rows = torch.randint(7, (4096,), generator=generator)
    order = torch.randperm(4096, generator=generator)
    first = row_sums(values, rows, 9)
    assert torch.equal(first, row_sums(values[order], rows[order], 9))
    exact = torch.zeros(9, 2, dtype=torch.float64).index_add_(0, rows, values.double())
    torch.testing.assert_close(first, exact.float())
    assert torch.equal(first[7:], torch.zeros(2, 2)) and torch.equal(row_sums(values * 0, rows, 9), first * 0)


def test_gradients_that_are_no_numbers_are_not_hidden_by_fixed_point():
    for bad in (float("nan"), float("inf")):
        assert not row_sums(torch.tensor([[1.0], [bad]]), torch.tensor([0, 1]), 2).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_grid_on_a_gpu_equals_the_one_on_the_cpu_and_repeats_itself():
    config = EncodingConfig(otype="HashGrid", n_levels=6, base_resolution=8, log2_hashmap_size=12)
    torch.manual_seed(0)
    grid = build_encoding(config)
    x = torch.rand(5000, 3)
    on_cpu = grid.with_jacobian(x)
    pull = [torch.randn_like(part) for part in on_cpu]
    (want,) = torch.autograd.grad(sum((p * q).sum() for p, q in zip(on_cpu, pull, strict=True)), grid.table)
    grid.cuda()

    def on_gpu() -> list[Tensor]:
        parts = grid.with_jacobian(x.cuda())
        loss = sum((p * q.cuda()).sum() for p, q in zip(parts, pull, strict=True))
        return [*parts, torch.autograd.grad(loss, grid.table)[0]]

    results = on_gpu()
    for one, other in zip(results, [*on_cpu, want], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
    assert torch.equal(results[2], on_gpu()[2])


def test_gradients_match_finite_differences():
    levels = build_levels(n_levels=2, base_resolution=2, per_level_scale=2.0, log2_hashmap_size=4)
    x, rows = points(3).requires_grad_(True), table()[:24].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda p, t: encode(p, t, levels), (x, rows))
    assert torch.autograd.gradcheck(lambda p, t: encode_with_jacobian(p, t, levels), (x, rows))


def test_jacobian_is_the_derivative_of_the_definition():
    x, rows = points(5), table()
    by_autograd = torch.autograd.functional.jacobian(lambda p: encode_plain(p, rows, LEVELS).sum(0), x)
    torch.testing.assert_close(jacobian_plain(x, rows, LEVELS), by_autograd.permute(1, 0, 2))


def test_features_are_continuous_everywhere():
    # A fine walk across the whole box, through cell borders of all levels and along both ends.
    start, end = torch.tensor([-0.05, 0.1, 0.0]), torch.tensor([1.05, 0.83, 1.0])
    walk = torch.lerp(start, end, torch.linspace(0, 1, 20001)[:, None]).double()
    jumps = (encode(walk[1:], table(), LEVELS) - encode(walk[:-1], table(), LEVELS)).abs().max()
    assert jumps < 5e-3, "steps of 6e-5 at a resolution of at most 15 must move features by about 1e-3"


def test_progressive_levels_open_in_time_and_stay_dark_before():
    config = EncodingConfig(
        otype="ProgressiveBandHashGrid",
        n_levels=4,
        base_resolution=3,
        per_level_scale=1.7,
        log2_hashmap_size=7,
        start_level=2,
        start_step=100,
        update_steps=50,
    )
    encoding = build_encoding(config)
    x = points().float()
    for step, levels in ((0, 2), (149, 2), (150, 3), (200, 4), (9999, 4)):
        encoding.update(step)
        features, slopes = encoding.with_jacobian(x)
        assert features.shape == (30, 8) and slopes.shape == (30, 8, 3)
        assert (features[:, 2 * levels :] == 0).all() and (slopes[:, 2 * levels :] == 0).all()
        assert (features[:, 2 * levels - 1] != 0).any()


@pytest.mark.parametrize("otype", ["HashGrid", "Frequency", "ProgressiveBandFrequency"])
@pytest.mark.parametrize("include_xyz", [False, True])
def test_every_encoding_knows_its_derivative(otype: str, include_xyz: bool):
    config = EncodingConfig(otype=otype, n_levels=2, base_resolution=3, n_frequencies=2, include_xyz=include_xyz)
    encoding = build_encoding(config).double()
    x = points(5)
    features, slopes = encoding.with_jacobian(x)
    assert features.shape == (5, encoding.n_output_dims)
    torch.testing.assert_close(features, encoding(x))
    step = 1e-6
    for axis in range(3):
        ahead = x.clone()
        ahead[:, axis] += step
        torch.testing.assert_close((encoding(ahead) - features) / step, slopes[..., axis], atol=1e-3, rtol=1e-3)


def test_frequency_window_opens_band_by_band():
    encoding = build_encoding(EncodingConfig(otype="ProgressiveBandFrequency", n_frequencies=2, n_masking_step=100))
    assert encoding(points(3).float()).abs().max() == 0
    encoding.update(50)
    values = encoding(torch.full((1, 3), 0.4)).view(2, 2, 3)
    torch.testing.assert_close(values[0, 0], torch.full((3,), 0.4).sin())
    assert values[1].abs().max() == 0


@pytest.mark.parametrize("jacobian", [False, True])
def test_closed_levels_have_no_gradient(jacobian: bool, monkeypatch: pytest.MonkeyPatch):
    # Fresh memory is often zero by chance; here it never is.
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, 1e9))
    x, rows = points(), table().requires_grad_(True)
    open_levels = LEVELS[:2]
    outputs = encode_with_jacobian(x, rows, open_levels) if jacobian else (encode(x, rows, open_levels),)
    (gradient,) = torch.autograd.grad(sum(output.sum() for output in outputs), rows)
    assert (gradient[LEVELS[2].start :] == 0).all()
    assert (gradient[: LEVELS[2].start] != 0).any()


@pytest.mark.parametrize("include_xyz", [False, True])
@pytest.mark.parametrize("otype", ["HashGrid", "ProgressiveBandHashGrid", "Frequency", "ProgressiveBandFrequency"])
def test_a_saved_encoding_opens_as_far_as_it_was(otype: str, include_xyz: bool, tmp_path: Path):
    config = EncodingConfig(
        otype=otype,
        include_xyz=include_xyz,
        n_levels=6,
        log2_hashmap_size=8,
        start_level=2,
        update_steps=10,
        n_masking_step=60,
    )
    written, read = build_encoding(config), build_encoding(config)
    written.update(25)
    save_checkpoint(tmp_path / "a.ckpt", Checkpoint("fine", 25, model=written.state_dict()))
    load_model(read, load_checkpoint(tmp_path / "a.ckpt"), "a.ckpt")
    x = points().float()
    assert torch.equal(read(x), written(x))


def test_spherical_harmonics_are_orthonormal():
    encoding = build_encoding(EncodingConfig(otype="SphericalHarmonics", degree=4))
    directions = torch.nn.functional.normalize(
        torch.randn(200000, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    values = encoding(0.5 * directions + 0.5)
    gram = 4 * torch.pi * values.T @ values / len(values)
    torch.testing.assert_close(gram, torch.eye(16), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncodingConfig(otype="HashGridd"), "unknown encoding 'HashGridd'"),
        (EncodingConfig(n_levels=0), "n_levels"),
        (EncodingConfig(otype="SphericalHarmonics", degree=9), "degree"),
        (EncodingConfig(backend="tritn"), "backend: unknown backend 'tritn'; use one of auto, triton, torch"),
        (EncodingConfig(backend="torch", half_precision=True), "half_precision: needs the Triton backend"),
    ],
)
def test_impossible_encodings_are_refused(config: EncodingConfig, message: str):
    with pytest.raises(InputError, match=message):
        build_encoding(config)


def test_triton_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="geometry.encoding.backend: triton does not work here: the device is no CUDA"):
        build_encoding(EncodingConfig(n_levels=2, backend="triton"), "geometry.encoding")(points().float())


def test_auto_says_once_why_it_cannot_take_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(backend, "is_installed", lambda: False)
    backend._say.cache_clear()
    for _ in range(2):
        assert not backend.use_triton("auto", torch.device("cuda"), None, "grid")
    assert not backend.use_triton("auto", torch.device("cpu"), None, "grid")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "grid: plain PyTorch" in record.message
    assert "Triton is not installed" in record.message
    backend._say.cache_clear()


@pytest.mark.parametrize("include_xyz", [False, True])
@pytest.mark.parametrize("otype", ["HashGrid", "Frequency"])
def test_pull_is_the_transposed_jacobian(otype: str, include_xyz: bool):
    config = EncodingConfig(otype=otype, n_levels=2, base_resolution=3, n_frequencies=2, include_xyz=include_xyz)
    encoding = build_encoding(config).double()
    x = points(5)
    features, slopes = encoding.with_jacobian(x)
    same, pull = encoding.with_pull(x)
    g = torch.randn_like(features)
    torch.testing.assert_close(same, features)
    torch.testing.assert_close(pull(g), (g[..., None] * slopes).sum(1))


def test_the_field_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from threedrec.field import EncodingConfig, ImplicitVolume
config = ImplicitVolume.Config(pos_encoding_config=EncodingConfig(n_levels=2), normal_type="analytic")
ImplicitVolume(config)(torch.zeros(1, 3), normals=True).normal.sum().backward()
"""
    paths = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": paths})
