"""Whole runs of adapter training on the tiny model: the loss falls, runs resume exactly, checkpoints become weights."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file
from tiny_checkpoints import LDM_UNET, LDM_VAE, ldm_tensors, released_tensors
from tiny_training import SMALL, tiny_base, tiny_run
from torch.utils.data import default_collate

from nvsadapter_guidance.adapter import WEIGHTS_NAME
from nvsadapter_guidance.checkpoints import families
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX
from nvsadapter_guidance.controlnet import build_controlnet
from nvsadapter_guidance.conversion import controlnet_key_map
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.training.adapter.callbacks import StepCheckpoint, checkpoints
from nvsadapter_guidance.training.adapter.config_files import load_config
from nvsadapter_guidance.training.adapter.export import export_checkpoint, network_tensors, read_checkpoint
from nvsadapter_guidance.training.adapter.network import build_model, trainable
from nvsadapter_guidance.training.adapter.objective import batch_loss, draw, latent_shape
from nvsadapter_guidance.training.adapter.run import train
from nvsadapter_guidance.training.adapter.samples import NumberedViews
from nvsadapter_guidance.training.adapter.synthetic import SyntheticViews
from nvsadapter_guidance.weights import load_model


def metrics(folder: Path, key: str = "train/loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def same_state(first: Path, second: Path) -> bool:
    """Weights, average, optimiser, place in the stream."""
    a, b = read_checkpoint(first), read_checkpoint(second)
    assert a["global_step"] == b["global_step"] and a["samples_seen"] == b["samples_seen"]
    assert a["ema"]["updates"] == b["ema"]["updates"] and a["lr_schedulers"] == b["lr_schedulers"]
    pairs = [(a["state_dict"], b["state_dict"]), (a["ema"]["tensors"], b["ema"]["tensors"])]
    for one, other in zip(a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values()):
        pairs.append((one, other))
    return all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


def fixed_loss(model: NVSModel) -> float:
    """Loss on sixteen samples that no run sees, always with the same noise."""
    far = range(10**6, 10**6 + 16)
    views = NumberedViews(SyntheticViews(8, 2, 32), 0)
    batch = default_collate([views[(number % 8, number)] for number in far])
    with torch.no_grad():
        return batch_loss(model, batch, draw(0, far, 2, latent_shape(model), 1000, 0.0)).mean().item()


def test_the_loss_falls(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path, "trainer.max_steps=40", "trainer.log_every_steps=10", "optim.lr=1e-2", "trainer.val_every_steps=20",
        "trainer.checkpoint_every_steps=1000", "trainer.images_every_steps=40", "trainer.images_sampling_steps=2",
    )  # fmt: skip
    model = build_model(config.model, config.seed)
    before = fixed_loss(model)
    folder = train(config)
    checkpoint = read_checkpoint(checkpoints(folder)[-1])
    for use_ema in (False, True):
        model.network.load_state_dict(network_tensors(checkpoint, use_ema), strict=False)
        assert fixed_loss(model) < 0.6 * before
    assert len(metrics(folder)) == 4 and metrics(folder, "samples")[-1] == 160
    first, last = metrics(folder, "val/loss")
    assert last < first
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {str(path) for path in files if path.parts[0] != "tensorboard"} == {
        "config.yaml", "metrics.jsonl", "checkpoints/step_00000040.ckpt", "images/step_00000040.jpg",
        "adapter/config.json", "adapter/model.safetensors",
    }  # fmt: skip
    assert load_config([folder / "config.yaml"]) == config


def test_only_the_adapter_changes_and_inert_layers_stay(tmp_path: Path) -> None:
    folder = train(tiny_run(tmp_path, "trainer.max_steps=2"))
    fresh = build_model(tiny_run(tmp_path).model, 0)
    stored, start = read_checkpoint(checkpoints(folder)[-1])["state_dict"], fresh.network.state_dict()
    assert set(stored) == {name for name in start if name.startswith("adapter.")}
    changed = {name for name in stored if not torch.equal(stored[name], start[name])}
    assert changed == set(trainable(fresh))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, accumulate: int) -> None:
    options = ("trainer.max_steps=6", f"trainer.accumulate_grad_batches={accumulate}", "trainer.val_every_steps=2")
    whole = train(tiny_run(tmp_path, *options, name="whole"))
    for middle in (2, 4):
        again = tiny_run(tmp_path, *options, name=f"from_{middle}")
        folder = train(again, resume=str(checkpoints(whole)[middle // 2 - 1]))
        assert [path.name for path in checkpoints(folder)][0] == f"step_{middle + 2:08d}.ckpt"
        assert same_state(checkpoints(whole)[-1], checkpoints(folder)[-1])
    assert metrics(whole) == [*metrics(whole)[:2], *metrics(folder)]


def _train_and_die(config: Any, step: int) -> None:
    original = StepCheckpoint.on_train_batch_end

    def deadly(self: StepCheckpoint, trainer: Any, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    StepCheckpoint.on_train_batch_end = deadly  # type: ignore[method-assign]
    train(config)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    options = ("trainer.max_steps=6", "optim.condition_dropout=0.3", "trainer.log_every_steps=1")
    whole = train(tiny_run(tmp_path, *options, name="whole"))
    config = tiny_run(tmp_path, *options, name="killed")
    process = multiprocessing.get_context("fork").Process(target=_train_and_die, args=(config, 5))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "killed")] == ["step_00000002.ckpt", "step_00000004.ckpt"]
    log = tmp_path / "killed" / "metrics.jsonl"
    assert len(metrics(log.parent)) == 5
    # As if it had died in the middle of a line.
    log.write_text(log.read_text() + '{"step": 6, "tra')
    killed = train(config, resume="auto")
    assert same_state(checkpoints(whole)[-1], checkpoints(killed)[-1])
    # Steps that were made twice are logged once.
    assert metrics(killed) == metrics(whole) and metrics(killed, "step") == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_told_to_stop_writes_a_checkpoint_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("trainer.max_steps=5", "trainer.checkpoint_every_steps=100")
    whole = train(tiny_run(tmp_path, *options, name="whole"))
    config = tiny_run(tmp_path, *options, name="stopped")
    original = StepCheckpoint.on_train_batch_end

    def interrupted(self: StepCheckpoint, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self, trainer, *arguments)

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert signal.getsignal(signal.SIGUSR1) == before
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["step_00000003.ckpt"]
    assert not (tmp_path / "stopped" / "adapter").exists()
    train(config, resume="auto")
    assert same_state(checkpoints(whole)[-1], checkpoints(tmp_path / "stopped")[-1])


def test_old_checkpoints_go(tmp_path: Path) -> None:
    folder = train(tiny_run(tmp_path, "trainer.max_steps=6", "trainer.checkpoint_keep=2"))
    assert [path.name for path in checkpoints(folder)] == ["step_00000004.ckpt", "step_00000006.ckpt"]


def test_what_cannot_be_resumed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(tiny_run(tmp_path, "trainer.max_steps=2"))
    newest = str(checkpoints(folder)[-1])
    other = ("trainer.max_steps=3",)
    broken, empty = tmp_path / "broken.ckpt", tmp_path / "empty"
    broken.write_bytes(Path(newest).read_bytes()[:1000])
    empty.mkdir()
    cases = (
        (other, "run", None, "holds a run already"),
        ((*other, "seed=1"), "b", newest, "resume with the same seed"),
        (
            (*other, "model.adapter.query_composer_mode=null"),
            "c",
            newest,
            "query_composer_mode all_to_all_attention, now it is None",
        ),
        (other, "d", str(broken), "no whole checkpoint"),
        (other, "e", str(empty), "holds no checkpoints"),
        (other, "f", str(tmp_path / "none.ckpt"), "no such file"),
    )
    for options, name, resume, message in cases:
        with pytest.raises(InputError, match=message):
            train(tiny_run(tmp_path, *options, name=name), resume)
    # In every process of several, or the others would wait for the first.
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(InputError, match="holds a run already"):
        train(tiny_run(tmp_path, *other))
    monkeypatch.undo()
    # Other base weights under the same adapter.
    tensors = read_checkpoint(Path(newest))
    tensors["base_fingerprint"] = "0"
    torch.save(tensors, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="other base weights"):
        train(tiny_run(tmp_path, *other, name="g"), str(tmp_path / "other.ckpt"))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"format": Path("/")}, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match="no whole checkpoint"):
        read_checkpoint(tmp_path / "bad.ckpt")


def test_the_written_model_is_the_average(tmp_path: Path) -> None:
    folder = train(tiny_run(tmp_path, "trainer.max_steps=4"))
    checkpoint = checkpoints(folder)[-1]
    raw = export_checkpoint(checkpoint, tmp_path / "raw", use_ema=False)
    average, last = NVSModel.load(folder / "adapter"), NVSModel.load(raw)
    tensors = read_checkpoint(checkpoint)
    for model, use_ema in ((average, True), (last, False)):
        wanted = network_tensors(tensors, use_ema)
        found = model.network.state_dict()
        # Model folders hold eight bits.
        assert all(torch.allclose(found[name], wanted[name], atol=0.02, rtol=0.02) for name in wanted)
    assert load_model(str(folder / "adapter")).num_query == 2


@pytest.fixture
def stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Tiny files in the layouts of Stable Diffusion 2.1 and OpenCLIP, and a family that they are of."""
    small = replace(families.FAMILIES["sd21"], ldm_unet=LDM_UNET)
    monkeypatch.setitem(families.FAMILIES, "sd21", small)
    monkeypatch.setattr(families, "LDM_VAE", {**LDM_VAE, "resolution": 256})
    base, tower = tmp_path / "v2.safetensors", tmp_path / "open_clip.safetensors"
    save_file({name: value.contiguous() for name, value in ldm_tensors().items()}, base)
    released = released_tensors()
    vision = {k.removeprefix(IMAGE_PREFIX): v.contiguous() for k, v in released.items() if k.startswith(IMAGE_PREFIX)}
    save_file(vision, tower)
    return {"base": str(base), "image_encoder": str(tower)}


def sd_run(tmp_path: Path, files: dict[str, str], *overrides: str, name: str) -> Any:
    words = [
        *SMALL, "model.random_weights=false", "model.base=sd21", f"model.base_weights={files['base']}",
        f"model.image_encoder={files['image_encoder']}", "model.adapter.num_query=1", "data.batch_size=1",
        "model.adapter.image_context_dim=48", "trainer.max_steps=2", f"output={tmp_path}", f"name={name}",
    ]  # fmt: skip
    return load_config([], [*words, *overrides])


def test_a_checkpoint_becomes_an_adapter_folder_that_loads(tmp_path: Path, stable_diffusion: dict[str, str]) -> None:
    folder = train(sd_run(tmp_path, stable_diffusion, name="sd"))
    checkpoint = read_checkpoint(checkpoints(folder)[-1])
    stored = load_file(folder / "adapter" / WEIGHTS_NAME)
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        WEIGHTS_NAME,
        "nvs_adapter.json",
        "nvs_model.json",
    }
    model = load_model(str(folder / "adapter"), **stable_diffusion)
    found = model.network.state_dict()
    for name, value in network_tensors(checkpoint, use_ema=True).items():
        assert torch.equal(found[name], value) and torch.equal(stored[name.removeprefix("adapter.")], value)
    assert not any(name.startswith(("vae", "image_encoder", "network.unet")) for name in checkpoint["state_dict"])
    # Training goes on from it with other options of training, not of the adapter.
    more = sd_run(tmp_path, stable_diffusion, f"model.adapter_from={folder / 'adapter'}", name="more")
    train(more)
    other = sd_run(
        tmp_path, stable_diffusion, f"model.adapter_from={folder / 'adapter'}",
        "model.adapter.ray_embedding=extrinsic", name="other",
    )  # fmt: skip
    with pytest.raises(InputError, match="was trained with ray_embedding plucker"):
        train(other)


def test_a_fine_tuned_base_becomes_a_pipeline_that_loads(tmp_path: Path, stable_diffusion: dict[str, str]) -> None:
    folder = train(
        sd_run(tmp_path, stable_diffusion, "model.full_finetune=true", "optim.base_lr_factor=1", name="full")
    )
    wanted = network_tensors(read_checkpoint(checkpoints(folder)[-1]), use_ema=True)
    found = load_model(str(folder / "adapter")).network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    plain = UNet2DConditionModel.from_pretrained(folder / "adapter" / "unet").state_dict()
    assert all(
        torch.equal(plain[name.removeprefix("unet.")], wanted[name]) for name in wanted if name.startswith("unet.")
    )


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_frozen_controlnet_takes_part(
    tmp_path: Path, stable_diffusion: dict[str, str], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setitem(families.FAMILIES, "sd15", replace(families.FAMILIES["sd15"], ldm_unet=LDM_UNET))
    torch.manual_seed(0)
    control = build_controlnet(UNet2DConditionModel.from_config(families.FAMILIES["sd15"].unet))
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    weights = tmp_path / "control"
    if layout == "diffusers":
        control.save_pretrained(weights)
    else:
        names = controlnet_key_map(control)
        ldm = {f"control_model.{names[name]}": value for name, value in control.state_dict().items()}
        weights = tmp_path / "control.safetensors"
        save_file({**ldm, "model.diffusion_model.out.0.bias": torch.zeros(1)}, weights)
    options = ("model.base=sd15", "model.controlnet=true", "trainer.max_steps=1", "trainer.checkpoint_every_steps=1")
    config = sd_run(tmp_path, stable_diffusion, *options, f"model.controlnet_weights={weights}", name="control_run")
    model = build_model(config.model, 0)
    assert model.network.controlnet is not None
    loaded = model.network.controlnet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in control.state_dict().items())
    folder = train(config)
    assert not any("controlnet" in name for name in read_checkpoint(checkpoints(folder)[-1])["state_dict"])
    # The control images count.
    views = NumberedViews(SyntheticViews(2, 1, 256, control=True), 0)
    batch, draws = default_collate([views[(0, 0)]]), draw(0, [0], 1, latent_shape(model), 1000, 0.0)
    with torch.no_grad():
        losses = [batch_loss(model, {**batch, "control": factor * batch["control"]}, draws) for factor in (1.0, 0.0)]
    assert not torch.equal(*losses)


def test_missing_weights_are_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "model.random_weights=false", f"output={tmp_path / 'out'}"]
    with pytest.raises(InputError, match="3drec weights download sd21"):
        train(load_config([], words))
    assert not (tmp_path / "out").exists()


def test_half_precision_trains(tmp_path: Path) -> None:
    folder = train(tiny_run(tmp_path, "trainer.max_steps=4", "trainer.precision=bf16-mixed"))
    stored = read_checkpoint(checkpoints(folder)[-1])["state_dict"]
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in stored.values())


@pytest.mark.gpu
def test_a_gpu_learns_in_sixteen_bits(tmp_path: Path) -> None:
    options = ("trainer.accelerator=gpu", "trainer.devices=0,", "trainer.precision=16-mixed", "trainer.max_steps=40")
    losses = metrics(train(tiny_run(tmp_path, *options, "optim.lr=1e-2")))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    wild = ("optim.lr=1e30", "optim.warmup_steps=0", "optim.gradient_clip_norm=0")
    with pytest.raises(InputError, match=r"lower optim\.lr"):
        train(tiny_run(tmp_path, "trainer.max_steps=20", *wild))


def start(repository: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(repository / "main.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_the_command_trains_and_names_mistakes(repository: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    words = [*SMALL, f"model.base={base}", "model.adapter.query_composer_mode=all_to_all", "trainer.max_steps=2"]
    config = str(repository / "configs" / "adapter" / "base.yaml")
    done = start(repository, "-b", config, "-n", "x", "-l", str(tmp_path), "--", *words, "trainer.devices=0,")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x" / "adapter" / "model.safetensors").is_file()
    wrong = start(repository, "-b", config, "--", "optim.learning_rate=1")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: 'optim.learning_rate=1': unknown key") and wrong.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_devices_learn_what_one_does(repository: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    config = str(repository / "configs" / "adapter" / "base.yaml")
    words = [*SMALL, f"model.base={base}", "trainer.max_steps=6", "trainer.val_every_steps=6"]
    # A batch of two is wholly unconditional, and drawn again, more often than one of four.
    words += ["optim.condition_dropout=0"]
    for devices, batch in ((1, 4), (2, 2)):
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(devices))
        place = ["-b", config, "-n", str(devices), "-l", str(tmp_path), "--", *words]
        done = start(
            repository, *place, f"trainer.devices={devices}", f"data.batch_size={batch}",
            launcher=launcher if devices > 1 else (),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "1") == pytest.approx(metrics(tmp_path / "2"), abs=2e-5)
    assert metrics(tmp_path / "1", "val/loss") == pytest.approx(metrics(tmp_path / "2", "val/loss"), abs=2e-5)
    one, two = (read_checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("1", "2"))
    assert one["samples_seen"] == two["samples_seen"] == 24
    assert all(torch.allclose(one["state_dict"][k], two["state_dict"][k], atol=1e-4) for k in one["state_dict"])
