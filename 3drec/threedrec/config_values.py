"""One value of a config file against the type that a dataclass declares for it."""

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from threedrec.errors import InputError
from threedrec.schedules import check_schedule

_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "ge": ("at least", lambda value, limit: value >= limit),
    "gt": ("greater than", lambda value, limit: value > limit),
    "le": ("at most", lambda value, limit: value <= limit),
    "lt": ("less than", lambda value, limit: value < limit),
}


class InvalidValueError(Exception):
    """What is wrong with a value, without saying where it stands."""


def convert(value: Any, hint: Any) -> Any:
    """Return ``value`` as the type ``hint``: exactly, or by a conversion that loses nothing (1 for 1.0).

    Handles None, bool, int, float, str, Literal, Union, list, tuple, dict and Any. A bool is never a number, and a
    number becomes text only where text alone is expected (``tag: 7``).

    Raises:
        InvalidValueError: the value is not of that type; says what was expected and found.
    """
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, hint)
    if origin is Literal:
        return _literal(value, typing.get_args(hint))
    if origin in (list, tuple, dict) or hint in (list, tuple, dict):
        return _container(value, hint)
    return _scalar(value, hint)


def is_schedule(hint: Any) -> bool:
    """Tell whether ``hint`` is the type of a schedule: a float, or a list of ints and floats."""
    arms = _arms(hint)
    return float in arms and any(
        typing.get_origin(arm) is list and set(_arms(typing.get_args(arm)[0])) == {int, float} for arm in arms
    )


def takes_text_only(hint: Any) -> bool:
    """Tell whether ``hint`` is text (or None), so that a command line's value is taken letter by letter."""
    return set(_arms(hint)) - {type(None)} == {str}


def check_limits(value: Any, hint: Any, limits: Mapping[str, Any]) -> None:
    """Check a converted value against ``ge``, ``gt``, ``le`` and ``lt``, and a schedule for its form.

    Raises:
        InvalidValueError: a number is out of range, not finite, or the list is no schedule.
    """
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, list) and is_schedule(hint):
        try:
            check_schedule(value)
        except InputError as error:
            raise InvalidValueError(str(error)) from None
        numbers = [entry for index, entry in enumerate([0, *value] if len(value) == 3 else value) if _is_value(index)]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if number != number or number in (float("inf"), float("-inf")):
            raise InvalidValueError(f"{number} is not a finite number")
        for name, (words, holds) in _LIMITS.items():
            if name in limits and not holds(number, limits[name]):
                raise InvalidValueError(f"must be {words} {limits[name]:g}, got {number:g}")


def _is_value(index: int) -> bool:
    """Tell whether an entry of ``[start, v0, v1, end1, v2, end2, …]`` is a value and not a moment."""
    return index == 1 or (index >= 2 and index % 2 == 0)


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _one_of(value: Any, hint: Any) -> Any:
    arms = _arms(hint)
    # The arm that takes the value as it stands comes first: 3 stays an int where int and float are both allowed.
    for arm in sorted(arms, key=lambda arm: type(value) is not arm):
        if arm is str and not isinstance(value, str):
            continue
        try:
            return convert(value, arm)
        except InvalidValueError:
            pass
    raise InvalidValueError(f"expected {describe(hint)}, got {_shown(value)}")


_WORDS = {True: ("on", "yes"), False: ("off", "no")}
"""What YAML reads as a truth value where it stands without quotes."""


def _literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
        if isinstance(value, bool) and choice in _WORDS[value]:
            return choice
        # YAML reads a bare 32 as a number where the choice is the text "32".
        if isinstance(choice, str) and not isinstance(value, bool) and str(value) == choice:
            return choice
    raise InvalidValueError(f"expected {describe(Literal[choices])}, got {_shown(value)}")


def _container(value: Any, hint: Any) -> Any:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is dict:
        if not isinstance(value, dict):
            raise InvalidValueError(f"expected a group of keys, got {_shown(value)}")
        return {key: convert(item, inner[1] if inner else Any) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        raise InvalidValueError(f"expected {describe(hint)}, got {_shown(value)}")
    if kind is list or (len(inner) == 2 and inner[1] is ...):
        return kind(convert(item, inner[0] if inner else Any) for item in value)
    if len(value) != len(inner):
        raise InvalidValueError(f"expected {len(inner)} values, got {len(value)}: {_shown(value)}")
    return tuple(convert(item, item_hint) for item, item_hint in zip(value, inner, strict=True))


def _scalar(value: Any, hint: Any) -> Any:
    if hint is None or hint is type(None):
        if value is None:
            return None
    elif isinstance(value, bool) or hint is bool:
        if isinstance(value, bool) and hint is bool:
            return value
    elif hint is float and isinstance(value, int | float):
        return float(value)
    elif hint is str and isinstance(value, int | float):
        return str(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise InvalidValueError(f"expected {describe(hint)}, got {_shown(value)}")


_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}


def describe(hint: Any) -> str:
    """Return the words for a type in an error message."""
    if hint is None:
        return "null"
    if is_schedule(hint):
        return "a number or a schedule [start, value, value, end]"
    if len(_arms(hint)) > 1:
        return " or ".join(describe(arm) for arm in _arms(hint))
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if typing.get_origin(hint) in (list, tuple):
        return "a list" + (f" of items that are {describe(inner[0])}" if inner else "")
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
