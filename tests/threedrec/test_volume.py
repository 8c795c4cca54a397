"""The implicit volume: initial blobs, normals of every kind, the box, activations."""

import pytest
import torch
from torch.nn import functional

from threedrec.errors import InputError
from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig
from threedrec.field.activations import activation, trunc_exp

SMALL = EncodingConfig(n_levels=3, base_resolution=4, per_level_scale=1.8, log2_hashmap_size=9)


def volume(**changes) -> ImplicitVolume:
    torch.manual_seed(0)
    config = {"pos_encoding_config": SMALL, "mlp_network_config": MLPConfig(n_neurons=8), **changes}
    return ImplicitVolume(ImplicitVolume.Config(**config))


def inner_points(count: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.6


def roughen(field: ImplicitVolume, scale: float = 1.0) -> ImplicitVolume:
    with torch.no_grad():
        field.encoding.table.normal_(0, scale, generator=torch.Generator().manual_seed(2))
    return field


def test_initial_densities_are_the_blobs():
    points = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.0, 0.0], [0.0, 0.5, 0.0]])
    cone = volume(density_bias="blob_magic3d").density(points)[:, 0]
    torch.testing.assert_close(cone, functional.softplus(torch.tensor([10.0, 5.0, 0.0])), atol=1e-3, rtol=0)
    gauss = volume(density_bias="blob_dreamfusion", density_blob_scale=5.0, density_blob_std=0.25)
    expected = functional.softplus(5.0 * torch.exp(torch.tensor([0.0, -0.5, -2.0])))
    torch.testing.assert_close(gauss.density(points)[:, 0], expected, atol=1e-3, rtol=0)
    flat = volume(density_bias=-1.0, density_activation="exp").density(points)[:, 0]
    torch.testing.assert_close(flat, torch.full((3,), -1.0).exp(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("normal_type", ["analytic", "finite_difference", "finite_difference_laplacian"])
@pytest.mark.parametrize("bias", ["blob_magic3d", "blob_dreamfusion"])
def test_normals_of_a_ball_point_outwards(normal_type: str, bias: str):
    field = volume(normal_type=normal_type, density_bias=bias, finite_difference_normal_eps=1e-3)
    points = inner_points()
    normal = field(points, normals=True).normal
    cosine = functional.cosine_similarity(normal, points, dim=-1)
    # Forward differences of a curved field lean by about eps / |x|.
    assert cosine.min() > (0.999 if normal_type == "analytic" else 0.97)


def test_analytic_normals_are_the_autograd_gradient_of_the_density():
    field = roughen(volume(normal_type="analytic")).double()
    points = inner_points().double().requires_grad_(True)
    density = field.density(points)
    expected = functional.normalize(-torch.autograd.grad(density.sum(), points)[0], dim=-1)
    output = field(points.detach(), normals=True)
    torch.testing.assert_close(output.normal, expected)
    torch.testing.assert_close(output.density, density)
    torch.testing.assert_close(field.normal(points.detach()), expected)


def test_normals_pass_correct_gradients_to_the_parameters():
    field = roughen(volume(normal_type="analytic")).double()
    points = inner_points(8).double()
    pull = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    loss = (field(points, normals=True).normal * pull).sum()
    parameters = [field.encoding.table, field.density_network.layers[0].weight]
    gradients = torch.autograd.grad(loss, parameters)
    generator, step = torch.Generator().manual_seed(4), 1e-6
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append((field(points, normals=True).normal * pull).sum())
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normal_type", ["analytic", "finite_difference", "finite_difference_laplacian", "pred"])
def test_values_do_not_depend_on_gradient_mode(normal_type: str):
    field = roughen(volume(normal_type=normal_type))
    points = inner_points()
    with_gradient = field(points, normals=True)
    with torch.no_grad():
        without = field(points, normals=True)
    for one, other in zip(with_gradient, without, strict=True):
        torch.testing.assert_close(one, other)
        assert not other.requires_grad
    torch.testing.assert_close(with_gradient.density, field(points).density)
    torch.testing.assert_close(with_gradient.features, field.features(points))


def test_nothing_lies_outside_the_box():
    field = volume(radius=0.5, density_bias=3.0)
    points = torch.tensor([[0.49, 0.0, 0.0], [0.51, 0.0, 0.0], [0.0, 0.0, -7.0]])
    density = field.density(points)[:, 0]
    assert density[0] > 1 and density[1] == 0 and density[2] == 0


def test_truncated_exponential_bounds_its_gradient_only():
    x = torch.tensor([1.0, 20.0], requires_grad=True)
    y = trunc_exp(x)
    torch.testing.assert_close(y, x.exp())
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 15.0]).exp())


@pytest.mark.parametrize("name", ["Softplus", "trunc_exp", "EXP", None, "sigmoid", "shifted_softplus", "lin2srgb"])
def test_activation_names_ignore_case(name: str | None):
    assert activation(name)(torch.zeros(2)).shape == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal_type": "guess"}, "normal_type"),
        ({"density_bias": "blob"}, "density_bias"),
        ({"density_activation": "soft"}, "density_activation"),
        ({"mlp_network_config": MLPConfig(otype="FullyFusedMLP")}, "FullyFusedMLP"),
        ({"radius": 0.0}, "above zero"),
        ({"n_feature_dims": 1}, "n_feature_dims"),
    ],
)
def test_impossible_fields_name_their_key(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        volume(**change)
