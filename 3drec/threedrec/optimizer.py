"""The optimiser that a config asks for."""

from collections.abc import Iterator

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
        InputError: ``params`` names a part that does not exist.
    """
    arguments = {"lr": config.args.lr, "betas": tuple(config.args.betas), "eps": config.args.eps}
    if config.args.weight_decay is not None:
        arguments["weight_decay"] = config.args.weight_decay
    groups = list(_groups(scene, config))
    cls = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[config.name]
    return cls(groups, **arguments)  # type: ignore[arg-type]


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
        yield {"params": [parameter for parameter in scene.parameters() if parameter.requires_grad]}
        return
    modules = dict(scene.named_modules())
    for name, group in config.params.items():
        if name not in modules:
            known = ", ".join(child for child, _ in scene.named_children())
            raise InputError(f"system.optimizer.params: no part is called '{name}' (known: {known} and their parts)")
        options = {"lr": group.lr, "weight_decay": group.weight_decay}
        chosen = {key: value for key, value in options.items() if value is not None}
        parameters = list(modules[name].parameters())
        if parameters:
            yield {"params": parameters, **chosen}
