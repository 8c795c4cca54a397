import logging
import os
from pathlib import Path

import pytest
import torch

from threedrec.checkpoint import Checkpoint, save_checkpoint
from threedrec.config_schema import ExperimentConfig
from threedrec.divergence import DivergenceError
from threedrec.errors import InputError
from threedrec.launch import _has_begun, choose_device, ensure_writable, newest_checkpoint, open_run
from threedrec.lookup import find_path, output_root, repository_root

as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def config(tmp_path):
    return ExperimentConfig(name="chair", tag="blue", exp_root_dir=str(tmp_path / "outputs"))


def checkpoint(run: Path, name="last.ckpt", age=0) -> Path:
    file = run / "ckpts" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def test_devices_without_cuda(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert choose_device("0") == torch.device("cpu")
    assert "no CUDA device here, using the CPU" in caplog.text


def test_devices_with_cuda(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("0") == torch.device("cuda:0")
    assert choose_device("cpu") == torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        assert choose_device("1,0") == torch.device("cuda:1")
    assert "one reconstruction uses one GPU" in caplog.text
    with pytest.raises(InputError, match="no GPU 2, this machine has 0 to 1"):
        choose_device("2")


@pytest.mark.parametrize("gpu", ["", "one", "-1", "0;1", "cuda"])
def test_gpu_that_is_none(gpu):
    with pytest.raises(InputError, match="expected auto, cpu, or ids"):
        choose_device(gpu)


def test_a_new_run_has_its_own_folder(config, tmp_path):
    first = open_run(config, "train")
    assert first.parent == tmp_path / "outputs" / "chair"
    assert first.name == f"blue{config.timestamp}" and len(config.timestamp) == len("@20260101-120000")
    again = ExperimentConfig(name="chair", tag="blue", exp_root_dir=config.exp_root_dir, timestamp=config.timestamp)
    assert open_run(again, "train") != first


def test_a_tag_is_one_folder(config):
    config.tag = "a/b"
    assert open_run(config, "train").parent.name == "chair"


def test_resume_auto_takes_the_newest_run_of_the_tag_that_has_a_checkpoint(config, tmp_path, caplog):
    root = tmp_path / "outputs" / "chair"
    checkpoint(root / "blue@20260101-120000")
    newest = checkpoint(root / "blue@20260102-120000")
    checkpoint(root / "blue@20260102-120000", "fit-000010.ckpt", age=5)
    (root / "blue@20260103-120000" / "ckpts").mkdir(parents=True)
    checkpoint(root / "blue@20260103-120000", ".last.ckpt.tmp.ckpt")
    checkpoint(root / "blue2@20260104-120000")
    assert newest_checkpoint(config) == newest
    config.resume = "auto"
    assert open_run(config, "train") == root / "blue@20260102-120000"
    assert config.resume == str(newest) and config.timestamp == "@20260102-120000"


def begin(run: Path) -> Path:
    """Make what a run leaves that is killed before its first checkpoint."""
    (run / "configs").mkdir(parents=True)
    (run / "configs" / "parsed.yaml").write_text("{}")
    return run


def test_resume_auto_begins_the_newest_run_again_when_it_was_killed_early(config, tmp_path):
    root = tmp_path / "outputs" / "chair"
    older = checkpoint(root / "blue@20260101-120000")
    newest = begin(root / "blue@20260102-120000")
    (root / "blue@20260103-120000").mkdir()
    config.resume = "auto"
    assert open_run(config, "train") == newest
    assert config.resume is None and config.timestamp == "@20260102-120000" and config.trial_dir == str(newest)
    # There is nothing in it to look at.
    config.resume, config.trial_dir = "auto", None
    assert open_run(config, "export") == root / "blue@20260101-120000" and config.resume == str(older)


def test_resume_auto_begins_a_named_folder_again(config, tmp_path):
    config.trial_dir, config.resume = str(begin(tmp_path / "mine")), "auto"
    assert open_run(config, "train") == tmp_path / "mine" and config.resume is None


def test_without_timestamp_a_folder_is_used_once(config, tmp_path):
    config.use_timestamp = False
    run = open_run(config, "train")
    assert run == tmp_path / "outputs" / "chair" / "blue"
    begin(run)
    config.trial_dir = None
    with pytest.raises(InputError, match="holds a run already; add resume=auto"):
        open_run(config, "train")
    config.resume = "auto"
    assert open_run(config, "train") == run


def test_resume_auto_with_nothing_to_resume_starts_afresh(config, caplog):
    config.resume = "auto"
    with caplog.at_level(logging.INFO):
        run = open_run(config, "train")
    assert config.resume is None and run.is_dir()
    assert "nothing to resume" in caplog.text


def test_other_modes_need_a_checkpoint(config, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint to export under .*blue@\*; give resume=FILE"):
        open_run(config, "export")
    config.resume = None
    run = tmp_path / "outputs" / "chair" / "blue@20260101-120000"
    checkpoint(run)
    assert open_run(config, "export") == run


def test_resume_from_a_file_goes_on_in_its_folder(config, tmp_path):
    file = checkpoint(tmp_path / "elsewhere")
    config.resume = str(file)
    assert open_run(config, "train") == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("name", "words"), [("no.ckpt", "no such checkpoint"), ("x" * 300, "no such"), (".", "is a folder")]
)
def test_resume_from_what_is_no_file(config, tmp_path, name, words):
    config.resume = str(tmp_path / name)
    with pytest.raises(InputError, match=words):
        open_run(config, "train")


def test_a_named_folder_is_used_once(config, tmp_path):
    config.trial_dir = str(tmp_path / "mine")
    assert open_run(config, "train") == tmp_path / "mine"
    begin(tmp_path / "mine")
    with pytest.raises(InputError, match="holds a run already; add resume=auto"):
        open_run(config, "train")
    file = checkpoint(tmp_path / "mine")
    config.resume = "auto"
    assert open_run(config, "train") == tmp_path / "mine"
    assert config.resume == str(file)


def test_output_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"{tmp_path}/file/run: cannot be written"):
        ensure_writable(tmp_path / "file" / "run")


@as_root
def test_read_only_output_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="permission denied"):
        ensure_writable(tmp_path / "run")


def test_writable_probe_leaves_nothing(tmp_path):
    ensure_writable(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_lookup_from_the_folder_below(repository, monkeypatch, tmp_path):
    monkeypatch.chdir(repository / "3drec")
    assert repository_root() == repository
    assert find_path("./configs/nvsadapter.yaml") == repository / "configs" / "nvsadapter.yaml"
    assert find_path("no/such.png") == Path("no/such.png")
    assert output_root("./outputs") == repository / "outputs"
    monkeypatch.chdir(tmp_path)
    assert output_root("./outputs") == Path("outputs")
    (tmp_path / "LICENSE").write_text("")
    assert find_path("LICENSE") == Path("LICENSE")


def test_a_run_has_begun_when_it_diverged_or_left_the_checkpoint_of_a_stage(tmp_path):
    (tmp_path / "ckpts").mkdir()
    refused, diverged = InputError("guidance: no"), DivergenceError("stage fit, step 0: the loss is not finite")
    assert _has_begun(tmp_path, diverged) and not _has_begun(tmp_path, refused)
    save_checkpoint(tmp_path / "ckpts" / "last.ckpt", Checkpoint("prepare", 0))
    assert not _has_begun(tmp_path, refused)
    save_checkpoint(tmp_path / "ckpts" / "fit-000010.ckpt", Checkpoint("fit", 10))
    assert _has_begun(tmp_path, refused)
    (tmp_path / "ckpts" / "fit-000010.ckpt").write_bytes(b"damaged")
    assert _has_begun(tmp_path, refused)
