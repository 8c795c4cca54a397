"""Whole networks, with and without a ControlNet, against the golden tensors."""

from typing import Any, Dict

import pytest
import torch
from golden_files import (
    GOLDEN,
    GoldenFile,
    assert_relative,
    build_model,
    golden,
    golden_file,
    needs_golden,
    record_stages,
    scatter_noise,
)
from torch import Tensor

from nvsadapter_guidance.controlnet import control_residuals
from nvsadapter_guidance.conversion import to_released
from nvsadapter_guidance.unet import MultiViewUNet

pytestmark = [golden, needs_golden]


def unet_cases() -> list[str]:
    return list(golden_file("unet_tiny").options["cases"]) if GOLDEN.is_dir() else ["absent"]


def control_cases() -> list[str]:
    if not GOLDEN.is_dir():
        return ["absent"]
    return [name[: -len(".out")] for name in golden_file("controlnet_tiny").tensors if name.endswith(".out")]


def tiny_unet(kind: str) -> MultiViewUNet:
    options = golden_file("unet_tiny").options
    return build_model(golden_file("unet_tiny").weights(f"{kind}."), options["config"][kind], options["adapter"])


def tiny_controlled() -> MultiViewUNet:
    file = golden_file("controlnet_tiny")
    adapter = file.options.get("adapter", {})
    return build_model(file.weights(), file.options["unet"], adapter, file.options["control"])


def case_arguments(file: GoldenFile, case: str) -> Dict[str, Any]:
    start = case.rsplit(".", 1)[0] + ".in."
    support, mask = file[f"{start}support_latents"], file[f"{case}.ucg_mask"]
    noise = f"{case}.random_support_latents"
    arguments = {
        "query_latents": file[f"{start}inputs"],
        "timesteps": file[f"{start}timesteps"],
        "text_context": file[f"{start}txt_context"],
        "image_context": file[f"{start}image_context"],
        "ray_embedding": file[f"{start}rays_context"],
        "support_latents": support,
        "ucg_mask": mask,
        "unconditional_support_latents": scatter_noise(mask, file[noise] if noise in file else None, support),
    }
    if f"{start}control_context" in file:
        arguments["control_images"] = file[f"{start}control_context"]
    return arguments


def cached_output(model: MultiViewUNet, arguments: Dict[str, Any]) -> Tensor:
    support_only = {key: value for key, value in arguments.items() if key not in ("query_latents", "timesteps")}
    cache = model.encode_support(**support_only)
    return model(**{**arguments, "support_latents": None}, support_cache=cache)


def check_case(model: MultiViewUNet, file: GoldenFile, case: str) -> Dict[str, Tensor]:
    arguments = case_arguments(file, case)
    before = {key: value.clone() for key, value in arguments.items() if value is not None}
    stages = record_stages(model.unet)
    with torch.no_grad():
        assert_relative(model(**arguments), file[f"{case}.out"])
        recorded = dict(stages)
        if model.adapter.config.support_is_independent:
            assert_relative(cached_output(model, arguments), file[f"{case}.out"])
    for key, value in before.items():
        assert torch.equal(value, arguments[key]), f"{key} was modified"
    return recorded


@pytest.mark.parametrize("case", unet_cases())
def test_unet_output_and_stages(case: str) -> None:
    file = golden_file("unet_tiny")
    recorded = check_case(tiny_unet(case.split(".")[0]), file, case)
    for name in file.tensors:
        if name.startswith(f"{case}.mid."):
            assert_relative(recorded[name[len(case) + 5 :]], file[name])


@pytest.mark.parametrize(("recorded", "times"), [(2, 3), (1, 16), (4, 4)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_more_query_views_than_were_recorded(kind: str, recorded: int, times: int) -> None:
    """Views that learned tokens keep apart: 6 and 16 of them are the recorded 2, 1 and 4, several times over."""
    file, model, case = golden_file("unet_tiny"), tiny_unet(kind), f"{kind}.n{recorded}.mixed"
    arguments = case_arguments(file, case)
    rays = arguments["ray_embedding"]
    arguments["query_latents"] = arguments["query_latents"].repeat(1, times, 1, 1, 1)
    arguments["ray_embedding"] = torch.cat((rays[:, :1], rays[:, 1:].repeat(1, times, 1, 1, 1)), dim=1)
    with torch.no_grad():
        assert_relative(model(**arguments), file[f"{case}.out"].repeat(1, times, 1, 1, 1))


@pytest.mark.parametrize("kind", sorted(golden_file("unet_tiny").options["config"]) if GOLDEN.is_dir() else ["absent"])
def test_released_weights_survive_the_round_trip(kind: str) -> None:
    weights = golden_file("unet_tiny").weights(f"{kind}.")
    model = tiny_unet(kind)
    back = to_released(model.unet, model.adapter)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_released_control_weights_survive_the_round_trip() -> None:
    weights, model = golden_file("controlnet_tiny").weights(), tiny_controlled()
    back = to_released(model.unet, model.adapter, model.controlnet)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("case", control_cases())
def test_controlnet_output_and_residuals(case: str) -> None:
    file, model = golden_file("controlnet_tiny"), tiny_controlled()
    check_case(model, file, case)
    names = [name for name in file.tensors if name.startswith(f"{case}.mid.control_")]
    if not names:
        return
    arguments = case_arguments(file, case)
    num_query = arguments["query_latents"].shape[1]

    def rows(support: Tensor, query: Tensor) -> Tensor:
        return torch.cat((support, query))

    timesteps, text = arguments["timesteps"], arguments["text_context"]
    with torch.no_grad():
        down, middle = control_residuals(
            model.controlnet,  # type: ignore[arg-type]
            rows(arguments["support_latents"][:, 0], arguments["query_latents"].flatten(0, 1)),
            rows(torch.zeros_like(timesteps), timesteps.repeat_interleave(num_query)),
            rows(text, text.repeat_interleave(num_query, dim=0)),
            rows(arguments["control_images"][:, 0], arguments["control_images"][:, 1:].flatten(0, 1)),
        )
    residuals = [*down, middle]
    assert len(names) == len(residuals)
    for name in names:
        assert_relative(residuals[int(name.rsplit("_", 1)[1])], file[name])
