"""Values that change while the optimisation runs.

Notation: a schedule is a number (constant), or a list whose values alternate with the moments at which they hold::

    [start, v0, v1, end]                 v0 until `start`, linear to v1 at `end`, v1 from there on
    [v0, v1, end]                        the same with start = 0
    [start, v0, v1, end1, v2, end2, …]   piecewise linear through any number of values

A moment written as an integer counts optimisation steps; written as a float it counts epochs (threestudio's rule, and
the reason why configs must not blur `5000` and `5000.0`).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from threedrec.errors import InputError

Schedule = float | list[int | float]
"""Type of a config field that may be a schedule."""

Interpolation = Literal["linear", "exp"]


def value_at(schedule: Schedule, step: int, epoch: float = 0, interpolation: Interpolation = "linear") -> float:
    """Return the value of ``schedule`` at an optimisation step.

    Args:
        schedule: see the notation at the top of this module.
        step: optimisation step, counted from 0.
        epoch: epoch, used by the segments whose end is a float.
        interpolation: "linear", or "exp" for a straight line in the logarithm (values must be positive).

    Raises:
        InputError: the list is no schedule.

    Example:
        >>> value_at([0, 0.98, 0.5, 5000], step=2500)
        0.74
    """
    if isinstance(schedule, int | float):
        return float(schedule)
    start, value, segments = _segments(schedule)
    for target, end in segments:
        now = epoch if isinstance(end, float) else step
        if now < end:
            fraction = min(max((now - start) / (end - start), 0.0), 1.0)
            return _between(value, target, fraction, interpolation)
        start, value = end, target
    return float(value)


def max_value(schedule: Schedule) -> float:
    """Return the largest value that ``schedule`` ever takes (0 tells that a loss is never used)."""
    if isinstance(schedule, int | float):
        return float(schedule)
    _, value, segments = _segments(schedule)
    return float(max(value, *(target for target, _ in segments)))


def at_milestone(values: int | Sequence[int], milestones: Sequence[int], step: int) -> int:
    """Return the entry of ``values`` that holds at ``step``: the first until ``milestones[0]``, then the second, …

    Raises:
        InputError: the list does not have one entry more than there are milestones.
    """
    if isinstance(values, int):
        return values
    if len(values) == 1:
        return values[0]
    if len(values) != len(milestones) + 1:
        raise InputError(
            f"{list(values)} needs one value more than resolution_milestones {list(milestones)}, or a single value"
        )
    return values[sum(step >= milestone for milestone in milestones)]


def check_schedule(schedule: Schedule) -> None:
    """Raise InputError when ``schedule`` is a list that is no schedule."""
    if not isinstance(schedule, int | float):
        _segments(schedule)


def _segments(schedule: Sequence[int | float]) -> tuple[float, float, list[tuple[float, int | float]]]:
    """Split into start, first value, and the ``(value, end)`` pairs that follow."""
    entries = [0, *schedule] if len(schedule) == 3 else list(schedule)
    if len(entries) < 4 or len(entries) % 2:
        raise InputError(
            f"{list(schedule)} is no schedule: write a number, [start, value, value, end], [value, value, end],"
            " or a longer list that goes on with value, end"
        )
    moments = [entries[0], *entries[3::2]]
    if any(later <= earlier for earlier, later in itertools.pairwise(moments)):
        raise InputError(f"{list(schedule)} is no schedule: its moments {moments} do not grow")
    return entries[0], entries[1], list(zip(entries[2::2], entries[3::2], strict=True))


def _between(first: float, second: float, fraction: float, interpolation: Interpolation) -> float:
    """Interpolate: fraction 0 gives ``first``, 1 gives ``second``."""
    if interpolation == "exp":
        return math.exp(math.log(first) * (1 - fraction) + math.log(second) * fraction)
    return first + (second - first) * fraction
