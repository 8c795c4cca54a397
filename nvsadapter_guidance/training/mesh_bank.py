"""Training views made from meshes on the training device itself, other ones for every seed: nothing is stored."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nvsadapter_guidance.training.mesh_dataset import ViewSet, object_generator, read_index, shape_of, training_views
from nvsadapter_guidance.training.render_meshes import DISTANCE, FOVY
from nvsadapter_guidance.training.render_torch import Surface, TorchMeshRenderer, surface_of
from nvsadapter_guidance.training.views import ViewBank

log = logging.getLogger(__name__)


def render_bank(
    meshes: Path,
    views: int,
    device: torch.device,
    seed: int,
    size: int = 128,
    supersample: int = 4,
    limit: int = 0,
    bent: bool = False,
) -> ViewBank:
    """Render every mesh that a folder's ``index.json`` names, as :func:`mesh_dataset.render_split` would.

    Args:
        meshes: folder of glTF files with an ``index.json``.
        views: of each object, a multiple of 5.
        device: to render and to keep the views on.
        seed: of the cameras and scales.
        size: side of a view in pixels.
        supersample: samples per pixel along each side.
        limit: the first few objects only; 0 for all.
        bent: show a shape that each mesh can be bent into (`vary_mesh`), drawn by the seed, in place of its own.

    Raises:
        InputError: the index or a mesh cannot be read.
    """
    names = [str(entry["file"]) for entry in read_index(meshes)[: limit or None]]
    sets = [training_views(object_generator(Path(name).stem, seed), views) for name in names]
    renderer = TorchMeshRenderer(size, supersample, device)
    rows = []
    shown = _shown(renderer, [meshes / name for name in names], sets, partial(shape_of, variant=int(bent), seed=seed))
    for index, view_set in enumerate(shown):
        rows.append(renderer.render_all(view_set.cameras))
        if (index + 1) % 100 == 0:
            log.info("rendered %d of %d objects", index + 1, len(names))
    azimuth, elevation = (torch.tensor([getattr(s, key) for s in sets]) for key in ("azimuth", "elevation"))
    distance = torch.full_like(azimuth, DISTANCE)
    stems = tuple(Path(name).stem for name in names)
    return ViewBank(torch.stack(rows), azimuth, elevation, distance, stems, FOVY).to(device)


def _shown(
    renderer: TorchMeshRenderer, paths: list[Path], sets: list[ViewSet], read_parts: Callable[[Path], list[Any]]
) -> Iterator[ViewSet]:
    """Put one mesh after another before the renderer, while threads read the next ones."""

    def read(path: Path, scale: float) -> Surface:
        return surface_of(read_parts(path), scale, renderer.device)

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(read, path, s.scale) for path, s in zip(paths[:8], sets[:8], strict=True)]
        for index, view_set in enumerate(sets):
            renderer.surface = waiting.pop(0).result()
            if index + 8 < len(sets):
                waiting.append(pool.submit(read, paths[index + 8], sets[index + 8].scale))
            yield view_set
