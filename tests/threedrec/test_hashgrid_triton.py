"""The Triton kernels against their PyTorch twins, in value and gradient.

On a GPU these are the compiled kernels; ``test_kernels_interpreted`` runs this file on the CPU.
"""

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig
from threedrec.field.encoding import build_encoding
from threedrec.field.hashgrid import Level, build_levels, encode_plain, jacobian_plain

REAL = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if REAL else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
if not REAL:
    pytestmark = []

COUNT = 2**16 + 5 if REAL else 37
LEVELS = tuple(build_levels(n_levels=2, base_resolution=3, per_level_scale=3.5, log2_hashmap_size=8))
ROWS = LEVELS[-1].start + LEVELS[-1].rows
# The interpreter computes in float64 as well as the twin; a GPU is asked for what training uses.
KIND = torch.float32 if REAL else torch.float64
CLOSE = {"rtol": 1e-4, "atol": 1e-4} if REAL else {"rtol": 1e-9, "atol": 1e-9}
"""Float32: cells are up to 10 to a side, features of size 1, slopes of size 10."""


def inside_cells(x: Tensor, levels: Sequence[Level] = LEVELS, distance: float = 1e-3) -> Tensor:
    """Draw every coordinate again that is closer to a cell border of a level than that part of a cell.

    A slope jumps at a border, where rounding moves a point into the next cell.
    """
    while True:
        near = torch.zeros_like(x, dtype=torch.bool)
        for level in levels:
            position = x.double() * level.scale + 0.5
            near |= (position - position.round()).abs() < distance
        if not near.any():
            return x
        x = torch.where(near, torch.rand_like(x), x)


def points(count: int = COUNT) -> Tensor:
    """Fresh points inside of cells, among them the corners of the box, and beyond them."""
    x = inside_cells(torch.rand(count, 3))
    special = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5], [1.2, -0.1, 0.5], [1.0, 0.25, 0.0]])
    x[: len(special)] = special[:count]
    return x.to(DEVICE, KIND)


def grid_of(table: Tensor, opened: int = len(LEVELS)):
    from threedrec.field.hashgrid_triton import Grid

    return Grid(LEVELS, opened, table.shape[1], table.detach())


def new_table(channels: int = 2) -> Tensor:
    return torch.randn(ROWS, channels, device=DEVICE, dtype=KIND).requires_grad_(True)


def assert_close(got: Tensor, want: Tensor) -> None:
    want = want.to(got)
    scale = float(want.detach().abs().max()) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=CLOSE["rtol"], atol=CLOSE["atol"] * max(scale, 1e-30))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with what is no number: whatever a kernel leaves out shows."""

    def spoilt(make):
        def wrapper(*args, **kwargs):
            fresh = make(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return wrapper

    monkeypatch.setattr(torch, "empty_like", spoilt(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", spoilt(Tensor.new_empty))


@pytest.fixture(params=[False, True], ids=["float-sums", "fixed-sums"])
def sums(request: pytest.FixtureRequest):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.parametrize("channels", [2, 4])
def test_features_and_slopes_have_the_values_and_gradients_of_the_definition(channels: int, sums, poison):
    from threedrec.field.hashgrid_triton import encode_linked

    x, table = points(), new_table(channels)
    exact_x, exact = x.double(), table.detach().double().requires_grad_(True)
    linked = encode_linked(x, table, grid_of(table))
    features = encode_plain(exact_x, exact, LEVELS)
    assert_close(linked.features, features)

    g = torch.randn_like(features).requires_grad_(True)
    short_g = g.detach().to(KIND).requires_grad_(True)
    pulled = linked.pull(short_g)
    want = torch.einsum("nc,ncd->nd", g, jacobian_plain(exact_x, exact, LEVELS))
    assert_close(pulled, want)

    v, w = torch.randn_like(want), torch.randn_like(features)
    loss = (pulled * v.to(KIND)).sum() + (linked.features * w.to(KIND)).sum()
    got = torch.autograd.grad(loss, (table, short_g))
    expected = torch.autograd.grad((want * v).sum() + (features * w).sum(), (exact, g))
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


def test_each_way_to_the_table_works_alone_and_again():
    from threedrec.field.hashgrid_triton import encode_linked

    x, table = points(), new_table()
    linked = encode_linked(x, table, grid_of(table))
    g = torch.randn(len(x), linked.grid.width, device=DEVICE, dtype=KIND, requires_grad=True)
    pulled = linked.pull(g)

    def grads(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, table, retain_graph=True)[0]

    values, slopes = grads(linked.features.sum()), grads(pulled.sum())
    # A pass that stops at g leaves nothing behind for the next one.
    torch.autograd.grad(pulled.sum(), g, retain_graph=True)
    assert_close(grads(linked.features.sum()), values)
    assert_close(grads(pulled.sum() + linked.features.sum()), values + slopes)
    assert values.abs().max() > 0 and slopes.abs().max() > 0


@pytest.mark.parametrize(("count", "group"), [(0, 1), (1, 2), (32, 4), (45, 1)])
def test_any_number_of_points_in_any_groups_of_levels(count: int, group: int, sums, monkeypatch, poison):
    from threedrec.field import hashgrid_triton

    small = {"BLOCK": 16, "GROUP": group, "RUN": 2, "num_warps": 1}
    for name in hashgrid_triton.LAUNCH:
        monkeypatch.setitem(hashgrid_triton.LAUNCH, name, {k: small[k] for k in hashgrid_triton.LAUNCH[name]})
    x, table = points(count), new_table()
    linked = hashgrid_triton.encode_linked(x, table, grid_of(table))
    pulled = linked.pull(linked.features)
    exact = table.detach().double().requires_grad_(True)
    features, slopes = (f(x.double(), exact, LEVELS) for f in (encode_plain, jacobian_plain))
    assert linked.features.shape == (count, 4) and pulled.shape == (count, 3)
    want = torch.einsum("nc,ncd->nd", features, slopes)
    assert_close(linked.features, features)
    assert_close(pulled, want)
    assert_close(*(torch.autograd.grad(u.square().sum(), t)[0] for u, t in ((pulled, table), (want, exact))))


def test_closed_levels_are_zero_and_untouched(sums, poison):
    from threedrec.field.hashgrid_triton import encode_linked

    x, table = points(), new_table()
    linked = encode_linked(x, table, grid_of(table, opened=1))
    assert_close(linked.features[:, :2], encode_plain(x, table, LEVELS[:1]))
    assert (linked.features[:, 2:] == 0).all()
    pulled = linked.pull(torch.ones_like(linked.features).requires_grad_(True))
    (grad,) = torch.autograd.grad(linked.features.sum() + pulled.square().sum(), table)
    assert (grad[LEVELS[1].start :] == 0).all() and (grad[: LEVELS[1].start] != 0).any() and grad.isfinite().all()


def test_layouts_of_inputs_do_not_matter():
    from threedrec.field.hashgrid_triton import encode_linked, encode_triton

    x, table = points(), new_table()
    wide = torch.full((len(x), 5), torch.nan, device=DEVICE, dtype=KIND)
    wide[:, 1:4] = x
    want = encode_triton(x, table, grid_of(table))
    assert torch.equal(encode_triton(wide[:, 1:4], table, grid_of(table)), want)
    linked = encode_linked(x.t().contiguous().t(), table, grid_of(table))
    g = torch.ones(1, 1, device=DEVICE, dtype=KIND).expand(want.shape).requires_grad_(True)
    expected = jacobian_plain(x, table, LEVELS).sum(1)
    assert_close(linked.pull(g), expected)
    assert_close(torch.autograd.grad(want.sum(), table)[0], torch.autograd.grad(linked.features.sum(), table)[0])


@pytest.mark.parametrize("run", [2, 3, 4])
@pytest.mark.parametrize("slopes", [True, False])
@pytest.mark.parametrize("count", [2, COUNT])
def test_points_along_rays_add_up_together_to_what_they_add_alone(
    run: int, slopes: bool, count: int, sums, monkeypatch
):
    from threedrec.field.hashgrid_triton import LAUNCH, scatter

    # Eight to a cell of the coarse level, and now and then the next ray, far away.
    along = torch.arange(count, device=DEVICE, dtype=KIND)[:, None] / 25.0
    x = (along * torch.tensor([1.0, 0.6, 0.3], device=DEVICE, dtype=KIND)) % 1.0
    grad, pull, tangent = (torch.randn(count, width, device=DEVICE, dtype=KIND) for width in (4, 4, 3))
    found = {}
    for length in (1, run):
        monkeypatch.setitem(LAUNCH["scatter"], "RUN", length)
        others = (pull, tangent) if slopes else (None, None)
        found[length] = scatter(x, grad, *others, grid_of(new_table()), (ROWS, 2))
    assert found[1].abs().max() > 0
    if sums:
        assert torch.equal(found[1], found[run])
    else:
        assert_close(found[run], found[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_fixed_sums_do_not_depend_on_the_order_of_points():
    from threedrec.field.hashgrid_triton import scatter

    x, order = points().float(), torch.randperm(COUNT, device=DEVICE)
    table = torch.zeros(ROWS, 2, device=DEVICE)
    # Sizes ten orders of magnitude apart: float32 sums differ from order to order.
    size = 10.0 ** torch.randint(-6, 5, (COUNT, 1), device=DEVICE)
    grad, pull, tangent = (torch.randn(COUNT, width, device=DEVICE) * size for width in (4, 4, 3))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = scatter(x, grad, pull, tangent, grid_of(table), table.shape)
        again = scatter(x[order], grad[order], pull[order], tangent[order], grid_of(table), table.shape)
        assert torch.equal(first, again) and first.abs().max() > 0
        one, tiny, zero = (scatter(x, grad * f, None, None, grid_of(table), table.shape) for f in (1.0, 2.0**-60, 0.0))
        torch.testing.assert_close(tiny * 2.0**60, one, rtol=1e-5, atol=1e-6 * float(one.abs().max()))
        assert (zero == 0).all()
        pull[3, 2] = torch.nan
        assert not scatter(x, grad, pull, tangent, grid_of(table), table.shape).isfinite().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not REAL, reason="too large for the interpreter")
def test_the_released_size_where_products_of_hashes_leave_32_bits():
    from threedrec.field.hashgrid_triton import Grid, encode_linked

    levels = tuple(build_levels(16, 16, 1.447269237440378, 19))
    table = torch.randn(levels[-1].start + levels[-1].rows, 2, device=DEVICE).requires_grad_(True)
    exact = table.detach().double().requires_grad_(True)
    x = inside_cells(torch.rand(COUNT, 3), levels).to(DEVICE)
    linked = encode_linked(x, table, Grid(levels, 16, 2, table.detach()))
    want = encode_plain(x.double(), exact, levels)
    # Float32 knows a position among 4096 cells to about 2e-4 of a cell.
    torch.testing.assert_close(linked.features, want.float(), rtol=0, atol=5e-3)
    pull = torch.randn_like(want)
    (got,) = torch.autograd.grad((linked.features * pull.float()).sum(), table)
    (expected,) = torch.autograd.grad((want * pull).sum(), exact)
    assert torch.linalg.vector_norm(got - expected) < 1e-3 * torch.linalg.vector_norm(expected)
    slope = torch.einsum("nc,ncd->nd", pull, jacobian_plain(x.double(), exact, levels))
    assert torch.linalg.vector_norm(linked.pull(pull.float()) - slope) < 1e-2 * torch.linalg.vector_norm(slope)


def encoding_config(**changes) -> EncodingConfig:
    sizes = {"n_levels": 2, "base_resolution": 3, "per_level_scale": 3.5, "log2_hashmap_size": 8}
    return EncodingConfig(**sizes | {"backend": "triton"} | changes)


def test_half_precision_reads_a_copy_that_follows_the_table():
    grid = build_encoding(encoding_config(half_precision=True)).to(DEVICE)
    torch.nn.init.normal_(grid.table)
    x = points().float()
    for _ in range(2):
        want = encode_plain(x, grid.table.half().float(), LEVELS)
        torch.testing.assert_close(grid(x), want, rtol=1e-4, atol=1e-4)
        (grad,) = torch.autograd.grad(grid(x).sum(), grid.table)
        assert grad.dtype == torch.float32
        with torch.no_grad():
            grid.table.mul_(-3.0)
    assert not [name for name in grid.state_dict() if name != "table"]


def volumes(network: dict | None = None, **changes) -> tuple[ImplicitVolume, ImplicitVolume]:
    """The same rough field on Triton and, in float64, on PyTorch."""
    fields = []
    for backend in ("triton", "torch"):
        config = ImplicitVolume.Config(
            normal_type="analytic",
            pos_encoding_config=encoding_config(backend=backend, **changes),
            mlp_network_config=MLPConfig(n_neurons=16, **{"backend": "torch"} | (network or {})),
        )
        fields.append(ImplicitVolume(config).to(DEVICE, KIND))
    for parameter in fields[0].parameters():
        torch.nn.init.normal_(parameter)
    fields[1].load_state_dict(fields[0].state_dict())
    return fields[0], fields[1].double()


@pytest.mark.parametrize(
    "changes",
    [{}, {"include_xyz": True}, {"otype": "ProgressiveBandHashGrid", "start_level": 1}],
    ids=["plain", "coordinates", "progressive"],
)
def test_a_field_with_normals_trains_as_its_twin_does(changes: dict, poison):
    field, twin = volumes(**changes)
    x = 2.0 * points() - 1.0
    with torch.no_grad():
        # A normal jumps where a hidden neuron turns on, too.
        hidden = twin.density_network.layers[0](twin.encoding(twin._unit(x.double())))
        x = x[hidden.abs().amin(1) > 1e-3]
    assert len(x) > COUNT // 2
    got, want = field(x, normals=True), twin(x.double(), normals=True)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)
    # Without the direction of normals in flat places, whose derivative has no bound.
    pulls = [torch.randn_like(part) for part in want]
    steep = torch.linalg.vector_norm(x, dim=1)[:, None] > 0.05
    losses = [sum((p * q.to(p) * steep).sum() for p, q in zip(o, pulls, strict=True)) for o in (got, want)]
    grads = torch.autograd.grad(losses[0], list(field.parameters()))
    for one, other in zip(grads, torch.autograd.grad(losses[1], list(twin.parameters())), strict=True):
        error = torch.linalg.vector_norm(one.double() - other) / torch.linalg.vector_norm(other)
        assert error < (2e-2 if REAL else 1e-8)
    assert_close(field.normal(x), got.normal)


@pytest.mark.parametrize("bias", ["blob_magic3d", "blob_dreamfusion", 2.0])
@pytest.mark.parametrize("count", [0, COUNT])
def test_a_normal_in_one_kernel_is_the_definition_and_trains_like_it(bias: float | str, count: int, poison):
    from threedrec.field.normal_kernel import normal_triton

    volume = ImplicitVolume(ImplicitVolume.Config(density_bias=bias)).to(DEVICE)
    x, pulled = (points(count) - 0.3).double(), torch.randn(count, 3, device=DEVICE, dtype=torch.float64)
    pulled.requires_grad_(True)
    short = pulled.detach().to(KIND).requires_grad_(True)
    got = normal_triton(short, x.to(KIND), 0.5, bias, 10.0, 0.5)
    want = torch.nn.functional.normalize(-(pulled / 2.0 + volume._bias_gradient(x)), dim=-1)
    assert_close(got, want)
    pull = torch.randn_like(want)
    got_grad, want_grad = torch.autograd.grad(got, short, pull.to(KIND)), torch.autograd.grad(want, pulled, pull)
    error = torch.linalg.vector_norm(got_grad[0].double() - want_grad[0])
    assert error <= (1e-4 if REAL else 1e-12) * torch.linalg.vector_norm(want_grad[0])


@pytest.mark.parametrize("bias", ["blob_magic3d", "blob_dreamfusion", 2.0])
@pytest.mark.parametrize("count", [0, COUNT])
def test_a_density_in_one_kernel_is_the_definition_and_trains_like_it(bias: float | str, count: int, poison):
    from threedrec.field.density_kernel import density_triton

    volume = ImplicitVolume(ImplicitVolume.Config(density_bias=bias)).to(DEVICE)
    x = 2.0 * points(count).double() - 1.0
    raw = (30.0 * torch.randn(count, 1, device=DEVICE, dtype=torch.float64)).requires_grad_(True)
    short = raw.detach().to(KIND).requires_grad_(True)
    got = density_triton(short, x.to(KIND), 1.0, bias, 10.0, 0.5)
    want = torch.nn.functional.softplus(raw + volume._bias(x)) * volume._inside(x)
    assert count == 0 or (0 < int((want == 0).sum()) < count and float(want.detach().min()) == 0.0)
    # Also the smallest: relative to each, but for what float32 rounds of the sum with the bias.
    torch.testing.assert_close(got.double(), want, rtol=1e-4 if REAL else 1e-9, atol=1e-37)
    pull = torch.randn_like(want)
    got_grad, want_grad = torch.autograd.grad(got, short, pull.to(KIND)), torch.autograd.grad(want, raw, pull)
    torch.testing.assert_close(got_grad[0].double(), want_grad[0], rtol=1e-4 if REAL else 1e-9, atol=1e-30)
    lost = torch.full_like(short[:1], torch.nan)
    assert density_triton(lost, x[:1].to(KIND), 1.0, bias, 10.0, 0.5).isnan().all()


@pytest.mark.parametrize("sums", [True], ids=["fixed-sums"], indirect=True)
def test_a_field_repeats_itself_under_deterministic_algorithms(sums):
    field, _ = volumes(network={"backend": "triton"}, n_features_per_level=8)
    field, x = field.float(), (2.0 * points() - 1.0).float()

    def gradients() -> list[Tensor]:
        density, features, normal = field(x, normals=True)
        return list(torch.autograd.grad(density.sum() + features.sum() + normal[:, 0].sum(), list(field.parameters())))

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kept", [0, 1, 10**9], ids=["nothing", "one part", "everything"])
@pytest.mark.parametrize("sums", [True], ids=["fixed-sums"], indirect=True)
def test_lookups_that_are_kept_change_nothing(kept: int, sums, poison, monkeypatch):
    from threedrec.field import hashgrid_triton
    from threedrec.rendering.recompute import in_parts

    field, _ = volumes()
    x, looked = 2.0 * points() - 1.0, []
    pulls = [torch.randn(len(x), width, device=DEVICE, dtype=KIND) for width in (1, 3, 3)]
    names = list(field.parameters())

    def gradients(size: int) -> list[Tensor]:
        out = in_parts(lambda part: tuple(field(part, normals=True)), x, size, names, kept)
        return list(torch.autograd.grad(sum((o * p).sum() for o, p in zip(out, pulls, strict=True)), names))

    expected = gradients(len(x))
    real = hashgrid_triton._look_up
    monkeypatch.setattr(hashgrid_triton, "_look_up", lambda *args: looked.append(1) or real(*args))
    found = gradients(-(-len(x) // 4))
    assert len(looked) == {0: 8, 1: 7, 10**9: 4}[kept]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("count", [0, 1, COUNT])
def test_the_greatest_push_of_a_point(count: int, poison):
    from threedrec.field.hashgrid_triton import _largest

    grad, pull = (torch.randn(count, 24, device=DEVICE, dtype=KIND) for _ in range(2))
    x, tangent = points(count), torch.randn(count, 3, device=DEVICE, dtype=KIND)
    rows = pull.abs().amax(1) * tangent.abs().sum(1) if count else pull.new_zeros(1)
    want = [grad.abs().max() if count else grad.new_zeros(()), rows.max()]
    for flags in ((True, True), (True, False), (False, True)):
        parts = grad if flags[0] else None, *((pull, tangent) if flags[1] else (None, None))
        expected = torch.stack([value * flag for value, flag in zip(want, flags, strict=True)])
        assert_close(_largest(x, *parts, 24), expected)
    for broken in (float("nan"), float("inf")) if count else ():
        for at, tensor in ((0, grad), (1, pull), (1, tangent)):
            changed = tensor.clone()
            changed[-1, 1] = broken
            parts = [changed if part is tensor else part for part in (grad, pull, tangent)]
            assert not _largest(x, *parts, 24)[at].isfinite()


def test_densities_without_gradients_are_those_with(poison):
    field, twin = volumes()
    x = 2.0 * points() - 1.0
    with torch.no_grad():
        assert_close(field.density(x), twin.density(x.double()))
        assert field.density(x[:0]).shape == (0, 1)
    assert field.density(x).requires_grad


def test_where_points_want_gradients_pytorch_does_the_lookup():
    grid = build_encoding(encoding_config()).to(DEVICE)
    x = points().float().requires_grad_(True)
    (slope,) = torch.autograd.grad(grid(x).sum(), x)
    assert slope.shape == x.shape and slope.abs().max() > 0


def test_channels_that_the_kernels_do_not_know():
    from threedrec.errors import InputError

    x = points().float()
    with pytest.raises(InputError, match="n_features_per_level is 3"):
        build_encoding(encoding_config(n_features_per_level=3)).to(DEVICE)(x)
    assert build_encoding(encoding_config(n_features_per_level=3, backend="auto")).to(DEVICE)(x).shape == (COUNT, 6)
