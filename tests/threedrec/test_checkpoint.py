"""Checkpoints: what is written is read back, and what is damaged is refused."""

import pytest
import torch

from threedrec.background_writer import BackgroundWriter
from threedrec.checkpoint import (
    Checkpoint,
    CheckpointKeeper,
    load_checkpoint,
    load_model,
    save_checkpoint,
    step_generator,
)
from threedrec.errors import InputError


def some_checkpoint(stage: str = "fit", step: int = 3, value: float = 1.0) -> Checkpoint:
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, value)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return Checkpoint(stage, step, ["views"], model.state_dict(), optimizer.state_dict(), {"scale": 2.0})


def test_round_trip(tmp_path):
    written = some_checkpoint()
    save_checkpoint(tmp_path / "a.ckpt", written)
    read = load_checkpoint(tmp_path / "a.ckpt")
    assert (read.stage, read.step, read.finished, read.extra) == ("fit", 3, ["views"], {"scale": 2.0})
    assert all(torch.equal(read.model[name], value) for name, value in written.model.items())
    assert read.optimizer["param_groups"] == written.optimizer["param_groups"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, some_checkpoint())
    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"resume: .*a\.ckpt: damaged"):
            load_checkpoint(path)


def test_foreign_and_missing_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="not a checkpoint of this program"):
        load_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_a_pickle_that_calls_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("code of a checkpoint was run",))

    torch.save({"format": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(InputError, match="damaged, or not a checkpoint"):
        load_checkpoint(tmp_path / "trap.ckpt")


def test_the_key_that_names_a_checkpoint_is_blamed(tmp_path):
    with pytest.raises(
        InputError, match=r"^system\.weights: .*no such checkpoint; give a file from a run's ckpts folder$"
    ):
        load_checkpoint(tmp_path / "none.ckpt", key="system.weights")
    (tmp_path / "bad.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"^system\.weights: .*damaged"):
        load_checkpoint(tmp_path / "bad.ckpt", key="system.weights")
    with pytest.raises(InputError, match=r"^system\.weights: x\.ckpt: "):
        load_model(torch.nn.Linear(3, 1), some_checkpoint(), "x.ckpt", "system.weights")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    save_checkpoint(tmp_path / "nan.ckpt", some_checkpoint(value=float("nan")))
    with pytest.raises(InputError, match=r"nan\.ckpt: `weight` holds values that are not finite"):
        load_checkpoint(tmp_path / "nan.ckpt")


def test_a_model_of_other_parts_is_refused():
    checkpoint = some_checkpoint()
    with pytest.raises(InputError, match="another shape of `weight`"):
        load_model(torch.nn.Linear(3, 1), checkpoint, "x.ckpt")
    with pytest.raises(InputError, match="has an unknown `bias`"):
        load_model(torch.nn.Linear(2, 1, bias=False), checkpoint, "x.ckpt")
    with pytest.raises(InputError, match="lacks `0.bias`"):
        load_model(torch.nn.Sequential(torch.nn.Linear(2, 1)), checkpoint, "x.ckpt")


def test_random_draws_depend_on_seed_stage_and_step_alone():
    def draw(*key) -> list[float]:
        return torch.rand(3, generator=step_generator(*key, device="cpu")).tolist()

    assert draw(0, "fit", 5) == draw(0, "fit", 5)
    assert len({tuple(draw(*key)) for key in [(0, "fit", 5), (1, "fit", 5), (0, "fine", 5), (0, "fit", 6)]}) == 4


def test_numbered_checkpoints_are_kept_as_asked(tmp_path):
    keeper = CheckpointKeeper(tmp_path, BackgroundWriter(), every_n_steps=2, save_top_k=2)
    for step in range(1, 9):
        if keeper.due(step):
            keeper.save(some_checkpoint("fit", step))
    keeper.writer.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fit-000006.ckpt", "fit-000008.ckpt", "last.ckpt"]
    assert load_checkpoint(keeper.last).step == 8


def test_a_checkpoint_is_due_when_the_last_is_old(tmp_path, monkeypatch):
    keeper = CheckpointKeeper(tmp_path, BackgroundWriter(), every_n_steps=100)
    assert not keeper.due(1)
    monkeypatch.setattr("threedrec.checkpoint.SECONDS_BETWEEN", 0.0)
    assert keeper.due(1)
