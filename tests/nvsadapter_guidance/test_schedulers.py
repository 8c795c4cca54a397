"""Schedulers of a model's noise schedule: the same table, exact answers where they are known, agreement."""

import json

import pytest
import torch
from golden_files import assert_relative, golden, golden_file, needs_golden
from released_sampler import denoise, euler_sample, sampling_sigmas, sigmas_from_alphas
from test_golden_diffusion import sample_model
from torch import Tensor

from nvsadapter_guidance import diffusion
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.schedule import NoiseSchedule
from nvsadapter_guidance.schedulers import SCHEDULERS, EulerScheduler, build_scheduler

SPREAD = 0.5
RELEASED = NoiseSchedule("scaled_linear", 1.0, "epsilon")
MINI = NoiseSchedule()
SCHEDULES = {"released": RELEASED, "zero-terminal-snr": MINI}


@pytest.fixture(params=SCHEDULES)
def schedule(request) -> NoiseSchedule:
    return SCHEDULES[request.param]


def noise() -> Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def gaussian_answer(schedule: NoiseSchedule, noisy: Tensor, timestep: int) -> Tensor:
    """The best prediction for data N(0, SPREAD^2), in closed form."""
    a = schedule.alphas_cumprod[timestep].double()
    variance = a * SPREAD**2 + 1 - a
    if schedule.prediction_type == "epsilon":
        return ((1 - a).sqrt() / variance * noisy).float()
    return ((a * (1 - a)).sqrt() * (1 - SPREAD**2) / variance * noisy).float()


def solve(scheduler, schedule: NoiseSchedule, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = gaussian_answer(schedule, scheduler.scale_model_input(x, t), int(t))
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_table_is_the_schedules(name: str, schedule: NoiseSchedule) -> None:
    table = build_scheduler(name, schedule).alphas_cumprod.float()
    # float32 products of a thousand factors; the last entry may stand for zero.
    torch.testing.assert_close(table[:-1], schedule.alphas_cumprod[:-1], rtol=1e-3, atol=1e-7)
    assert abs(float(table[-1] - schedule.alphas_cumprod[-1])) < 1e-6


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_starts_at_the_last_timestep(name: str, schedule: NoiseSchedule) -> None:
    scheduler = build_scheduler(name, schedule)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -20))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_reach_the_exact_solution_for_gaussian_data(name: str, schedule: NoiseSchedule) -> None:
    # The probability flow ODE scales N(0, a s^2 + 1 - a) to N(0, s^2) linearly.
    a = float(schedule.alphas_cumprod[-1])
    exact = noise() * SPREAD / (a * SPREAD**2 + 1 - a) ** 0.5
    errors = [float((solve(build_scheduler(name, schedule), schedule, n) - exact).abs().max()) for n in (10, 200)]
    assert errors[1] < 0.03 and errors[1] <= errors[0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_exchanged_by_their_configuration(name: str, schedule: NoiseSchedule) -> None:
    named = build_scheduler(name, schedule)
    exchanged = type(named).from_config(build_scheduler("euler", schedule).config)
    options = [key for key in named.config if not key.startswith("_")]
    assert {key: exchanged.config[key] for key in options} == {key: named.config[key] for key in options}
    torch.testing.assert_close(*(solve(scheduler, schedule, 20) for scheduler in (exchanged, named)))
    back = EulerScheduler.from_config(json.loads(exchanged.to_json_string()))
    torch.testing.assert_close(back.alphas_cumprod, named.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_second_order_needs_fewer_steps_than_euler(name: str) -> None:
    exact = noise() * SPREAD
    second, first = ((solve(build_scheduler(kind, MINI), MINI, 25) - exact).abs().max() for kind in (name, "euler"))
    assert second < 0.5 * first


def test_euler_equals_the_released_form() -> None:
    table = sigmas_from_alphas(RELEASED.alphas_cumprod)
    sigmas = sampling_sigmas(RELEASED.alphas_cumprod, 7)

    def clean(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(lambda z, t: gaussian_answer(RELEASED, z, int(t[0])), x, sigma, table)

    expected = euler_sample(clean, noise(), sigmas)
    torch.testing.assert_close(solve(build_scheduler("euler", RELEASED), RELEASED, 7), expected, rtol=1e-4, atol=1e-5)


def test_euler_equals_ddim_where_steps_divide_the_schedule(schedule: NoiseSchedule) -> None:
    euler, ddim = (solve(build_scheduler(name, schedule), schedule, 50) for name in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim, rtol=1e-3, atol=1e-4)


def test_euler_reports_the_clean_latents_of_every_step() -> None:
    scheduler = build_scheduler("euler", MINI)
    scheduler.set_timesteps(1)
    output = scheduler.step(gaussian_answer(MINI, noise(), 999), 999, noise())
    assert torch.equal(output.prev_sample, output.pred_original_sample)


def test_euler_without_betas_is_stable_diffusions() -> None:
    torch.testing.assert_close(EulerScheduler().alphas_cumprod.float(), RELEASED.alphas_cumprod)


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="scheduler 'heun' is unknown; use one of euler, ddim, dpm"):
        build_scheduler("heun", MINI)
    with pytest.raises(InputError, match="number of sampling steps is 0"):
        build_scheduler("euler", MINI).set_timesteps(0)


@needs_golden
@golden
@torch.no_grad()
@pytest.mark.parametrize("name", ["cfg1", "cfg3"])
def test_euler_reproduces_recorded_samples(name: str) -> None:
    file, model = golden_file("denoise_sample"), sample_model()
    batch = len(file[f"{name}.noise"])
    parts = ("txt.crossattn", "image.crossattn", "ray.concat", "support_latents.concat")
    text, image, rays, support = (torch.cat((file[f"cond.{part}"],) * 2) for part in parts)
    scheduler = build_scheduler("euler", RELEASED)
    scheduler.set_timesteps(file.options["steps"])
    x = file[f"{name}.noise"]
    for index, t in enumerate(scheduler.timesteps):
        replaced = torch.cat((file[f"{name}.random_support_latents"][index], support[:batch]))
        mask = torch.arange(2 * batch) < batch
        prediction = model(torch.cat((x, x)), t.expand(2 * batch), text, image, rays, support, mask, replaced)
        guided = diffusion.guide(*prediction.chunk(2), float(name.removeprefix("cfg")))
        x = scheduler.step(guided, t, x).prev_sample
    assert_relative(x, file[f"{name}.samples"], 1e-3)
