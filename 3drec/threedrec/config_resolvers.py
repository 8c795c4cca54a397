"""The ``${name:argument,…}`` functions that config files may use: threestudio's, and ``stem``."""

from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from omegaconf import ListConfig, OmegaConf

from threedrec.schedules import max_value

Number = int | float


def _largest(schedule: Number | ListConfig | list[Number]) -> float:
    values = OmegaConf.to_container(schedule) if isinstance(schedule, ListConfig) else schedule
    return max_value(values)  # type: ignore[arg-type]


def _tuple2(value: Number) -> list[float]:
    return [float(value), float(value)]


RESOLVERS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "not": lambda value: not value,
    # The factor by which a learning rate shrinks each step so that n steps shrink it by `factor`.
    "calc_exp_lr_decay_rate": lambda factor, n: factor ** (1.0 / n),
    "tuple2": _tuple2,
    # Is a loss weight (a number or a schedule) ever above zero? The released YAML asks by either name.
    "gt0": lambda schedule: _largest(schedule) > 0,
    "cmaxgt0": lambda schedule: _largest(schedule) > 0,
    "cmaxgt0orcmaxgt0": lambda first, second: _largest(first) > 0 or _largest(second) > 0,
    "basename": lambda path: PurePath(path).name,
    "stem": lambda path: PurePath(path).stem,
    "rmspace": lambda text, replacement: str(text).replace(" ", replacement),
}


def register_resolvers() -> None:
    """Make the functions known to OmegaConf; safe to call again, and beside threestudio in one process."""
    for name, function in RESOLVERS.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_resolver(name, function)
