"""Numbers that the host draws from a generator of a GPU."""

from types import SimpleNamespace

import pytest
import torch

from threedrec.draws import host_generator


def draw(generator) -> float:
    return torch.rand((), generator=host_generator(generator)).item()


def on_a_gpu(seed: int, place: int = 0) -> SimpleNamespace:
    """What is used of a CUDA generator."""
    state = SimpleNamespace(device=torch.device("cuda"), initial_seed=lambda: seed, place=place)
    state.get_offset = lambda: state.place
    state.set_offset = lambda place: setattr(state, "place", place)
    return state


def test_a_generator_of_the_cpu_is_used_itself():
    generator = torch.Generator()
    assert host_generator(generator) is generator and host_generator(None) is None


def test_draws_follow_seed_and_place_and_do_not_repeat():
    one, other = on_a_gpu(1), on_a_gpu(1)
    first = [draw(one) for _ in range(3)]
    assert first == [draw(other) for _ in range(3)]
    assert len({*first, draw(on_a_gpu(2)), draw(on_a_gpu(1, place=400))}) == 5
    assert one.place == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_of_a_gpu_moves_on():
    generators = [torch.Generator(device="cuda").manual_seed(7) for _ in range(2)]
    first = [(draw(g), draw(g), torch.rand((), generator=g, device="cuda").item()) for g in generators]
    assert first[0] == first[1] and len(set(first[0])) == 3
