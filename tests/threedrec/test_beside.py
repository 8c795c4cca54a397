"""Work beside other work: what it waits for, and what waits for it."""

import pytest
import torch

from threedrec.beside import Beside

LONG = 400_000_000
"""Cycles of the device, a fifth of a second."""


def test_on_a_cpu_everything_is_done_in_its_turn():
    beside, found = Beside(torch.device("cpu")), []
    beside.mark()
    with beside():
        found.append(torch.ones(2))
    assert torch.equal(found[0], torch.ones(2))


@pytest.mark.gpu
def test_work_beside_waits_for_what_was_marked_and_not_for_what_came_later():
    device, done = torch.device("cuda"), torch.cuda.Event()
    beside, values = Beside(device), torch.zeros(2**20, device=device)
    with beside():  # kernels and memory that are used for the first time may have to wait for the device
        (values * 2.0).sum().item()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    values += 1.0
    beside.mark()
    torch.cuda._sleep(LONG)
    done.record()
    with beside():
        doubled = values * 2.0
        assert doubled.sum().item() == 2.0 * 2**20
        assert not done.query(), "the host waited for work that was given after the mark"
    assert (doubled + values).sum().item() == 3.0 * 2**20
    assert done.query(), "what comes after the block comes after the other work, too"
