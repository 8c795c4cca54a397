"""Support and query views of several samples through one adapted UNet."""

from dataclasses import dataclass, replace
from typing import Any, Dict, Optional

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from nvsadapter_guidance.adapter import NVSAdapter
from nvsadapter_guidance.blocks import CONTEXT_KEY, ViewContext
from nvsadapter_guidance.controlnet import control_residuals
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.merged import register_merged
from nvsadapter_guidance.support_cache import SupportCache


@dataclass(frozen=True)
class Conditions:
    """Everything a sample is conditioned on, after condition dropout."""

    text: Float[Tensor, "B tokens dim"]
    image: Float[Tensor, "B 1 image_dim"]
    rays: Float[Tensor, "B views channels h w"]
    support_latents: Optional[Float[Tensor, "B 1 c h w"]]
    support_timesteps: Shaped[Tensor, "B"]
    control: Optional[Float[Tensor, "B control_views hint_channels height width"]]


@dataclass(frozen=True)
class Rows:
    """A network batch: support rows of all samples first, then query rows, sample by sample."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    image: Tensor
    rays: Tensor
    control: Optional[Tensor]


class MultiViewUNet(nn.Module):
    """A diffusers UNet with an adapter, seen as a denoiser of the query views of an object.

    Args:
        unet: the UNet that `adapter` was injected into.
        adapter: its adapter.
        controlnet: optional plain ControlNet; then every call needs `control_images`.
        control_scale: factor on the ControlNet's residuals.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        adapter: NVSAdapter,
        controlnet: Optional[ControlNetModel] = None,
        control_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.adapter = adapter
        self.controlnet = controlnet
        self.control_scale = control_scale
        register_merged(unet, ("time_weight", "time_bias"))  # filled by `lean_unet`

    def forward(
        self,
        query_latents: Float[Tensor, "B n c h w"],
        timesteps: Shaped[Tensor, "B"],
        text_context: Float[Tensor, "B tokens dim"],
        image_context: Float[Tensor, "B 1 image_dim"],
        ray_embedding: Float[Tensor, "B 1+n channels h w"],
        support_latents: Optional[Float[Tensor, "B 1 c h w"]] = None,
        ucg_mask: Optional[Bool[Tensor, "B"]] = None,
        unconditional_support_latents: Optional[Float[Tensor, "B 1 c h w"]] = None,
        support_cache: Optional[SupportCache] = None,
        control_images: Optional[Float[Tensor, "B 1+n hint_channels height width"]] = None,
        generator: Optional[torch.Generator] = None,
    ) -> Float[Tensor, "B n c h w"]:
        """The UNet's prediction for the query views. No argument is modified.

        Args:
            query_latents: noisy latents, already scaled for the network.
            timesteps: one per sample, shared by its views.
            text_context: text tokens, the same for all views of a sample.
            image_context: image token of the support view.
            ray_embedding: view 0 is the support view; from `RayEmbedding`.
            support_latents: clean latents of the support view; not needed with `support_cache`.
            ucg_mask: True for unconditional samples. They see zero rays and image token, noise for support latents
                and the last timestep for the support view; text, control and queries stay. None: all conditional.
            unconditional_support_latents: the noise of masked samples (other samples' entries are unused);
                drawn from `generator` when None.
            support_cache: result of `encode_support` for the same conditions and mask.
            control_images: only with a ControlNet.

        Raises:
            InputError: an argument is missing or its shape does not fit.
        """
        self._check(query_latents, ray_embedding, support_latents, support_cache, control_images)
        conditions = self._condition(
            text_context, image_context, ray_embedding, support_latents, ucg_mask, unconditional_support_latents,
            timesteps, control_images, generator,
        )  # fmt: skip
        num_query = query_latents.shape[1]
        rows = _query_rows(query_latents, timesteps, conditions)
        if support_cache is not None:
            return self._run(rows, 0, num_query, cached=support_cache.entries).unflatten(0, (-1, num_query))
        support = _support_rows(conditions)
        output = self._run(_cat_rows(support, rows), support.latents.shape[0], num_query)
        return output[support.latents.shape[0] :].unflatten(0, (-1, num_query))

    def encode_support(
        self,
        support_latents: Float[Tensor, "B 1 c h w"],
        text_context: Float[Tensor, "B tokens dim"],
        image_context: Float[Tensor, "B 1 image_dim"],
        ray_embedding: Float[Tensor, "B views channels h w"],
        ucg_mask: Optional[Bool[Tensor, "B"]] = None,
        unconditional_support_latents: Optional[Float[Tensor, "B 1 c h w"]] = None,
        control_images: Optional[Float[Tensor, "B control_views hint_channels height width"]] = None,
        generator: Optional[torch.Generator] = None,
    ) -> SupportCache:
        """Run the support view alone and keep what query views attend to.

        The support stream depends on nothing of the query views or the noise level, so the cache is exact for any
        number of views and any timestep. For unconditional samples it is exact for the frozen noise it was made with.
        Arguments are those of `forward`; of `ray_embedding` and `control_images` only view 0 is used.

        Raises:
            InputError: the adapter's support stream does depend on the queries ("support_xattn").
        """
        if not self.adapter.config.support_is_independent:
            raise InputError("adapter config: view_attn_mode 'support_xattn' mixes queries into the support; no cache")
        zeros = torch.zeros(support_latents.shape[0], dtype=torch.long, device=support_latents.device)
        conditions = self._condition(
            text_context, image_context, ray_embedding, support_latents, ucg_mask, unconditional_support_latents,
            zeros, control_images, generator,
        )  # fmt: skip
        record: Dict[str, Any] = {}
        self._run(_support_rows(conditions), support_latents.shape[0], 0, record=record)
        return SupportCache(record)

    def _condition(
        self,
        text: Tensor,
        image: Tensor,
        rays: Tensor,
        support_latents: Optional[Tensor],
        ucg_mask: Optional[Tensor],
        noise: Optional[Tensor],
        timesteps: Tensor,
        control: Optional[Tensor],
        generator: Optional[torch.Generator],
    ) -> Conditions:
        clean = Conditions(text, image, rays, support_latents, torch.zeros_like(timesteps), control)
        if ucg_mask is None:
            return clean
        mask = ucg_mask.to(rays.device)
        last = self.adapter.config.num_train_timesteps - 1
        if support_latents is not None:
            if noise is None:
                noise = _draw_like(support_latents, generator)
            support_latents = torch.where(mask[:, None, None, None, None], noise, support_latents)
        return replace(
            clean,
            image=image.masked_fill(mask[:, None, None], 0.0),
            rays=rays.masked_fill(mask[:, None, None, None, None], 0.0),
            support_latents=support_latents,
            support_timesteps=clean.support_timesteps.masked_fill(mask, last),
        )

    def _run(
        self,
        rows: Rows,
        support_rows: int,
        num_query: int,
        cached: Optional[Dict[str, Any]] = None,
        record: Optional[Dict[str, Any]] = None,
    ) -> Tensor:
        given, dtype = rows.latents.dtype, self.unet.conv_in.weight.dtype
        # Rays are embedded and convolved in their own precision, before anything is rounded to the network's.
        positional = {k: v.to(dtype) for k, v in self.adapter.positional_features(rows.rays).items()}
        rows = replace(rows, latents=rows.latents.to(dtype), text=rows.text.to(dtype), image=rows.image.to(dtype))
        views = ViewContext(support_rows, num_query, positional, rows.image, cached, record)
        down, middle = None, None
        if self.controlnet is not None and rows.control is not None:
            down, middle = control_residuals(
                self.controlnet, rows.latents, rows.timesteps, rows.text, rows.control, self.control_scale
            )
        return self.unet(
            rows.latents,
            rows.timesteps,
            encoder_hidden_states=rows.text,
            cross_attention_kwargs={CONTEXT_KEY: views},
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0].to(given)

    def _check(
        self,
        query_latents: Tensor,
        ray_embedding: Tensor,
        support_latents: Optional[Tensor],
        support_cache: Optional[SupportCache],
        control_images: Optional[Tensor],
    ) -> None:
        batch, num_query = query_latents.shape[:2]
        if support_latents is None and support_cache is None:
            raise InputError("support_latents: missing; give them or a support_cache")
        if support_cache is not None and support_cache.batch != batch:
            raise InputError(f"support_cache: holds {support_cache.batch} samples, the call has {batch}; expand it")
        if support_latents is not None and support_latents.shape[1] != 1:
            raise InputError(f"support_latents: hold {support_latents.shape[1]} views; the adapter takes one")
        if tuple(ray_embedding.shape[:2]) != (batch, 1 + num_query):
            found = tuple(ray_embedding.shape[:2])
            raise InputError(f"ray_embedding: is for {found} (samples, views); needed {(batch, 1 + num_query)}")
        if ray_embedding.shape[-2:] != query_latents.shape[-2:]:
            raise InputError("ray_embedding: its grid differs from the latents'; use the latents' size")
        if (control_images is None) != (self.controlnet is None):
            raise InputError("control_images: go together with a controlnet; give both or neither")


def _draw_like(reference: Tensor, generator: Optional[torch.Generator]) -> Tensor:
    device = reference.device if generator is None else generator.device
    noise = torch.randn(reference.shape, generator=generator, device=device, dtype=reference.dtype)
    return noise.to(reference.device)


def _support_rows(conditions: Conditions) -> Rows:
    latents, control = conditions.support_latents, conditions.control
    if latents is None:
        raise InputError("support_latents: missing; give them or a support_cache")
    return Rows(
        latents=latents[:, 0],
        timesteps=conditions.support_timesteps,
        text=conditions.text,
        image=conditions.image,
        rays=conditions.rays[:, 0],
        control=None if control is None else control[:, 0],
    )


def _query_rows(query_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Rows:
    num_query, control = query_latents.shape[1], conditions.control
    return Rows(
        latents=query_latents.flatten(0, 1),
        timesteps=timesteps.repeat_interleave(num_query, dim=0),
        text=conditions.text.repeat_interleave(num_query, dim=0),
        image=conditions.image.repeat_interleave(num_query, dim=0),
        rays=conditions.rays[:, 1:].flatten(0, 1),
        control=None if control is None else control[:, 1:].flatten(0, 1),
    )


def _cat_rows(first: Rows, second: Rows) -> Rows:
    control = None
    if first.control is not None and second.control is not None:
        control = torch.cat((first.control, second.control))
    return Rows(
        latents=torch.cat((first.latents, second.latents)),
        timesteps=torch.cat((first.timesteps, second.timesteps)),
        text=torch.cat((first.text, second.text)),
        image=torch.cat((first.image, second.image)),
        rays=torch.cat((first.rays, second.rays)),
        control=control,
    )
