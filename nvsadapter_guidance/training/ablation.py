"""Ablation of the adapter's parts: variants trained alike on one frozen base, and scored on unseen objects.

After the ablations of NVS-Adapter (Jeong et al. 2023, arXiv 2312.07315), with the embedded model's base in place of
Stable Diffusion and with short budgets: every variant starts from a fresh adapter, sees the same number of objects, and
is judged by the same views. Numbers compare variants with each other, not with the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nvsadapter_guidance.cameras import RELEASED, look_at, relative_to_support
from nvsadapter_guidance.evaluation.image_metrics import Lpips
from nvsadapter_guidance.evaluation.view_scores import score_views
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.training.adapter.network import parameter_groups
from nvsadapter_guidance.training.adapter.previews import sample_views
from nvsadapter_guidance.training.muon import Muon, split_parameters
from nvsadapter_guidance.training.pretrain import (
    FIRST_AND_LAST,
    DiffusionLoss,
    LatentBank,
    PooledBanks,
    random_losses,
)
from nvsadapter_guidance.training.views import ViewBank, composite

LOSS_ROUNDS = 4
"""How often every validation object enters the validation loss."""
_WHOLE_GROUPS = 12  # targets of the validation loss come in multiples of this, which 1, 2, 4 and 6 query views divide
_VIEWS_AT_ONCE = {"cuda": 512, "cpu": 40}


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    group: str
    """Which part of the adapter it varies."""
    change: str
    """What differs from the first variant."""
    configs: tuple[str, ...] = ()
    """Files of configs/adapter/ merged after the base."""
    seed: int = 0
    """Of the fresh adapter and of every draw; another one shows how much of a difference is chance."""


VARIANTS: dict[str, Variant] = {
    "base": Variant("reference", "as released: 4 query views, learned tokens, Plücker rays, image token"),
    "base_other_seed": Variant("reference", "the same from another seed", seed=1),
    "query_1": Variant("query views", "1", ("query_1",)),
    "query_2": Variant("query views", "2", ("query_2",)),
    "query_6": Variant("query views", "6", ("query_6",)),
    "emb_scale_0.5": Variant("learned tokens", "half as many", ("emb_scale_0.5",)),
    "emb_scale_2": Variant("learned tokens", "twice as many", ("emb_scale_2",)),
    "all_to_all": Variant("view consistency", "query views do not see each other", ("all_to_all",)),
    "all_to_all_attention": Variant("view consistency", "query views attend to each other", ("all_to_all_attention",)),
    "no_global_semantic": Variant("semantic conditioning", "no image token", ("no_global_semantic",)),
    "rays_origin_direction": Variant("camera", "origin and direction of rays", ("rays_origin_direction",)),
    "extrinsic": Variant("camera", "the relative pose", ("extrinsic",)),
    "full_finetune": Variant("what learns", "the UNet too", ("full_finetune",)),
}


@dataclass(frozen=True)
class Budget:
    """How long each variant trains, and how it is scored."""

    steps: int = 300
    batch_size: int = 64
    """Objects per step, whatever the number of query views."""
    lr: float = 2e-3
    """Of matrices (Muon); vectors and first and last layers take half of it (AdamW)."""
    base_lr_factor: float = 0.1
    """Factor on the rates of the base where it learns."""
    warmup: float = 0.05
    decay: float = 0.5
    """Shares of the steps over which the rate rises from and falls to zero."""
    condition_dropout: float = 0.1
    copies: int = 2
    """Augmented copies of every object."""
    sampling_steps: int = 20
    guidance_scale: float = 1.0


class VariantTraining:
    """Trains what is switched on in a model.

    Args:
        model: of `adapter.network.build_model`, on its device.
        data: views to train on, as latents of the model's autoencoder.
        seed: of every draw.
    """

    def __init__(self, model: NVSModel, data: LatentBank | PooledBanks, budget: Budget, seed: int) -> None:
        self.model, self.data, self.budget = model, data, budget
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.loss = DiffusionLoss(model)
        model.network.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        slow = {id(p) for p in parameter_groups(model)[1]}
        hidden, rest = split_parameters(model, FIRST_AND_LAST)

        def groups(params: list[Tensor], lr: float) -> list[dict[str, object]]:
            parts = [(lr, [p for p in params if id(p) not in slow])]
            parts.append((lr * budget.base_lr_factor, [p for p in params if id(p) in slow]))
            return [{"params": part, "lr": rate, "full_lr": rate} for rate, part in parts if part]

        fused = model.device.type == "cuda"
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(groups(hidden, budget.lr)),  # type: ignore[arg-type]
            torch.optim.AdamW(groups(rest, budget.lr / 2.0), betas=(0.9, 0.99), weight_decay=0.01, fused=fused),
        ]
        self.trained = [*hidden, *rest]

    def rate(self, step: int) -> float:
        """Factor on the learning rates at a step, counted from 0: up, constant, down to zero."""
        done = (step + 1) / self.budget.steps
        return min(1.0, done / max(self.budget.warmup, 1e-9), (1.0 - step / self.budget.steps) / self.budget.decay)

    def run(self, on_step: Callable[[], None] | None = None) -> float:
        """Train for the whole budget; returns the mean loss of the last tenth of the steps."""
        losses = []
        for step in range(self.budget.steps):
            losses.append(self._step(self.rate(step)))
            if on_step is not None:
                on_step()
        return float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())

    def _step(self, factor: float) -> Tensor:
        batch = self.data.draw(self.budget.batch_size, self.model.num_query, self.generator)
        losses = random_losses(self.loss, self.model, batch, self.generator, self.budget.condition_dropout)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss = losses.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["full_lr"] * factor
            optimiser.step()
        return loss.detach()


@torch.no_grad()
def score_variant(
    model: NVSModel, bank: ViewBank, budget: Budget, seed: int = 0, lpips: Lpips | None = None
) -> dict[str, float]:
    """Scores of sampled views of unseen objects, and the validation loss.

    View 0 of every object is the reference, all views at other azimuths are targets; each target is sampled once, in
    groups of as many views as the model was trained with, spread around the object.

    Args:
        bank: validation views, on the model's device.

    Returns:
        ``psnr`` (dB), ``ssim``, ``mask_iou`` and, with a backbone, ``lpips``: means over all targets of all objects;
        ``loss``: of the network's own target with the same objects and timesteps for every variant.
    """
    truth = composite(bank.rgba.float() / 255.0).movedim(-1, 2)
    targets = ((bank.azimuth[0] % 360.0).abs() > 1.0).nonzero()[:, 0]
    groups = view_groups(targets, model.num_query)
    at_once = max(1, _VIEWS_AT_ONCE[model.device.type] // (2 * groups.shape[0] * (1 + groups.shape[1])))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for objects in torch.arange(len(bank)).split(at_once):
        sampled = _sample_targets(model, bank, truth, objects.to(model.device), groups, budget, generator)
        for index, views in zip(objects.tolist(), sampled, strict=True):
            mask = bank.rgba[index, targets, ..., 3] > 127
            rows.append(score_views(views[targets].cpu(), truth[index, targets].cpu(), mask.cpu(), lpips))
    scores = {key: float(torch.cat([row[key] for row in rows]).double().mean()) for key in rows[0]}
    return {**scores, "loss": _validation_loss(model, bank, truth, targets, seed)}


def view_groups(targets: Int[Tensor, " t"], num_query: int) -> Int[Tensor, "g n"]:
    """Targets in groups, each spread over all of them; incomplete groups are filled up with the first targets."""
    groups = -(-len(targets) // num_query)
    order = torch.arange(groups * num_query, device=targets.device) % len(targets)
    return targets[order.unflatten(0, (num_query, groups)).T]


def _sample_targets(
    model: NVSModel,
    bank: ViewBank,
    truth: Float[Tensor, "N V 3 H W"],
    objects: Int[Tensor, " n"],
    groups: Int[Tensor, "g q"],
    budget: Budget,
    generator: torch.Generator,
) -> Float[Tensor, "n V 3 H W"]:
    """All targets of some objects, at their places among the views, in [0, 1]."""
    support = torch.zeros_like(groups[:, :1])
    views = torch.cat((support, groups), dim=1)
    azimuth, elevation, distance = (
        values[objects][:, views].flatten(0, 1) for values in (bank.azimuth, bank.elevation, bank.distance)
    )
    batch = {
        "support": truth[objects, 0].repeat_interleave(len(groups), 0) * 2.0 - 1.0,
        "c2w": relative_to_support(look_at(azimuth, elevation, distance, RELEASED)),
    }
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        sampled = sample_views(model, batch, budget.sampling_steps, budget.guidance_scale, generator)
    result = truth[objects].clone()
    result[:, groups.flatten()] = (
        (0.5 * sampled.float() + 0.5).clamp(0.0, 1.0).unflatten(0, (-1, len(groups))).flatten(1, 2)
    )
    return result


def _validation_loss(
    model: NVSModel, bank: ViewBank, truth: Float[Tensor, "N V 3 H W"], targets: Int[Tensor, " t"], seed: int
) -> float:
    """Mean loss over all objects, ``LOSS_ROUNDS`` times with other timesteps and noise.

    Timesteps belong to objects and noise to views, so that variants are given the same task however many query views
    they take at once.
    """
    device, loss, views = model.device, DiffusionLoss(model), bank.azimuth.shape[1]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.stack([model.encode(images * 2.0 - 1.0) for images in truth])
    groups = view_groups(targets[: len(targets) // _WHOLE_GROUPS * _WHOLE_GROUPS or None], model.num_query)
    chosen = torch.cat((torch.zeros_like(groups[:, :1]), groups), dim=1)
    strata = torch.randperm(LOSS_ROUNDS * len(bank), generator=generator) + 0.5
    timesteps = (strata / len(strata) * model.schedule.num_train_timesteps).long().to(device)
    total = []
    for steps in timesteps.split(len(bank)):
        noise = torch.randn((views, *latents.shape[2:]), generator=generator).to(device)
        for index, step in enumerate(steps):
            angles = (values[index][chosen] for values in (bank.azimuth, bank.elevation, bank.distance))
            image = (truth[index, :1] * 2.0 - 1.0).expand(len(groups), -1, -1, -1)
            nobody = torch.zeros(len(groups), dtype=torch.bool, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                rays = model.ray_embedding(*angles)
                same = step.expand(len(groups))
                total.append(loss(latents[index][chosen], noise[groups], same, rays, image, nobody))
    return float(torch.cat(total).mean())
