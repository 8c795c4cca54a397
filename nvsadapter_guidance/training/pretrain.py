"""Train a small multi-view model from nothing: base UNet, adapter, image encoder and constant text together.

Latents of augmented views are computed once and kept on the device, so that a step is the UNet and little else. Runs
are measured in seconds and resume from their last state; the learning rate is constant after a warm-up and falls to
zero over the last part of the last run ("warm-up, stable, decay").
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.training.augment import augment
from nvsadapter_guidance.training.muon import Muon, split_parameters
from nvsadapter_guidance.training.views import ViewBank, ViewBatch, composite, sample_batch

log = logging.getLogger(__name__)

FIRST_AND_LAST = ("conv_in", "conv_out", "time_embedding", "text_context", "patch_embedding", "position_embedding")
"""Parts of names of the parameters that AdamW trains although they are matrices."""
MOST_DROPPED_IN_A_ROW = 50
"""Steps without finite gradients after which a run gives up."""


@dataclass
class Pretraining:
    """How a run trains."""

    seconds: float = 60.0
    total_seconds: float = 60.0
    """Length of the whole training over all runs; decides where the decay begins."""
    decay: float = 0.3
    """Share of the whole training over which the learning rate falls to zero."""
    batch_size: int = 128
    lr: float = 1e-3
    adam_lr: float = 5e-4
    weight_decay: float = 0.02
    warmup_steps: int = 200
    condition_dropout: float = 0.1
    copies: int = 12
    """Augmented copies of every object kept as latents."""
    procedural_share: float = 0.15
    """Share of the objects of a batch that are procedural (when a second bank is given)."""
    ema_decay: float = 0.999
    seed: int = 0
    compile: bool = True
    compile_mode: str = "default"
    """Mode of ``torch.compile``; ``reduce-overhead`` replays CUDA graphs, which pays where launches are the limit."""


class LatentBank:
    """Augmented copies of a bank of views: latents of all of them, and the images themselves for use as support.

    Attributes:
        latents: ``(copies, objects, views, C, h, w)`` half precision.
        images: ``(copies, objects, views, 3, H, W)`` bytes.
        azimuth: ``(copies, objects, views)`` degrees, negated where a copy is mirrored.
    """

    @torch.no_grad()
    def __init__(self, model: NVSModel, bank: ViewBank, copies: int, generator: torch.Generator) -> None:
        self.bank = bank
        parts = [self._encode(model, o, generator) for _ in range(copies) for o in torch.arange(len(bank)).split(16)]
        self.latents, self.images, self.azimuth = (
            torch.cat([part[i] for part in parts]).unflatten(0, (copies, len(bank))) for i in range(3)
        )

    def _encode(self, model: NVSModel, objects: Int[Tensor, " n"], generator: torch.Generator) -> tuple[Tensor, ...]:
        bank = self.bank
        views = ViewBatch(bank.rgba[objects].float() / 255, *(a[objects] for a in _cameras(bank)))
        views = augment(views, generator)
        images = composite(views.rgba).movedim(-1, 2)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            latents = model.encode(images.flatten(0, 1) * 2.0 - 1.0).half()
        return latents.unflatten(0, images.shape[:2]), (images * 255).round().byte(), views.azimuth

    def draw(self, count: int, num_query: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw ``count`` samples of one support and ``num_query`` query views.

        Returns:
            ``latents (B, 1+n, C, h, w)``, ``azimuth``/``elevation``/``distance`` ``(B, 1+n)`` and the support image
            ``image (B, 3, H, W)`` in [-1, 1].
        """
        copy = torch.randint(len(self.latents), (count,), generator=generator, device=self.latents.device)
        index = sample_batch(self.bank, count, num_query, generator)
        views = torch.cat([index.support[:, None], index.queries], dim=1)
        rows = index.objects[:, None]
        image = self.images[copy, index.objects, index.support]
        return {
            "latents": self.latents[copy[:, None], rows, views].float(),
            "azimuth": self.azimuth[copy[:, None], rows, views],
            "elevation": self.bank.elevation[rows, views],
            "distance": self.bank.distance[rows, views],
            "image": image.float() / 127.5 - 1.0,
        }


class PooledBanks:
    """Several banks, of as many views as each has, drawn from as one: each by its share of all objects."""

    def __init__(self, banks: Sequence[LatentBank]) -> None:
        self.banks = banks

    def draw(self, count: int, num_query: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See :meth:`LatentBank.draw`; every batch takes the same number of samples from each bank."""
        objects = torch.tensor([len(bank.bank) for bank in self.banks]).cumsum(0)
        edges = [0, *(count * objects / objects[-1]).round().int().tolist()]
        sizes = [after - before for before, after in pairwise(edges)]
        parts = [bank.draw(s, num_query, generator) for bank, s in zip(self.banks, sizes, strict=True) if s]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _cameras(bank: ViewBank) -> tuple[Tensor, Tensor, Tensor]:
    return bank.azimuth, bank.elevation, bank.distance


def settle_gradients(parameters: Sequence[Tensor]) -> bool:
    """Average gradients over the processes of a distributed run; return whether all of them are finite.

    One overflow would reach every weight through the norm that clips gradients, so the caller leaves such a step out.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    if dist.is_initialized():
        # Halving what is sent costs a rounding that is small beside the noise of the gradient.
        sent = (flat / dist.get_world_size()).to(torch.bfloat16 if flat.is_cuda else flat.dtype)
        dist.all_reduce(sent)
        flat = sent.to(flat.dtype)
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])
    return bool(flat.isfinite().all())


def clock_of_first(seconds: float, device: torch.device) -> float:
    """The reading of the first process's clock, after the device has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if not dist.is_initialized():
        return seconds
    reading = torch.tensor([seconds], device=device, dtype=torch.float64)
    dist.broadcast(reading, 0)
    return float(reading)


def encode_banks(
    model: NVSModel, banks: list[ViewBank], config: Pretraining, pooled: int = 1
) -> list[LatentBank | PooledBanks]:
    """Latents of all banks: ``config.copies`` augmented copies of the first, one of every other.

    Where ``pooled`` is more than 1, so many banks at the front have copies each, and become one bank to draw from.
    """
    generator = torch.Generator(model.device).manual_seed(config.seed)
    data = [LatentBank(model, b, config.copies if i < pooled else 1, generator) for i, b in enumerate(banks)]
    return [PooledBanks(data[:pooled]) if pooled > 1 else data[0], *data[pooled:]]


class DiffusionLoss(nn.Module):
    """Mean squared error of the network's own target (noise or velocity) on the query views of a batch."""

    def __init__(self, model: NVSModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        latents: Float[Tensor, "B V C h w"],
        noise: Float[Tensor, "B n C h w"],
        timesteps: Int[Tensor, " B"],
        rays: Float[Tensor, "B V R h w"],
        image: Float[Tensor, "B 3 H W"],
        ucg_mask: Tensor,
    ) -> Float[Tensor, " B"]:
        """Return the loss of each sample."""
        model = self.model
        support, clean = latents[:, :1], latents[:, 1:]
        noisy = model.schedule.add_noise(clean, noise, timesteps)
        target = model.schedule.target(clean, noise, timesteps)
        prediction = model.network(
            noisy,
            timesteps,
            model.text_context.expand(len(latents), -1, -1),
            model.semantic_tokens(image),
            rays,
            support,
            ucg_mask=ucg_mask,
            unconditional_support_latents=model.unconditional_support_latents(support, None),
        )
        return F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3, 4))


def random_losses(
    loss: Callable[..., Tensor],
    model: NVSModel,
    batch: dict[str, Tensor],
    generator: torch.Generator,
    condition_dropout: float,
) -> Float[Tensor, " B"]:
    """Losses of a batch of :meth:`LatentBank.draw` at random timesteps, noise and unconditional samples.

    Args:
        loss: a `DiffusionLoss`, compiled or not; on CUDA it computes in bfloat16.
        generator: on the model's device.
        condition_dropout: share of samples that are unconditional.
    """
    device, latents = model.device, batch["latents"]
    count = len(latents)
    noise = torch.randn(latents[:, 1:].shape, generator=generator, device=device)
    # Stratified over the batch: the same distribution with less noise in the gradient.
    order = torch.randperm(count, generator=generator, device=device)
    strata = (order + torch.rand(count, generator=generator, device=device)) / count
    last = model.schedule.num_train_timesteps - 1
    timesteps = (strata * (last + 1)).long().clamp(max=last)
    ucg_mask = torch.rand(count, generator=generator, device=device) < condition_dropout
    rays = model.ray_embedding(batch["azimuth"], batch["elevation"], batch["distance"])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return loss(latents, noise, timesteps, rays, batch["image"], ucg_mask)


class Pretrainer:
    """The state of a run: model, average of its weights, optimisers, clock.

    Args:
        model: trained in place (its autoencoder stays as it is).
        data: the bank that counts first, an optional second one (procedural objects) after it.
    """

    def __init__(self, model: NVSModel, data: Sequence[LatentBank | PooledBanks], config: Pretraining) -> None:
        self.model, self.config = model.train().requires_grad_(True), config
        # Convolutions in half precision want channels last on a GPU, and would change the format around each of them.
        model.network.unet.to(memory_format=torch.channels_last)
        model.vae.requires_grad_(False).eval()
        model.network.adapter.freeze_inert()
        if model.text_context.shape[1] == 1:
            # Softmax over one token is constant: all that queries and keys would get is rounding noise.
            for block in model.network.adapter.block_adapters():
                attention = model.network.unet.get_submodule(block).attn2
                attention.to_q.requires_grad_(False)
                attention.to_k.requires_grad_(False)
        self.generator = torch.Generator(model.device).manual_seed(config.seed)
        self.data = data
        hidden, rest = split_parameters(model, FIRST_AND_LAST)
        decay, fused = config.weight_decay, model.device.type == "cuda"
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr=config.lr, weight_decay=decay),
            torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.99), weight_decay=decay, fused=fused),
        ]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.trained]
        self.loss = DiffusionLoss(model)
        self.compiled = torch.compile(self.loss, mode=config.compile_mode) if config.compile else self.loss
        self.step, self.elapsed = 0, 0.0
        self.dropped = self.dropped_in_a_row = 0
        self.history: list[tuple[int, float, float]] = []

    def learning_rate_factor(self) -> float:
        """Warm-up by steps, decay by the clock of the whole training."""
        remaining = 1.0 - self.elapsed / self.config.total_seconds
        return min(1.0, self.step / self.config.warmup_steps, max(remaining / self.config.decay, 0.0))

    def draw(self) -> dict[str, Tensor]:
        """Draw one batch from all banks."""
        count, n = self.config.batch_size, self.model.num_query
        share = self.config.procedural_share if len(self.data) > 1 else 0.0
        sizes = [count - round(count * share), round(count * share)]
        parts = [d.draw(s, n, self.generator) for d, s in zip(self.data, sizes, strict=False) if s]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def train_step(self) -> Tensor:
        """One update; returns the loss of the batch, still on the device."""
        loss = random_losses(
            self.compiled, self.model, self.draw(), self.generator, self.config.condition_dropout
        ).mean()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.step += 1
        if not settle_gradients(self.trained):
            self._drop_step()
            return loss.detach()
        self.dropped_in_a_row = 0
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        factor = self.learning_rate_factor()
        for optimiser, base in zip(self.optimisers, (self.config.lr, self.config.adam_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * factor
            optimiser.step()
        decay = min(self.config.ema_decay, self.step / (9 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.trained], 1.0 - decay)
        return loss.detach()

    def _drop_step(self) -> None:
        self.dropped += 1
        self.dropped_in_a_row += 1
        if self.dropped_in_a_row >= MOST_DROPPED_IN_A_ROW:
            raise RuntimeError(f"gradients were not finite {self.dropped_in_a_row} times in a row: lower lr")

    def run(self, seconds: float) -> None:
        """Train for ``seconds`` of wall clock (compilation is not counted)."""
        self.train_step()
        start, before = time.perf_counter(), self.elapsed
        losses: list[Tensor] = []
        while self.elapsed - before < seconds:
            losses.append(self.train_step())
            if self.step % 10 == 0:
                # Every process must leave the loop at the same step, so the first one's clock counts.
                self.elapsed = before + clock_of_first(time.perf_counter() - start, self.model.device)
            if self.step % 250 == 0:
                mean = float(torch.stack(losses).nanmean())
                self.history.append((self.step, self.elapsed, mean))
                log.info("step %d (%.0f s): loss %.4f, %d dropped", self.step, self.elapsed, mean, self.dropped)
                losses.clear()

    def swap_average(self) -> None:
        """Exchange the weights with their average (call again to go back)."""
        with torch.no_grad():
            for p, average in zip(self.trained, self.ema, strict=True):
                kept = p.detach().clone()
                p.copy_(average)
                average.copy_(kept)

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on: weights, their average, optimisers, clock."""
        return {
            "model": self.model.state_dict(),
            "scaling_factor": self.model.vae.config.scaling_factor,
            "ema": self.ema,
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "elapsed": self.elapsed,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned (the weights of the model are the caller's to load)."""
        for average, value in zip(self.ema, state["ema"], strict=True):
            average.copy_(value)
        for optimiser, value in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(value)
        self.step, self.elapsed = state["step"], state["elapsed"]
