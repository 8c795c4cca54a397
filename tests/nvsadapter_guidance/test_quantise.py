"""Eight-bit weights: error bound, exact zeros, damaged files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.quantise import (
    SCALE_SUFFIX,
    dequantise_state_dict,
    quantise_state_dict,
    quantise_tensor,
)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(1e-4, 1e3))
def test_error_is_at_most_half_a_step_of_the_channel(seed: int, size: float) -> None:
    weight = size * torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(seed))
    values, scale = quantise_tensor(weight)
    error = (values.float() * scale.float().view(-1, 1, 1, 1) - weight).abs().flatten(1).amax(dim=1)
    # The scale itself is rounded to half precision (relative 2^-11), which moves 127 steps by at most 127/2048 of one.
    assert (error <= (0.5 + 127 / 2048) * scale.float() + 1e-12).all()


def test_small_and_one_dimensional_tensors_stay_half_precision() -> None:
    state = {"bias": torch.linspace(-1, 1, 7), "small": torch.ones(3, 3), "big": torch.randn(64, 64)}
    packed = quantise_state_dict(state)
    assert packed["bias"].dtype == packed["small"].dtype == torch.float16
    assert packed["big"].dtype == torch.int8 and packed["big" + SCALE_SUFFIX].shape == (64,)
    restored = dequantise_state_dict(packed, "here")
    assert restored.keys() == state.keys()
    assert all(tensor.dtype == torch.float32 for tensor in restored.values())


def test_named_parts_stay_half_precision() -> None:
    packed = quantise_state_dict({"vae.w": torch.randn(64, 64), "unet.w": torch.randn(64, 64)}, half=("vae.",))
    assert packed["vae.w"].dtype == torch.float16 and packed["unet.w"].dtype == torch.int8


def test_zero_channel_stays_zero() -> None:
    weight = torch.randn(64, 64)
    weight[3] = 0.0
    assert (dequantise_state_dict(quantise_state_dict({"w": weight}), "here")["w"][3] == 0).all()


def test_damaged_tensors_are_refused_by_name() -> None:
    packed = quantise_state_dict({"w": torch.randn(64, 64)})
    with pytest.raises(InputError, match="model.safetensors.*'w'.*no scale"):
        dequantise_state_dict({"w": packed["w"]}, "model.safetensors")
    packed["w" + SCALE_SUFFIX][5] = float("nan")
    with pytest.raises(InputError, match="model.safetensors.*'w'.*NaN"):
        dequantise_state_dict(packed, "model.safetensors")
