"""The choice of the number of CPU threads."""

from collections.abc import Iterator

import pytest
import torch

from threedrec import threads


@pytest.fixture(autouse=True)
def _restore_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv(threads.PINNED, raising=False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rates", "best"), [({1: 10, 2: 5, 4: 1}, 1), ({1: 10, 2: 18, 4: 35}, 4), ({1: 10, 2: 10.2, 4: 9}, 1)]
)
def test_the_fastest_count_wins_and_ties_go_to_fewer(
    rates: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_rate", lambda count, work: rates[count])
    assert threads.choose_threads() == best == torch.get_num_threads()


def test_a_pinned_count_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.PINNED, "4")
    monkeypatch.setattr(threads, "_rate", lambda count, work: pytest.fail("measured although pinned"))
    assert threads.choose_threads() == 4


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SECONDS_PER_CHOICE", 0.01)
    assert threads.choose_threads() in (1, 2, 4)
