"""Schedule, denoiser, guided sampling, training loss and score distillation against the golden tensors."""

import re
from typing import Callable

import pytest
import torch
from golden_files import GOLDEN, GoldenFile, assert_relative, build_model, golden, golden_file, needs_golden
from released_sampler import denoise, euler_steps, quantise_sigma, sampling_sigmas, sigmas_from_alphas, x0_loss
from torch import Tensor

from nvsadapter_guidance.cameras import RELEASED, look_at, relative_to_support
from nvsadapter_guidance.diffusion import (
    add_noise,
    guide,
    legacy_alphas_cumprod,
    sampling_timesteps,
    sds_gradient,
    sds_loss,
    split_prediction,
)
from nvsadapter_guidance.rays import RayEmbedding, latent_rays
from nvsadapter_guidance.support_cache import SupportCache
from nvsadapter_guidance.unet import MultiViewUNet

pytestmark = [golden, needs_golden]

SAMPLING_TOLERANCE = 1e-3
# In this set nothing but the U-Net's levels says how an image relates to its latents; the released VAE's factor is 8.
VAE_STRIDE = 8
RELEASED_FOV_DEG = 49.1

ALPHAS = legacy_alphas_cumprod()
TABLE = sigmas_from_alphas(ALPHAS)


def guidance_names() -> list[str]:
    if not GOLDEN.is_dir():
        return ["absent"]
    return [
        match[1] for name in golden_file("denoise_sample").tensors if (match := re.match(r"(cfg[\d.]+)\.noise", name))
    ]


def sample_model() -> MultiViewUNet:
    file = golden_file("denoise_sample")
    return build_model(file.weights(), file.options["unet"], file.options.get("adapter", {}))


def network(model: MultiViewUNet, file: GoldenFile) -> Callable[[Tensor, Tensor], Tensor]:
    """The conditional network of the file as a function of (scaled latents, timestep)."""
    return lambda x, t: model(
        x, t, file["cond.txt.crossattn"], file["cond.image.crossattn"], file["cond.ray.concat"],
        file["cond.support_latents.concat"],
    )  # fmt: skip


def test_schedule() -> None:
    file = golden_file("denoise_sample")
    torch.testing.assert_close(ALPHAS, file["sched.alphas_cumprod_f64"], rtol=1e-12, atol=0.0)
    for name, expected in file.tensors.items():
        if match := re.fullmatch(r"sched\.timesteps_(\d+)_ascending", name):
            assert torch.equal(sampling_timesteps(int(match[1])).flip(0), expected)
        elif match := re.fullmatch(r"sched\.sigmas_(\d+)_with_zero", name):
            torch.testing.assert_close(sampling_sigmas(ALPHAS, int(match[1])), expected, rtol=1e-6, atol=0.0)
        elif name.startswith("sched.denoiser_sigmas_"):
            torch.testing.assert_close(TABLE, expected, rtol=1e-6, atol=0.0)


@torch.no_grad()
def test_one_denoiser_call() -> None:
    file, model = golden_file("denoise_sample"), sample_model()
    level, index = quantise_sigma(file["denoise.sigma"], TABLE)
    assert torch.equal(index, file["denoise.index"])
    torch.testing.assert_close(level, file["denoise.sigma_quantised"], rtol=1e-6, atol=0.0)
    clean = denoise(network(model, file), file["denoise.x"], file["denoise.sigma"], TABLE)
    assert_relative(clean, file["denoise.x0"], SAMPLING_TOLERANCE)


@torch.no_grad()
def test_training_loss() -> None:
    file, model = golden_file("denoise_sample"), sample_model()
    x0, noise, index, sigma = (file[f"loss.{name}"] for name in ("x0", "noise", "index", "sigma"))
    torch.testing.assert_close(TABLE[index], sigma, rtol=1e-6, atol=0.0)
    scale = (1.0 + sigma**2).sqrt().reshape(-1, *[1] * (x0.ndim - 1))
    noisy = add_noise(x0, noise, index, ALPHAS) * scale
    assert_relative(noisy, file["loss.noisy"])
    clean = denoise(network(model, file), noisy, sigma, TABLE)
    assert_relative(clean, file["loss.x0_pred"], SAMPLING_TOLERANCE)
    torch.testing.assert_close(x0_loss(clean, x0, sigma), file["loss.per_sample"], rtol=SAMPLING_TOLERANCE, atol=0.0)
    # Weighting by sigma^-2 turns the error of the clean latents into the error of the noise.
    eps = network(model, file)(noisy / scale, index)
    torch.testing.assert_close(((eps - noise) ** 2).flatten(1).mean(1), file["loss.per_sample"], rtol=1e-3, atol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("name", guidance_names())
def test_guided_sampling(name: str) -> None:
    file, model = golden_file("denoise_sample"), sample_model()
    noise, scale = file[f"{name}.noise"], float(name[len("cfg") :])
    batch = noise.shape[0]
    mask = torch.arange(2 * batch) < batch
    text, image, rays, support = (
        file[f"cond.{part}"].repeat(2, *[1] * (file[f"cond.{part}"].ndim - 1))
        for part in ("txt.crossattn", "image.crossattn", "ray.concat", "support_latents.concat")
    )
    halves, levels = [], []

    def denoise_guided(x: Tensor, sigma: Tensor) -> Tensor:
        random_support = torch.cat((file[f"{name}.random_support_latents"][len(halves)], support[:batch]))
        clean = denoise(
            lambda z, t: model(z, t, text, image, rays, support, mask, random_support),
            torch.cat((x, x)), torch.cat((sigma, sigma)), TABLE,
        )  # fmt: skip
        halves.append((x, *clean.chunk(2)))
        levels.append(sigma)
        return guide(*clean.chunk(2), scale)

    original = noise.clone()
    sigmas = sampling_sigmas(ALPHAS, file.options["steps"])
    *_, (samples, _) = euler_steps(denoise_guided, noise, sigmas)
    assert torch.equal(noise, original)
    assert_relative(samples, file[f"{name}.samples"], SAMPLING_TOLERANCE)
    for kind, values in zip(("x", "x0_uncond", "x0_cond"), zip(*halves)):
        for value, expected in zip(values, file[f"{name}.{kind}_per_step"], strict=True):
            assert_relative(value, expected, SAMPLING_TOLERANCE)
    torch.testing.assert_close(torch.stack(levels), file[f"{name}.sigma_per_step"], rtol=1e-6, atol=0.0)


def sds_poses(file: GoldenFile) -> Tensor:
    groups, num_query = file.options["groups"], file.options["num_query"]
    views = look_at(file["in.azimuth_deg"], file["in.elevation_deg"], file["in.distance"], RELEASED)
    support = look_at(*file["in.support_pose"].unbind(), RELEASED)
    return torch.cat((support.expand(groups, 1, 4, 4), views.unflatten(0, (groups, num_query))), dim=1)


def test_sds_rays() -> None:
    file = golden_file("sds")
    height, width = file["in.latents"].shape[-2:]
    size = (height * VAE_STRIDE, width * VAE_STRIDE)
    fov = file.options.get("fov_deg", RELEASED_FOV_DEG)
    poses = sds_poses(file)
    rays_o, rays_d = latent_rays(relative_to_support(poses), fov, size, VAE_STRIDE, RELEASED)
    torch.testing.assert_close(rays_o, file["mid.rays_offset"], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(rays_d, file["mid.rays_direction"], atol=1e-5, rtol=0.0)
    embedding = RayEmbedding()(poses, fov, size, VAE_STRIDE, RELEASED)
    torch.testing.assert_close(embedding, file["mid.ray_embedding"], atol=2e-2, rtol=0.0)


@torch.no_grad()
def sds_predictions(file: GoldenFile, noisy: Tensor, cached: bool) -> tuple[Tensor, Tensor]:
    options = {"latent_resolution": file.options["latent_resolution_param"], **file.options.get("adapter", {})}
    model = build_model(file.weights(), file.options["unet"], options)
    groups = file.options["groups"]
    rays, noise, timesteps = file["mid.ray_embedding"], file["in.random_support_latents"], file["in.timesteps"]
    support, text, image = (file[f"in.{name}"] for name in ("support_latents", "txt_context", "image_context"))
    if cached:
        off, on = torch.zeros(groups, dtype=torch.bool), torch.ones(groups, dtype=torch.bool)
        conditional = model.encode_support(support[:, None], text, image, rays[:1], off[:1]).expand(groups)
        text, image = text.expand(groups, -1, -1), image.expand(groups, -1, -1)
        support = support[:, None].expand(groups, -1, -1, -1, -1)
        cache = SupportCache.cat((model.encode_support(support, text, image, rays, on, noise), conditional))
    else:
        text, image = text.expand(groups, -1, -1), image.expand(groups, -1, -1)
        support, cache = support[:, None].expand(groups, -1, -1, -1, -1), None
    mask = torch.arange(2 * groups) < groups
    prediction = model(
        torch.cat((noisy, noisy)), timesteps.repeat(2), text.repeat(2, 1, 1), image.repeat(2, 1, 1),
        rays.repeat(2, 1, 1, 1, 1), support.repeat(2, 1, 1, 1, 1), mask, torch.cat((noise, noise)), cache,
    )  # fmt: skip
    unconditional, conditional_half = prediction.chunk(2)
    return unconditional, conditional_half


@pytest.mark.parametrize("cached", [False, True])
def test_sds_gradient_and_loss(cached: bool) -> None:
    file = golden_file("sds")
    groups, num_query = file.options["groups"], file.options["num_query"]
    latents = file["in.latents"].clone().requires_grad_(True)
    grouped, noise = (value.unflatten(0, (groups, num_query)) for value in (latents.detach(), file["in.noise"]))
    timesteps = file["in.timesteps"]
    assert int(timesteps.min()) >= file.options["min_step"] and int(timesteps.max()) <= file.options["max_step"]
    torch.testing.assert_close(TABLE[timesteps], file["mid.sigmas"], rtol=1e-6, atol=0.0)
    torch.testing.assert_close((1.0 - ALPHAS[timesteps]).float(), file["mid.w"], rtol=1e-5, atol=0.0)
    noisy = add_noise(grouped, noise, timesteps, ALPHAS)
    scale = (1.0 + file["mid.sigmas"] ** 2).sqrt()[:, None, None, None, None]
    assert_relative(noisy * scale, file["mid.noisy_latents"])

    unconditional, conditional = sds_predictions(file, noisy, cached)
    assert_relative(unconditional, file["mid.noise_pred_uncond"], SAMPLING_TOLERANCE)
    assert_relative(conditional, file["mid.noise_pred_cond"], SAMPLING_TOLERANCE)
    prediction = guide(unconditional, conditional, file.options["guidance_scale"])
    gradient = sds_gradient(grouped, noise, timesteps, prediction, ALPHAS).flatten(0, 1)
    assert_relative(gradient, file["out.grad"], SAMPLING_TOLERANCE)
    assert_relative(gradient.norm(), file["out.grad_norm"], SAMPLING_TOLERANCE)
    loss = sds_loss(latents, gradient)
    assert_relative(loss.detach(), file["out.loss_sds"], SAMPLING_TOLERANCE)
    loss.backward()
    assert latents.grad is not None
    assert_relative(latents.grad, file["out.dloss_dlatents"], SAMPLING_TOLERANCE)


def test_guided_clean_latents_and_guided_noise_agree() -> None:
    """Guidance on x0, as released, equals guidance on the noise."""
    file = golden_file("sds")
    unconditional, conditional, noisy = (
        file[f"mid.{name}"] for name in ("noise_pred_uncond", "noise_pred_cond", "noisy_latents")
    )
    timesteps, scale = file["in.timesteps"], file.options["guidance_scale"]
    noisy = noisy / (1.0 + file["mid.sigmas"] ** 2).sqrt()[:, None, None, None, None]
    clean_u, clean_c = (
        split_prediction(eps, noisy, timesteps, ALPHAS, "epsilon")[0] for eps in (unconditional, conditional)
    )
    guided, _ = split_prediction(guide(unconditional, conditional, scale), noisy, timesteps, ALPHAS, "epsilon")
    assert_relative(guide(clean_u, clean_c, scale), guided, SAMPLING_TOLERANCE)
