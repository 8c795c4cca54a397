import pytest

from threedrec.errors import InputError
from threedrec.schedules import at_milestone, check_schedule, max_value, value_at


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.98), (1250, 0.86), (2500, 0.74), (5000, 0.5), (7000, 0.5)],
)
def test_linear_schedule_of_the_released_recipe(step, expected):
    assert value_at([0, 0.98, 0.5, 5000], step) == pytest.approx(expected)


def test_a_number_is_constant():
    assert value_at(0.1, 0) == value_at(0.1, 10**9) == 0.1
    assert value_at(2, 5) == 2.0 and isinstance(value_at(2, 5), float)


def test_three_entries_start_at_zero():
    assert [value_at([4.0, 2.0, 10], step) for step in (0, 5, 10)] == [4.0, 3.0, 2.0]


def test_value_holds_before_the_start():
    assert value_at([100, 1.0, 3.0, 200], 0) == value_at([100, 1.0, 3.0, 200], 100) == 1.0


@pytest.mark.parametrize(("step", "expected"), [(5, 0.0), (15, 0.5), (20, 1.0), (30, 2.0), (40, 3.0), (50, 3.0)])
def test_piecewise_schedule(step, expected):
    assert value_at([10, 0.0, 1.0, 20, 3.0, 40], step) == pytest.approx(expected)


def test_a_float_moment_counts_epochs():
    assert value_at([0, 0.0, 1.0, 4.0], step=1000, epoch=1) == pytest.approx(0.25)
    assert value_at([0, 0.0, 1.0, 4], step=1000, epoch=1) == 1.0


def test_exponential_interpolation_is_linear_in_the_logarithm():
    assert value_at([0, 1.0, 0.01, 100], 50, interpolation="exp") == pytest.approx(0.1)


def test_max_value():
    assert max_value(3) == 3.0
    assert max_value([0, 0.0, 0.05, 100]) == 0.05
    assert max_value([10, 0.0, 7.0, 20, 3.0, 40]) == 7.0


@pytest.mark.parametrize(
    "schedule", [[], [1], [1, 2], [0, 1, 2, 3, 4], [10, 1.0, 2.0, 10], [0, 1.0, 2.0, 30, 3.0, 20], [5, 1.0, 2.0, 4]]
)
def test_what_is_no_schedule(schedule):
    with pytest.raises(InputError, match="is no schedule"):
        check_schedule(schedule)


def test_milestones():
    values = [at_milestone([64, 128, 256], [2000, 5000], step) for step in (0, 1999, 2000, 4999, 5000, 9000)]
    assert values == [64, 64, 128, 128, 256, 256]
    assert at_milestone(32, [1, 2], 5) == at_milestone([32], [1, 2], 5) == 32
    with pytest.raises(InputError, match="one value more"):
        at_milestone([1, 2], [10, 20], 0)
