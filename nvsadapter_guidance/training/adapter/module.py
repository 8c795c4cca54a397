"""The training step, the optimiser and what a checkpoint holds, for Lightning's Trainer."""

import dataclasses
import hashlib
from typing import Any, Dict

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.state import check_tensors
from nvsadapter_guidance.training.adapter.config import OptimOptions, TrainConfig
from nvsadapter_guidance.training.adapter.ema import MovingAverage
from nvsadapter_guidance.training.adapter.network import parameter_groups, stored_names, trainable
from nvsadapter_guidance.training.adapter.objective import Draws, batch_loss, draw, latent_shape, sample_seed

VAL_SEED = 3
"""Offset of the seed of validation's noise, which is the same at every validation."""
FORMAT = "nvs-adapter-training-1"
"""Written into checkpoints, so that other files are told apart."""


def warmup_factor(step: int, optim: OptimOptions) -> float:
    """Factor on the learning rate of the update after `step` others: linear from `warmup_start` to 1, then constant."""
    if step >= optim.warmup_steps:
        return 1.0
    return optim.warmup_start + (1.0 - optim.warmup_start) * step / optim.warmup_steps


class AdapterTraining(LightningModule):
    """Trains what `network.select_trainable` has switched on.

    Attributes:
        samples_seen: how much of the stream of samples has been trained on, over all devices.
        average: moving average of what is trained; exists while fitting.
    """

    def __init__(self, model: NVSModel, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        if config.trainer.compile:
            model.network.compile()
        self.samples_seen = 0
        self.average: MovingAverage | None = None
        self._stored_average: Dict[str, Any] | None = None

    def configure_optimizers(self) -> Any:
        """AdamW with the adapter's and the base's rates, and the warm-up."""
        optim = self.config.optim
        adapter, base = parameter_groups(self.model)
        groups = [{"params": adapter, "lr": optim.lr}]
        if base:
            groups.append({"params": base, "lr": optim.lr * optim.base_lr_factor})
        optimiser = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, weight_decay=optim.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_factor(step, optim))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Dict[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of this device's part of the batch."""
        world = self.trainer.world_size
        # Layers that draw (none of Stable Diffusion's do) depend on the place in the stream, too.
        torch.manual_seed(sample_seed(self.config.seed, int(batch["number"][0])))
        loss = self._losses(batch, self.config.seed, self.config.optim.condition_dropout).mean()
        self.samples_seen += len(batch["number"]) * world
        self.log("train/loss", loss, sync_dist=world > 1, prog_bar=True)
        return loss

    def validation_step(self, batch: Dict[str, Any], batch_idx: int) -> None:
        """Loss of the moving average (put in place by `callbacks.ValidateAverage`) with the same noise every time."""
        loss = self._losses(batch, self.config.seed + VAL_SEED, dropout=0.0).mean()
        self.log("val/loss", loss, on_epoch=True, on_step=False, sync_dist=True, batch_size=len(batch["number"]))

    def on_fit_start(self) -> None:
        """Begin the average on the device, or go on with a checkpoint's."""
        self.average = MovingAverage(trainable(self.model), self.config.optim.ema_decay)
        if self._stored_average is not None:
            self.average.load_state_dict(self._stored_average)
            self._stored_average = None

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Update the weights, and then their average."""
        super().optimizer_step(*arguments, **options)
        if self.average is None:
            raise RuntimeError("optimizer_step was called before on_fit_start")
        self.average.update()

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Keep what was trained, and nothing that is read from other files."""
        network = self.model.network.state_dict()
        checkpoint["state_dict"] = {name: network[name] for name in stored_names(self.model)}
        checkpoint["format"] = FORMAT
        checkpoint["samples_seen"] = self.samples_seen
        checkpoint["config"] = dataclasses.asdict(self.config)
        checkpoint["model_config"] = dataclasses.asdict(self.model.config)
        checkpoint["base_fingerprint"] = base_fingerprint(self.model)
        if self.average is not None:
            checkpoint["ema"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Check that a checkpoint is of this run and fill in what it leaves out.

        Raises:
            InputError: it is of another model, base or seed.
        """
        source = "the checkpoint"
        if checkpoint.get("format") != FORMAT:
            raise InputError(f"{source}: was not written by adapter training; give a file of checkpoints/")
        if checkpoint["config"]["seed"] != self.config.seed:
            raise InputError(f"{source}: is of seed {checkpoint['config']['seed']}; resume with the same seed")
        for key, value in self.model.config.adapter.items():
            theirs = checkpoint["model_config"]["adapter"].get(key)
            if theirs != value:
                raise InputError(f"{source}: was trained with model.adapter.{key} {theirs}, now it is {value}")
        if checkpoint["base_fingerprint"] != base_fingerprint(self.model):
            raise InputError(f"{source}: was trained on other base weights; give the same ones (model.base_weights)")
        state = self.model.network.state_dict()
        check_tensors(checkpoint["state_dict"], {name: state[name] for name in stored_names(self.model)}, source)
        # Lightning loads strictly: the rest is what the model has already.
        stored = {f"model.network.{name}": value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = {**self.state_dict(), **stored}
        self.samples_seen = int(checkpoint["samples_seen"])
        self._stored_average = checkpoint["ema"]

    def _losses(self, batch: Dict[str, Any], seed: int, dropout: float) -> Tensor:
        num_query, steps = batch["queries"].shape[1], self.model.schedule.num_train_timesteps
        draws = draw(seed, batch["number"].tolist(), num_query, latent_shape(self.model), steps, dropout)
        moved = {field.name: getattr(draws, field.name).to(self.device) for field in dataclasses.fields(draws)}
        return batch_loss(self.model, batch, Draws(**moved))


def base_fingerprint(model: NVSModel) -> str:
    """A few frozen tensors' digest, which tells base models apart."""
    tensors = [model.text_context, *model.vae.encoder.conv_in.parameters()]
    if not any(value.requires_grad for value in model.network.unet.parameters()):
        tensors += list(model.network.unet.conv_in.parameters())
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
