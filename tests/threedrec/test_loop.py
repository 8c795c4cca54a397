"""The loop keeps nothing that is not finite, and leaves nothing half written behind."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from threedrec import checkpoint
from threedrec.background_writer import BackgroundWriter
from threedrec.batch.task import kind_of
from threedrec.checkpoint import CheckpointKeeper, load_checkpoint
from threedrec.divergence import DivergenceError, FiniteCheck
from threedrec.errors import InputError
from threedrec.host import Interrupted
from threedrec.loggers import Reporter
from threedrec.loop import Loop, LoopRunner, StepResult


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, values: Any, step: int) -> None:
        self.steps.append(step)

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Fit:
    """Six steps of fitting a line, of which one may go wrong."""

    def __init__(
        self, folder: Path, late: bool | None = None, every: int = 2, log_every: int = 100, device: str = "cpu"
    ) -> None:
        self.scene = torch.nn.Linear(2, 1, device=device)
        self.sink = Kept()
        keeper = CheckpointKeeper(folder / "ckpts", BackgroundWriter(), every)
        self.runner = LoopRunner([self.sink], self.scene, keeper, Reporter(False), log_every, None)
        if late is not None:
            self.runner.finite = FiniteCheck(late)
        self.optimizer = torch.optim.Adam(self.scene.parameters())
        self.bad: int | None = None
        self.bad_gradient = False
        self.begun: list[int] = []

    def step(self, index: int) -> StepResult:
        self.begun.append(index)
        ones = torch.ones_like(self.scene.weight[0])
        good, bad = self.scene(ones).square().sum(), 0.0 * ones[0]
        if index == self.bad and self.bad_gradient:
            good.register_hook(lambda slope: slope * torch.nan)
        elif index == self.bad:
            bad = torch.nan * ones[0]
        return StepResult(good + bad, {"good": good, "bad": bad, "share": 1.0})

    def run(self) -> None:
        self.runner.run(Loop("fit", 0, 6, self.step, self.optimizer, lambda index: None))


def test_a_snapshot_is_not_changed_by_later_steps(tmp_path):
    fit, gate = Fit(tmp_path), threading.Event()
    fit.run()
    weights, state = fit.scene.weight.clone(), fit.optimizer.state[fit.scene.weight]["exp_avg"].clone()
    fit.runner.keeper.writer.submit(gate.wait)
    fit.runner.save("fit", 6, fit.optimizer)
    fit.optimizer.step()
    gate.set()
    fit.runner.keeper.writer.finish()
    saved = load_checkpoint(tmp_path / "ckpts" / "last.ckpt")
    assert torch.equal(saved.model["weight"], weights) != torch.equal(fit.scene.weight, weights)
    assert torch.equal(saved.optimizer["state"][0]["exp_avg"], state)
    assert saved.optimizer["state"][0]["step"] == 6 and saved.optimizer["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.fixture
def slow(monkeypatch):
    def late(path: Path, content: Any, usual: Any = checkpoint.save_checkpoint) -> None:
        time.sleep(0.1)
        usual(path, content)

    monkeypatch.setattr(checkpoint, "save_checkpoint", late)


def test_whoever_is_interrupted_finds_the_checkpoint(tmp_path, slow):
    fit = Fit(tmp_path, every=100)
    fit.runner.should_stop = lambda: len(fit.begun) == 3
    with pytest.raises(Interrupted):
        fit.run()
    assert load_checkpoint(tmp_path / "ckpts" / "last.ckpt").step == 3


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(tmp_path):
    (tmp_path / "ckpts").write_text("in the way")
    for stop in (False, True):
        fit = Fit(tmp_path)
        fit.runner.should_stop = lambda stop=stop: stop
        with pytest.raises(InputError, match="ckpts.*cannot be written"):
            fit.run()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bad", [0, 2, 3, 5])
def test_nothing_that_is_not_finite_is_kept(tmp_path, slow, late, bad):
    fit = Fit(tmp_path, late)
    fit.bad = bad
    with pytest.raises(DivergenceError, match=rf"stage fit, step {bad}: the loss is not finite \(bad\); lower"):
        fit.run()
    saved = [load_checkpoint(path).step for path in (tmp_path / "ckpts").glob("fit-*.ckpt")]  # refuses what is not
    assert sorted(saved) == [step for step in (2, 4, 6) if step <= bad]
    assert fit.sink.steps == ([1] if bad > 0 else [])


@pytest.mark.parametrize(("late", "begun"), [(False, 3), (True, 4)])
def test_on_a_gpu_one_more_step_is_begun_and_none_where_the_step_is_logged(tmp_path, late, begun):
    fit = Fit(tmp_path, late, every=100)
    fit.bad, fit.bad_gradient = 2, True
    with pytest.raises(DivergenceError, match="step 2: a gradient is not finite"):
        fit.run()
    assert len(fit.begun) == begun
    assert bool(fit.scene.weight.isfinite().all()) is not late
    logged = Fit(tmp_path, late, every=100, log_every=1)
    logged.bad = 2
    with pytest.raises(DivergenceError, match="step 2"):
        logged.run()
    assert len(logged.begun) == 3 and logged.sink.steps == [1, 2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_only_a_gpu_is_asked_late(tmp_path, device):
    fit = Fit(tmp_path, every=100, device=device)
    assert fit.runner.finite.late is (device == "cuda")
    fit.bad = 2
    with pytest.raises(DivergenceError, match=r"step 2: the loss is not finite \(bad\)") as raised:
        fit.run()
    assert kind_of(raised.value) == "diverged"
