"""The optimiser that a config asks for."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from threedrec.config_schema import OptimizerConfig, SchedulerConfig
from threedrec.errors import InputError
from threedrec.schedules import value_at


def build_optimizer(scene: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimiser of ``scene``'s parameters.

    Args:
        scene: its submodules are named ``geometry``, ``material``, ``background``.
        config: without ``params`` all parameters form one group; with it, only those that it names are trained.

    Raises:
        InputError: see `check_groups`.
    """
    check_groups(scene, config)
    arguments = {"lr": config.args.lr, "betas": tuple(config.args.betas), "eps": config.args.eps, "fused": fused(scene)}
    if config.args.weight_decay is not None:
        arguments["weight_decay"] = config.args.weight_decay
    groups = list(_groups(scene, config))
    cls = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[config.name]
    return cls(groups, **arguments)  # type: ignore[arg-type]


def fused(scene: nn.Module) -> bool | None:
    """Return whether one kernel should do a whole step of Adam: on CUDA; None leaves it to PyTorch elsewhere."""
    return True if all(parameter.is_cuda for parameter in scene.parameters()) else None


def check_groups(scene: nn.Module, config: OptimizerConfig) -> None:
    """Check ``params`` against the parts of ``scene``, which is cheap and can be done long before they are trained.

    Raises:
        InputError: it names no part, a part that does not exist or has nothing to train, or a part of another one.
    """
    if config.params is None:
        return
    where, names = "system.optimizer.params", list(config.params)
    if not names:
        raise InputError(f"{where}: names no part; use null to train all of them")
    modules = dict(scene.named_modules())
    for name in names:
        if not name or name not in modules:
            known = ", ".join(child for child, _ in scene.named_children())
            raise InputError(f"{where}: no part is called '{name}' (known: {known} and their parts)")
        if not _trained(modules[name]):
            raise InputError(f"{where}: '{name}' has nothing to train; leave it out")
        inside = [other for other in names if name.startswith(f"{other}.")]
        if inside:
            raise InputError(f"{where}: '{name}' is part of '{inside[0]}'; name one of them, or the other parts of it")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Bring ``optimizer`` to a state that a checkpoint holds.

    Raises:
        InputError: the state is of other parameters or groups.
    """
    saved, ours = ([group["params"] for group in groups] for groups in (state["param_groups"], optimizer.param_groups))
    fits = [len(group) for group in saved] == [len(group) for group in ours] and all(
        value.dim() == 0 or value.shape == parameter.shape
        for index, parameter in zip(chain(*saved), chain(*ours), strict=True)
        for value in state["state"].get(index, {}).values()
    )
    if not fits:
        raise InputError(
            "resume: the checkpoint's optimiser trained other parts;"
            " use the system.optimizer of the run that wrote it (parsed.yaml)"
        )
    optimizer.load_state_dict(state)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` times its rate at the start."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor


def scheduled_factor(config: SchedulerConfig | None, step: int) -> float:
    """Return the factor on the learning rates at ``step``."""
    return 1.0 if config is None else value_at(config.factor, step, interpolation=config.interpolation)


def _groups(scene: nn.Module, config: OptimizerConfig) -> Iterator[dict]:
    if config.params is None:
        yield {"params": _trained(scene)}
        return
    for name, group in config.params.items():
        options = {"lr": group.lr, "weight_decay": group.weight_decay}
        chosen = {key: value for key, value in options.items() if value is not None}
        yield {"params": _trained(scene.get_submodule(name)), **chosen}


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
