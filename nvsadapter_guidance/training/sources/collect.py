"""Objects of the sources written as a folder of training meshes: ``.glb`` files and an ``index.json``."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_files import find_meshes, load_parts
from nvsadapter_guidance.training.render_meshes import texture_image
from nvsadapter_guidance.training.sources.objects import (
    SourceObject,
    Tidying,
    extents,
    mean_colour,
    plain_part,
    tidy,
)


@dataclass
class Lookalikes:
    """Shapes seen so far, to leave out what looks like one of them.

    Two objects look alike where their bounding boxes (each scaled to fit the same ball) and their spreads of surface
    differ by less than ``tolerance`` of the ball's diameter, and their mean colours by less than ``colour``.
    """

    tolerance: float = 0.012
    colour: float = 0.08
    _shapes: list[Float[np.ndarray, "9"]] = field(default_factory=list)
    _colours: list[Float[np.ndarray, "3"]] = field(default_factory=list)

    def is_new(self, parts: Sequence[Any]) -> bool:
        """Whether parts (tidied) look like nothing seen before; they count as seen from then on."""
        shape, colour = describe(parts)
        for other, other_colour in zip(self._shapes, self._colours, strict=True):
            same_shape = np.abs(shape - other).max() < self.tolerance
            # Comparisons with NaN are false: such an entry stands for its shape in any colour.
            if same_shape and not np.abs(colour - other_colour).max() >= self.colour:
                return False
        self._shapes.append(shape)
        self._colours.append(colour)
        return True

    def rule_out(self, parts: Sequence[Any]) -> None:
        """From now on, nothing of the shape of parts (tidied) is new, whatever its colour."""
        shape, colour = describe(parts)
        self._shapes.append(shape)
        self._colours.append(np.full_like(colour, np.nan))


def describe(parts: Sequence[Any]) -> tuple[Float[np.ndarray, "9"], Float[np.ndarray, "3"]]:
    """Extents, mean and standard deviation of the surface along each axis; and the mean colour of the pictures."""
    centres = np.concatenate([np.asarray(part.triangles_center) for part in parts])
    areas = np.concatenate([np.asarray(part.area_faces) for part in parts])
    weights = areas / max(float(areas.sum()), 1e-12)
    mean = weights @ centres
    spread = np.sqrt(np.maximum(weights @ (centres - mean) ** 2, 0.0))
    shares = [float(part.area) for part in parts]
    colours = [mean_colour(part.visual.material.baseColorTexture) / 255 for part in parts]
    colour = np.average(colours, axis=0, weights=shares if sum(shares) > 0 else None)
    return np.concatenate([extents(parts), mean, spread]), colour


def flatness(parts: Sequence[Any]) -> float:
    """Shortest side of the bounding box relative to the longest."""
    sides = extents(parts)
    return float(sides.min() / sides.max())


def write_glb(parts: Sequence[Any], path: Path) -> None:
    """Write parts as one ``.glb`` without normals, whole or not at all."""
    import trimesh

    scene = trimesh.Scene()
    for number, part in enumerate(parts):
        scene.add_geometry(part, geom_name=f"part{number}")
    content = trimesh.exchange.gltf.export_glb(scene, include_normals=False)
    partial_path = path.with_name(f".{path.name}.part")
    partial_path.write_bytes(content)
    partial_path.replace(path)


def known_shapes(folder: Path, lookalikes: Lookalikes, any_colour: bool = False) -> set[str]:
    """Count a folder's meshes as seen; returns their names.

    Args:
        folder: of meshes with pictures, or without colours.
        lookalikes: where they are counted.
        any_colour: rule out their shapes in any colour.

    Raises:
        InputError: a mesh cannot be read.
    """
    found = find_meshes([folder])
    for path in found.values():
        parts = load_parts(path)
        for part in parts:
            if texture_image(part) is None:
                part.visual = plain_part(part.vertices, part.faces, (0.5, 0.5, 0.5)).visual
        if any_colour:
            lookalikes.rule_out(parts)
        else:
            lookalikes.is_new(parts)
    return set(found)


def collect(
    objects: Iterable[SourceObject],
    output: Path,
    *,
    options: Tidying,
    lookalikes: Lookalikes,
    taken: set[str],
    thinnest: float = 0.03,
) -> Iterator[tuple[SourceObject, str]]:
    """Convert objects into ``output`` and add them to its ``index.json``.

    Args:
        objects: of any sources.
        output: folder, made where it is missing; what its index names already is left out.
        options: how small the objects become.
        lookalikes: shapes seen before; the objects written are added.
        taken: names that no object may have, of meshes elsewhere.
        thinnest: flatter objects (shortest by longest side) are left out.

    Yields:
        each object and, where it was left out, why ("" otherwise).

    Raises:
        InputError: the index cannot be read.
    """
    output.mkdir(parents=True, exist_ok=True)
    index_path = output / "index.json"
    try:
        index: list[dict[str, Any]] = json.loads(index_path.read_text()) if index_path.exists() else []
    except ValueError as error:
        raise InputError(
            f"mesh index {index_path} is damaged ({error}): remove the folder and collect again"
        ) from error
    names = taken | {Path(entry["file"]).stem for entry in index}
    for item in objects:
        if item.name in names:
            yield item, "there already"
            continue
        try:
            read = item.load()
            parts = tidy(read, options)
        except InputError as error:
            yield item, str(error)
            continue
        if flatness(parts) < thinnest:
            yield item, "flat"
            continue
        if not lookalikes.is_new(parts):
            yield item, "looks like another one"
            continue
        write_glb(parts, output / f"{item.name}.glb")
        names.add(item.name)
        index.append(entry_of(item, parts, sum(len(part.faces) for part in read)))
        _write_index(index, index_path)
        yield item, ""


def entry_of(item: SourceObject, parts: Sequence[Any], faces_original: int) -> dict[str, Any]:
    """An object's entry in ``index.json``."""
    return {
        "file": f"{item.name}.glb",
        "label": item.label,
        "category": item.category,
        "creator": item.creator,
        "library": item.library,
        "licence": item.licence,
        "source": item.source,
        "faces": sum(len(part.faces) for part in parts),
        "faces_original": faces_original,
        "textured": any(max(part.visual.material.baseColorTexture.size) > 4 for part in parts),
        "extents": extents(parts).round(3).tolist(),
    }


def _write_index(index: list[dict[str, Any]], path: Path) -> None:
    partial_path = path.with_name(f".{path.name}.part")
    partial_path.write_text(json.dumps(index, indent=1) + "\n")
    partial_path.replace(path)
