"""The whole renderer: silhouettes and depths of a ball, chunks, skipping, seeds, gradients."""

import pytest
import torch

from threedrec.cameras import orbit_cameras
from threedrec.errors import InputError
from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig, SolidBackground
from threedrec.rendering import DiffusePointLight, VolumeRenderer

RADIUS = 0.4


def build(renderer: dict | None = None, **geometry) -> VolumeRenderer:
    """A ball of radius 0.4 with a steep surface: Magic3D's cone, made sharp."""
    torch.manual_seed(0)
    encoding = EncodingConfig(n_levels=2, base_resolution=4, log2_hashmap_size=8, per_level_scale=2.0)
    field = ImplicitVolume.Config(
        pos_encoding_config=encoding,
        mlp_network_config=MLPConfig(n_neurons=8),
        normal_type="analytic",
        density_blob_scale=2000.0,
        density_blob_std=RADIUS,
        **geometry,
    )
    config = VolumeRenderer.Config(**{"num_samples_per_ray": 256, "occupancy_resolution": 24, **(renderer or {})})
    material = DiffusePointLight(DiffusePointLight.Config())
    model = VolumeRenderer(config, ImplicitVolume(field), material, SolidBackground(SolidBackground.Config()))
    model.update(0, torch.Generator().manual_seed(0))
    return model


def flat_rays(size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(rays.reshape(-1, 3) for rays in orbit_cameras(20.0, 30.0, 1.5, 49.1, size, size).rays())  # type: ignore[return-value]


def true_ball(rays_o: torch.Tensor, rays_d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the closest approach to the origin and the distance to the surface (nan where missed)."""
    middle = -(rays_o * rays_d).sum(-1)
    approach = (rays_o + middle[:, None] * rays_d).norm(dim=-1)
    return approach, middle - (RADIUS**2 - approach**2).sqrt()


def test_an_opaque_ball_has_the_right_silhouette_depth_normals_and_background():
    model = build().eval()
    rays_o, rays_d = flat_rays()
    with torch.no_grad():
        output = model(rays_o, rays_d, normals=True)
    approach, distance = true_ball(rays_o, rays_d)
    inside, outside = approach < RADIUS - 0.03, approach > RADIUS + 0.02
    assert output.opacity[inside].min() > 0.999
    assert output.opacity[outside].max() < 1e-3
    # The density rises by 5000 per unit behind the surface, so light travels about sqrt(2 / 5000) = 0.02 into it.
    assert (output.depth[inside, 0] - distance[inside]).abs().max() < 0.035
    surface = rays_o + distance[:, None] * rays_d
    cosine = torch.nn.functional.cosine_similarity(output.normal[inside], surface[inside], dim=-1)
    assert cosine.min() > 0.98
    torch.testing.assert_close(output.rgb[outside], torch.ones(int(outside.sum()), 3), atol=1e-3, rtol=0)
    assert (output.normal[output.opacity[:, 0] == 0] == 0).all()


def test_background_shows_through_what_is_not_opaque():
    model = build().eval()
    rays_o, rays_d = flat_rays()
    with torch.no_grad():
        white = model(rays_o, rays_d)
        black = model(rays_o, rays_d, bg_color=torch.zeros_like(rays_o))
    torch.testing.assert_close(white.rgb - black.rgb, (1 - white.opacity).expand(-1, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(black.background, torch.zeros_like(rays_o))


def test_chunks_do_not_change_the_picture():
    model = build({"eval_chunk_size": 500})
    cameras = orbit_cameras([0.0, 30.0], [0.0, 120.0], 1.5, 49.1, 12, 10)
    whole, parts = model.render_image(cameras, chunk_rays=10**6), model.render_image(cameras, chunk_rays=7)
    assert set(whole) == {"rgb", "opacity", "depth", "normal"}
    for name, image in whole.items():
        assert image.shape[:3] == (2, 12, 10)
        torch.testing.assert_close(image, parts[name], atol=1e-5, rtol=0)
    assert model.training, "rendering a picture leaves the mode as it was"


def test_a_second_look_finds_what_is_thinner_than_a_step():
    looks = {}
    for name, samples, second in (("once", 22, 0), ("twice", 22, 480), ("fine", 480, 0)):
        model = build({"num_samples_per_ray": samples, "eval_num_samples_per_ray": second, "grid_prune": False})
        model.geometry.config.density_blob_std = 0.03  # of a step of 0.16
        looks[name] = model.render_image(orbit_cameras(20.0, 30.0, 1.5, 20.0, 48, 48))["opacity"]
    expected = torch.where(looks["once"] < 0.99, looks["fine"], looks["once"])
    torch.testing.assert_close(looks["twice"], expected, atol=1e-4, rtol=0)
    assert looks["fine"].sum() > 20 and (looks["once"] - looks["fine"]).abs().max() > 0.5


def test_what_is_opaque_at_first_sight_is_not_looked_at_again(monkeypatch):
    model = build({"num_samples_per_ray": 64, "eval_num_samples_per_ray": 256})
    cameras, looks = orbit_cameras(20.0, 30.0, 1.5, 49.1, 24, 24), []
    sample = model.sample
    monkeypatch.setattr(model, "sample", lambda *args: looks.append((len(args[0]), args[3])) or sample(*args))
    opacity = model.render_image(cameras)["opacity"]
    (every, first), (some, second) = looks
    assert every == 24 * 24 and first is None and second == pytest.approx(model.step_size / 4)
    assert some < every - int((opacity > 0.999).sum()) / 2
    model.train()
    looks.clear()
    model(*flat_rays())
    assert [step for _, step in looks] == [None]


def test_skipping_empty_space_does_not_change_the_picture():
    cameras = orbit_cameras(10.0, 40.0, 1.5, 49.1, 16, 16)
    # relu makes the outside exactly empty, and without a threshold the grid keeps all that is not.
    options = {"prune_alpha_threshold": False, "occupancy_threshold": 0.0}
    model = build(options, density_activation="relu")
    model.refresh(torch.Generator().manual_seed(0))
    skipped = model.render_image(cameras)
    everything = build({**options, "grid_prune": False}, density_activation="relu").render_image(cameras)
    for name, image in skipped.items():
        torch.testing.assert_close(image, everything[name], atol=1e-5, rtol=0)


def test_training_renders_are_seeded_and_jittered():
    model = build()
    rays_o, rays_d = flat_rays(8)
    first, again, other = (model(rays_o, rays_d, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.depth, again.depth)
    assert not torch.equal(first.samples.distances, other.samples.distances)
    quiet = model.eval()
    assert torch.equal(quiet(rays_o, rays_d).depth, quiet(rays_o, rays_d).depth)


def test_samples_behind_the_surface_never_reach_the_colour_network():
    model = build().eval()
    rays_o, rays_d = flat_rays()
    samples = model(rays_o, rays_d).samples
    assert samples.points.norm(dim=-1).min() > RADIUS - 0.08, "only a shell below the surface is left"
    assert samples.weights.shape == samples.density.shape == (len(samples.points), 1)


def test_every_parameter_of_the_field_learns_from_colours_and_normals():
    model = build({"return_normal_perturb": True})
    rays_o, rays_d = flat_rays(12)
    output = model(rays_o, rays_d, generator=torch.Generator().manual_seed(0), normals=True)
    assert output.samples.normal_perturbed is not None
    smooth = (output.samples.normal - output.samples.normal_perturbed).abs().mean()
    (output.rgb.mean() + output.normal_image.mean() + smooth).backward()
    for name, parameter in model.geometry.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


def test_some_samples_have_neighbours_and_others_at_the_next_step():
    model, rays = build({"return_normal_perturb": True, "normal_perturb_stride": 3}), flat_rays(12)
    firsts = set()
    for seed in range(16):
        samples = model(*rays, generator=torch.Generator().manual_seed(seed), normals=True).samples
        own, neighbours = samples.normal[samples.perturbed], samples.normal_perturbed
        assert len(own) == len(neighbours) == pytest.approx(len(samples.normal) / 3, abs=1)
        # Neighbours are 0.01 away on a ball of radius 0.5, so their normals are almost alike; others' are not.
        assert (own - neighbours).norm(dim=-1).median() < 0.1 < (own - neighbours.roll(50, 0)).norm(dim=-1).median()
        firsts.add(samples.perturbed.start)
    assert firsts == {0, 1, 2}


def test_pruning_keeps_the_gradient_of_a_pixel():
    rays_o, rays_d = flat_rays(10)
    gradients = []
    for prune in (True, False):
        model = build({"grid_prune": prune, "prune_alpha_threshold": False}).eval()
        model(rays_o, rays_d).rgb.square().mean().backward()
        gradients.append(model.geometry.feature_network.layers[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-2)


def test_lit_shadings_change_the_colours_and_ask_for_lights():
    model = build().eval()
    cameras = orbit_cameras(20.0, 30.0, 1.5, 49.1, 12, 12)
    lit = model.render_image(cameras, shading="textureless", ambient_ratio=0.1)["rgb"]
    flat = model.render_image(cameras, shading="albedo")["rgb"]
    assert (lit[0, 6, 6] - 1.0).abs().max() < 0.05, "a headlight meets the middle of the ball head on"
    assert (lit - flat).abs().max() > 0.1


def test_nothing_in_sight_gives_the_background():
    model = build()
    away = torch.tensor([[1.0, 0.0, 0.0]]).expand(5, 3)
    output = model(2 * away, away, normals=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output.rgb, torch.ones(5, 3))
    assert output.opacity.abs().max() == 0 and output.normal.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "proposal"}, "estimator"),
        ({"num_samples_per_ray": 0}, "num_samples"),
        ({"radius": -1.0}, "radius"),
    ],
)
def test_impossible_renderers_name_their_key(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        VolumeRenderer.Config(**change)


@pytest.mark.parametrize("normals", [True, False])
def test_training_in_parts_changes_no_gradient(normals):
    found = []
    for size in (0, 100):
        model = build({"train_chunk_size": size, "return_normal_perturb": True}, density_bias=2.0).train()
        output = model(*flat_rays(8), normals=normals, generator=torch.Generator().manual_seed(0))
        loss = output.rgb.square().sum() + output.depth.sum()
        if normals:
            assert len(output.samples.points) > 500
            loss = loss + output.normal[:, 0].sum() + output.samples.normal_perturbed[:, 1].sum()
        loss.backward()
        found.append([parameter.grad for parameter in model.geometry.parameters()])
    for one, parts in zip(*found, strict=True):
        torch.testing.assert_close(one, parts, atol=1e-4 * float(one.abs().max()), rtol=1e-3)
