"""The losses of one optimisation step: what the reference photograph, the guidance and sampled views ask for.

Every function returns terms by name, not yet weighted; `weigh` adds them up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from threedrec import losses
from threedrec.cameras import Cameras
from threedrec.confidence import Confidence, RaySampler
from threedrec.draws import host_generator
from threedrec.guidance.protocol import Guidance
from threedrec.image import SupportView
from threedrec.loop import StepResult
from threedrec.losses import LossConfig
from threedrec.rendering import RenderOutput
from threedrec.rendering.marching import Intervals
from threedrec.scene import Scene
from threedrec.schedules import value_at
from threedrec.warm_start import ViewSet, WarmStartConfig

Terms = dict[str, Tensor]


def weigh(terms: Mapping[str, Tensor], weights: LossConfig, step: int, prefix: str) -> StepResult:
    """Sum ``terms`` with the weights ``lambda_<name>`` in force at ``step``; log them as ``<prefix>_<name>``."""
    total: Tensor | float = 0.0
    for name, value in terms.items():
        total = total + value_at(getattr(weights, f"lambda_{name}"), step) * value
    return StepResult(torch.as_tensor(total), {f"{prefix}_{name}": value.detach() for name, value in terms.items()})


def joined(*results: StepResult) -> StepResult:
    """Add the losses of several results and keep all their terms."""
    terms: dict[str, Tensor | float] = {}
    for result in results:
        terms |= result.terms
    return StepResult(sum((result.loss for result in results[1:]), results[0].loss), terms)


class Sight(NamedTuple):
    """What of the photograph is looked at in a step, and along which samples."""

    pick: tuple[slice, slice]
    """Rows and columns of pixels."""
    rays_o: Float[Tensor, "1 h w 3"]
    rays_d: Float[Tensor, "1 h w 3"]
    intervals: Intervals


@dataclass
class Supervision:
    """Renders the scene under the losses of one config."""

    scene: Scene
    weights: LossConfig
    ambient_ratio_min: float = 0.5
    ray_noise: float = 0.0
    """See `SingleImageConfig.rays_noise_scale`."""
    ref_rays: int = 0
    """See `SystemConfig.ref_rays`."""

    def sight(self, support: SupportView, generator: torch.Generator) -> Sight:
        """Choose pixels of the photograph and sample their rays.

        With ``ref_rays`` a regular grid of about that many pixels is looked at, with a random phase; neighbours in it
        are neighbours for the smoothness of normals.
        """
        camera = support.camera.resized(*support.rgb.shape[:2])
        rays_o, rays_d = camera.rays(self.ray_noise, generator)
        pick = _subgrid(camera.height, camera.width, self.ref_rays, generator)
        rays_o, rays_d = (rays[(slice(None), *pick)] for rays in (rays_o, rays_d))
        intervals = self.scene.renderer.sample(rays_o.reshape(-1, 3), rays_d.reshape(-1, 3), generator)
        return Sight(pick, rays_o, rays_d, intervals)

    def reference(
        self, support: SupportView, step: int, generator: torch.Generator, sight: Sight | None = None
    ) -> StepResult:
        """The photograph's colour, mask, depth and normals against the scene's, and the surface's regularity.

        Args:
            sight: from :meth:`sight`; to count its samples the host waits for the device.
        """
        pick, rays_o, rays_d, intervals = sight or self.sight(support, generator)
        camera = support.camera
        out = self._render(camera, rays_o, rays_d, step, generator, "diffuse", 1.0, intervals)
        shape = rays_o.shape[:-1]
        mask = support.mask[pick].reshape(-1, 1)
        # The photograph is premultiplied over white; what shows through it is the scene's own background.
        rgb = support.rgb[pick].reshape(-1, 3) + (1.0 - mask) * (out.background - 1.0)
        terms = {"rgb": losses.rgb_loss(out.rgb, rgb), "mask": losses.mask_loss(out.opacity, mask)}
        terms |= self._reference_geometry(out, support, pick, step)
        terms |= self._regularity(out, shape, step)
        return weigh(terms, self.weights, step, "ref")

    def guidance(
        self,
        guidance: Guidance,
        cameras: Cameras,
        step: int,
        generator: torch.Generator,
        rays: tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W 3"]] | None = None,
    ) -> tuple[StepResult, Float[Tensor, "B H W 3"]]:
        """The guidance's judgement of random views, and the surface's regularity there; also return the views.

        Args:
            rays: of the cameras, where they are known.
        """
        rays_o, rays_d = rays or cameras.rays()
        draw = torch.rand((), generator=host_generator(generator)).item()
        ambient = self.ambient_ratio_min + (1.0 - self.ambient_ratio_min) * draw
        out = self._render(cameras, rays_o, rays_d, step, generator, shading=None, ambient_ratio=ambient)
        shape = rays_o.shape[:-1]
        rgb = out.rgb.reshape(*shape, 3)
        judged = guidance(rgb, cameras, step, generator)
        terms = {"sds": judged.loss, "sparsity": losses.sparsity_loss(out.opacity)}
        result = weigh(terms | self._regularity(out, shape, step), self.weights, step, "sds")
        result.terms |= {f"sds_{name}": value for name, value in judged.diagnostics.items()}
        return result, rgb.detach()

    def _render(
        self,
        cameras: Cameras,
        rays_o: Float[Tensor, "B H W 3"],
        rays_d: Float[Tensor, "B H W 3"],
        step: int,
        generator: torch.Generator,
        shading: str | None,
        ambient_ratio: float,
        intervals: Intervals | None = None,
    ) -> RenderOutput:
        weights = self.weights
        smooth = (weights.lambda_normal_smooth, weights.lambda_3d_normal_smooth)
        uses = (*smooth, weights.lambda_orient, weights.lambda_normal)
        lights = cameras.positions if cameras.light_positions is None else cameras.light_positions
        return self.scene.renderer(
            rays_o.reshape(-1, 3),
            rays_d.reshape(-1, 3),
            light_positions=lights[:, None, None].expand_as(rays_o).reshape(-1, 3),
            ambient_ratio=ambient_ratio,
            shading=shading,
            generator=generator,
            normals=any(value_at(weight, step) > 0 for weight in uses),
            intervals=intervals,
        )

    def _reference_geometry(
        self, out: RenderOutput, support: SupportView, pick: tuple[slice, slice], step: int
    ) -> Terms:
        """Depth and normals against the maps that lie beside the photograph, where a loss uses them.

        A normal map is in the OpenGL camera frame: right is red, up is green, towards the camera is blue.
        """
        weights, inside = self.weights, support.mask[pick].reshape(-1, 1) > 0.5
        terms: Terms = {}
        if support.depth is not None:
            depth = support.depth[pick].reshape(-1, 1)
            if value_at(weights.lambda_depth, step) > 0:
                terms["depth"] = losses.depth_loss(out.depth, depth, inside)
            if value_at(weights.lambda_depth_rel, step) > 0:
                terms["depth_rel"] = losses.depth_rel_loss(out.depth, depth, inside)
        if support.normal is not None and out.normal is not None and value_at(weights.lambda_normal, step) > 0:
            to_world = support.camera.c2w[0, :3, :3]
            normal = (2.0 * support.normal[pick].reshape(-1, 3) - 1.0) @ to_world.T
            terms["normal"] = losses.normal_loss(out.normal, normal, inside)
        return terms

    def _regularity(self, out: RenderOutput, shape: tuple[int, ...], step: int) -> Terms:
        """What is asked of any view: smooth normals that face it, and opacities near 0 or 1."""
        weights, samples = self.weights, out.samples
        terms: Terms = {"opaque": losses.opaque_loss(out.opacity)}
        if out.normal is not None and value_at(weights.lambda_normal_smooth, step) > 0:
            terms["normal_smooth"] = losses.normal_smooth_loss(out.normal_image.reshape(*shape, 3))
        if samples.normal is not None and value_at(weights.lambda_orient, step) > 0:
            terms["orient"] = losses.orient_loss(samples.weights, samples.normal, samples.dirs, out.opacity)
        if samples.normal is not None and samples.normal_perturbed is not None:
            terms["3d_normal_smooth"] = losses.normal_smooth_3d_loss(
                samples.normal[samples.perturbed], samples.normal_perturbed
            )
        return terms


def _subgrid(height: int, width: int, rays: int, generator: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a regular grid of about ``rays`` pixels with a random phase; all pixels for 0."""
    stride = max(1, round((height * width / rays) ** 0.5)) if rays > 0 else 1
    phase = torch.randint(stride, (2,), generator=host_generator(generator)).tolist()
    return slice(phase[0], None, stride), slice(phase[1], None, stride)


_JUDGED_FROM = 0.4
"""Share of the fit after which views are weighted by their agreement."""


class ViewFit:
    """The losses that fit a scene to sampled views and to the reference."""

    def __init__(
        self, scene: Scene, support: SupportView, views: ViewSet, confidence: Confidence, config: WarmStartConfig
    ) -> None:
        """Prepare the rays of all views; ``support`` should have their resolution or more."""
        self.scene, self.views, self.confidence, self.config = scene, views, confidence, config
        self.support = support
        self._view_rays = views.cameras.rays()
        self._reference_rays = support.camera.rays()
        self._draw_view = RaySampler(views.mask, config.foreground_share)
        self._draw_reference = RaySampler(support.mask[None], config.foreground_share)

    def __call__(self, progress: float, generator: torch.Generator) -> StepResult:
        """Losses of a fresh draw of rays.

        Args:
            progress: share of the fit that is done; agreement is judged when there is something to agree on.
            generator: source of the draw.
        """
        config = self.config
        n_reference = round(config.rays_per_step * config.reference_share)
        at = self._draw_view(config.rays_per_step - n_reference, generator)
        ref = self._draw_reference(n_reference, generator)
        rays_o, rays_d = (
            torch.cat([view[at], reference[ref]])
            for view, reference in zip(self._view_rays, self._reference_rays, strict=True)
        )
        # Sampled views are seen on white, whatever the scene's own background.
        white = torch.ones_like(rays_d)
        out = self.scene.renderer(rays_o, rays_d, shading="albedo", generator=generator, bg_color=white)
        count = len(at[0])
        terms: Terms = {}
        # The mean over no rays is not a number: a part that got none has no term.
        if count > 0:
            terms |= self._view_terms(out.rgb[:count], out.opacity[:count], at, judged=progress > _JUDGED_FROM)
        if n_reference > 0:
            rgb, mask = self.support.rgb[None][ref], self.support.mask[None][ref]
            error = losses.charbonnier(out.rgb[count:] - rgb).mean() + (out.opacity[count:] - mask).abs().mean()
            # At first all views shape the object alike; a reference that outweighs them is painted onto fog before it.
            terms["reference"] = error * min(1.0, 0.25 + progress)
        if progress > 0.5 and config.lambda_opaque > 0:
            terms["opaque"] = losses.opaque_loss(out.opacity)
        if config.lambda_normal_smooth > 0:
            terms["normal_smooth"] = self._roughness(rays_o, rays_d, out, generator)
        total = torch.stack([getattr(config, f"lambda_{name}") * value for name, value in terms.items()]).sum()
        return StepResult(total, {f"fit_{name}": value.detach() for name, value in terms.items()})

    def _view_terms(self, rgb: Tensor, opacity: Tensor, at: tuple[Tensor, Tensor, Tensor], judged: bool) -> Terms:
        """Colour and silhouette of sampled pixels ``at`` (view, y, x), weighted by how far each is believed."""
        color_error = losses.charbonnier(rgb - self.views.rgb[at])
        mask_error = (opacity - self.views.mask[at]).abs()[:, 0]
        self.confidence.update(*at, color_error)
        weight = self.views.prior[at[0]]
        if judged:
            weight = weight * self.confidence.weight(*at)
        weight = weight / weight.sum()
        return {"rgb": (weight * color_error).sum(), "mask": (weight * mask_error).sum()}

    def _roughness(self, rays_o: Tensor, rays_d: Tensor, out: RenderOutput, generator: torch.Generator) -> Tensor:
        """Mean change of the normal between visible surface points and neighbours 0.02 units away."""
        with torch.no_grad():
            # The rendered depth is a sum over the samples' weights; their mean lies on the surface.
            points = (rays_o + out.depth / out.opacity.clamp(min=0.5) * rays_d)[out.opacity[:, 0] > 0.5]
            noise = torch.randn(points.shape, generator=generator, device=points.device)
        if len(points) == 0:
            return out.opacity.sum() * 0.0
        normal = self.scene.geometry.normal(torch.cat([points, points + 0.02 * noise]))
        return (normal[: len(points)] - normal[len(points) :]).abs().mean()
