"""Parts of the loop: optimisers as configured, whose turn it is, and what is told about progress."""

import io
import logging

import pytest
import torch
from rich.console import Console

from threedrec.config_schema import (
    FreqConfig,
    OptimizerArgs,
    OptimizerConfig,
    ParameterGroupConfig,
    SchedulerConfig,
)
from threedrec.distillation import turn
from threedrec.errors import InputError
from threedrec.loggers import Reporter
from threedrec.losses import LossConfig
from threedrec.optimizer import build_optimizer, check_groups, restore_optimizer, scheduled_factor, set_learning_rate
from threedrec.steps import _subgrid, weigh


def two_parts() -> torch.nn.Module:
    return torch.nn.ModuleDict({"geometry": torch.nn.Linear(2, 2), "background": torch.nn.Linear(1, 1)})


def test_one_group_by_default():
    optimizer = build_optimizer(two_parts(), OptimizerConfig("AdamW", OptimizerArgs(0.01, [0.9, 0.99], 1e-8)))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and len(group["params"]) == 4
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.01, (0.9, 0.99), 1e-8, 0.01)


def test_groups_train_what_they_name():
    groups = {"background": ParameterGroupConfig(lr=0.1)}
    optimizer = build_optimizer(two_parts(), OptimizerConfig("Adam", OptimizerArgs(0.01), groups))
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.1 and [tuple(p.shape) for p in group["params"]] == [(1, 1), (1,)]


def test_an_unknown_group_is_refused():
    groups = {"geometri": ParameterGroupConfig(lr=0.1)}
    with pytest.raises(
        InputError, match=r"optimizer\.params: no part is called 'geometri' .known: geometry, background"
    ):
        build_optimizer(two_parts(), OptimizerConfig(params=groups))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "names no part"),
        ([""], "no part is called ''"),
        (["geometry", "geometry.0"], "'geometry.0' is part of 'geometry'"),
        (["material"], "'material' has nothing to train"),
    ],
)
def test_groups_that_cannot_be_trained_are_refused_before_they_are_built(names, words):
    geometry = torch.nn.Sequential(torch.nn.Linear(2, 2))
    scene = torch.nn.ModuleDict({"geometry": geometry, "geometry2": torch.nn.Linear(1, 1), "material": torch.nn.ReLU()})
    with pytest.raises(InputError, match=words):
        check_groups(scene, OptimizerConfig(params={name: ParameterGroupConfig() for name in names}))
    groups = {name: ParameterGroupConfig() for name in ("geometry", "geometry2")}
    check_groups(scene, OptimizerConfig(params=groups))


def stepped(scene: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    optimizer = build_optimizer(scene, config)
    sum(parameter.sum() for parameter in scene.parameters()).backward()
    optimizer.step()
    return optimizer


def test_an_optimizer_is_restored_where_it_trained_the_same_parts():
    names = ("geometry", "background")
    config = OptimizerConfig(params={name: ParameterGroupConfig() for name in names})
    state = stepped(two_parts(), config).state_dict()
    restored = build_optimizer(two_parts(), config)
    restore_optimizer(restored, state)
    assert all(
        torch.equal(restored.state_dict()["state"][index]["exp_avg"], saved["exp_avg"])
        for index, saved in state["state"].items()
    )
    for others in (names[::-1], names[:1], None):
        params = None if others is None else {name: ParameterGroupConfig() for name in others}
        with pytest.raises(InputError, match="resume: the checkpoint's optimiser trained other parts"):
            restore_optimizer(build_optimizer(two_parts(), OptimizerConfig(params=params)), state)


def test_rates_follow_the_schedule_of_each_group():
    groups = {"geometry": ParameterGroupConfig(), "background": ParameterGroupConfig(lr=0.1)}
    optimizer = build_optimizer(two_parts(), OptimizerConfig(args=OptimizerArgs(0.01), params=groups))
    config = SchedulerConfig([0, 1.0, 0.5, 10])
    for step, expected in [(0, 1.0), (5, 0.75), (20, 0.5)]:
        set_learning_rate(optimizer, scheduled_factor(config, step))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 * expected, 0.1 * expected])
    assert scheduled_factor(None, 5) == 1.0


def test_turns():
    assert turn(FreqConfig(), 7) == (True, True)
    alternate = FreqConfig(ref_only_steps=2, ref_or_nvsadapter="alternate", n_ref=3)
    assert [turn(alternate, step)[0] for step in range(7)] == [True, True, False, True, False, False, True]
    assert all(reference != guided for reference, guided in (turn(alternate, step) for step in range(7)))


def test_losses_are_weighted_by_the_schedule_in_force():
    weights = LossConfig(lambda_rgb=[0, 2.0, 4.0, 10], lambda_mask=3.0)
    result = weigh({"rgb": torch.tensor(1.0), "mask": torch.tensor(0.5)}, weights, step=5, prefix="ref")
    assert float(result.loss) == pytest.approx(3.0 * 1.0 + 3.0 * 0.5)
    assert {name: float(value) for name, value in result.terms.items()} == {"ref_rgb": 1.0, "ref_mask": 0.5}


def test_a_subgrid_has_about_as_many_pixels_as_asked_for(generator):
    image = torch.arange(64 * 64).reshape(64, 64)
    phases = set()
    for _ in range(40):
        picked = image[_subgrid(64, 64, 256, generator)]
        assert picked.shape == (16, 16)
        phases.add(int(picked[0, 0]))
    assert len(phases) > 8  # of 16
    assert image[_subgrid(64, 64, 0, generator)].shape == (64, 64)


def test_without_a_terminal_progress_is_a_line_at_the_end(caplog):
    reporter = Reporter(console=Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO, "threedrec.loggers"), reporter.stage("fit", 3) as report:
        for done in (1, 2, 3):
            report.update(done, {"loss": 0.5})
    (line,) = caplog.messages
    assert line.startswith("fit 3/3") and "it/s" in line and line.endswith("loss 0.5")


def test_in_a_terminal_progress_is_a_bar():
    text = io.StringIO()
    reporter = Reporter(console=Console(file=text, force_terminal=True, width=120))
    with reporter.stage("fit", 3, done=1) as report:
        report.update(3, {"loss": 0.5})
    assert "fit" in text.getvalue() and "3/3" in text.getvalue() and "loss 0.5" in text.getvalue()
