"""Meshes of 0 A.D.'s engine Pyrogenesis: actors (XML) that name a mesh (.pmd), its textures (.dds) and its props.

The binary layout of .pmd is the one described at https://trac.wildfiregames.com/wiki/PMD_Format, versions 3 and 4.
The engine's axes are left-handed (x right, y up, z forward); parts leave here in glTF axes.
"""

import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.sources.objects import team_coloured, textured_part

OBJECT_SPACE = 0xFF  # a prop point's bone where it hangs on none
DEEPEST_PROP = 2
CUT_OUT = ("basic_trans", "player_trans_trans", "alpha", "blend", "foliage", "leaves", "grass", "water")


@dataclass(frozen=True)
class Pmd:
    """A mesh, and the matrices (4 x 4, object from prop) of the points that props hang on."""

    points: Float[np.ndarray, "n 3"]
    uv: Float[np.ndarray, "n 2"]
    faces: Int[np.ndarray, "f 3"]
    prop_points: dict[str, Float[np.ndarray, "4 4"]]


@dataclass
class Actor:
    """What the first variants of an actor's groups say together."""

    mesh: str = ""
    texture: str = ""
    material: str = ""
    props: dict[str, str] = field(default_factory=dict)


def placement(shift: Any, quaternion: Any) -> Float[np.ndarray, "4 4"]:
    """The matrix of a rotation (quaternion x, y, z, w) followed by a shift."""
    from scipy.spatial.transform import Rotation

    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_quat(quaternion).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def read_pmd(content: bytes) -> Pmd:
    """Read a mesh file.

    Raises:
        InputError: it is no mesh of version 3 or 4, or it is cut.
    """
    try:
        magic, version, _, count = struct.unpack_from("<4sIII", content)
        if magic != b"PSMD" or version not in (3, 4):
            raise InputError(f"a file of kind {magic!r}, version {version}, is no .pmd mesh of version 3 or 4")
        sets = struct.unpack_from("<I", content, 16)[0] if version == 4 else 1
        at = 20 if version == 4 else 16
        vertex = np.dtype([("point", "<f4", 3), ("normal", "<f4", 3), ("uv", "<f4", (sets, 2)), ("skin", "V20")])
        vertices = np.frombuffer(content, vertex, count, at)
        at += count * vertex.itemsize
        (triangles,) = struct.unpack_from("<I", content, at)
        faces = np.frombuffer(content, "<u2", 3 * triangles, at + 4).reshape(-1, 3)
        at += 4 + 6 * triangles
        (bones,) = struct.unpack_from("<I", content, at)
        at += 4 + 28 * bones
        (points,) = struct.unpack_from("<I", content, at)
        at, props = at + 4, {}
        for _ in range(points):
            (length,) = struct.unpack_from("<I", content, at)
            name = content[at + 4 : at + 4 + length].decode("ascii", "replace")
            *numbers, bone = struct.unpack_from("<7fB", content, at + 4 + length)
            at += 4 + length + 29
            if bone == OBJECT_SPACE:
                props[name] = placement(numbers[:3], numbers[3:])
    except (struct.error, ValueError) as error:
        raise InputError(f"a .pmd mesh is damaged ({error})") from error
    uv = vertices["uv"][:, 0] if sets else np.zeros((count, 2))
    return Pmd(vertices["point"].astype(np.float64), uv.astype(np.float64), faces.astype(np.int64), props)


def read_actor(path: Path) -> Actor:
    """Read an actor: of every group the first variant that may appear.

    Raises:
        InputError: the file cannot be read, or it has no mesh or no colours.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f"actor {path} cannot be read ({error})") from error
    actor = Actor(material=root.findtext("material") or "")
    for group in root.iter("group"):
        variants = [v for v in group.findall("variant") if v.get("frequency") != "0"]
        if not variants:
            continue
        variant = variants[0]
        actor.mesh = variant.findtext("mesh") or actor.mesh
        for texture in variant.iter("texture"):
            if texture.get("name") == "baseTex":
                actor.texture = texture.get("file", "")
        for prop in variant.iter("prop"):
            actor.props[prop.get("attachpoint", "")] = prop.get("actor", "")
    if not actor.mesh or not actor.texture:
        raise InputError(f"actor {path} has no mesh or no texture of its own")
    return actor


def load_actor(art: Path, name: str, team: tuple[float, float, float], ground: float | None = None) -> list[Any]:
    """Parts of an actor and of the props that hang on it, in glTF axes.

    Args:
        art: the folder that holds ``actors``, ``meshes`` and ``textures``.
        name: the actor's path below ``actors``.
        team: colour (sRGB, 0..1) of what a player owns.
        ground: lower points are lifted to this height (metres): walls go deep into the ground for slopes.

    Raises:
        InputError: the actor or its mesh or texture cannot be read, or it is cut out of flat pictures.
    """
    parts = [in_gltf_axes(part) for part in _assemble(art, name, team, 0)]
    if ground is not None:
        for part in parts:
            part.vertices = np.maximum(part.vertices, [-np.inf, ground, -np.inf])
    return parts


def _assemble(art: Path, name: str, team: tuple[float, float, float], depth: int) -> list[Any]:
    actor = read_actor(art / "actors" / name)
    if any(word in actor.material for word in CUT_OUT):
        raise InputError(f"actor {name} is cut out of flat pictures")
    mesh_path = art / "meshes" / f"{actor.mesh}.cached.pmd"
    texture_path = art / "textures/skins" / f"{actor.texture}.cached.dds"
    try:
        pmd, image = read_pmd(mesh_path.read_bytes()), Image.open(texture_path).copy()
    except (OSError, NotImplementedError) as error:
        raise InputError(f"actor {name}: {error}") from error
    if "player" in actor.material and image.mode == "RGBA":
        image = team_coloured(image, team)
    parts = [textured_part(pmd.points, pmd.faces, pmd.uv, image.convert("RGB"))]
    for point, prop in actor.props.items():
        matrix = np.eye(4) if point == "root" else pmd.prop_points.get(f"prop-{point}", pmd.prop_points.get(point))
        if matrix is None or not prop or depth == DEEPEST_PROP or "garrison" in prop:
            continue
        try:
            added = _assemble(art, prop, team, depth + 1)
        except InputError:
            continue  # flat decals, flames and flags: the object is whole without them
        for part in added:
            part.apply_transform(matrix)
        parts += added
    return parts


def in_gltf_axes(part: Any) -> Any:
    """A left-handed part that faces -z made right-handed, facing +z: z flips, and so do the faces."""
    points = np.asarray(part.vertices) * [1.0, 1.0, -1.0]
    uv = np.asarray(part.visual.uv)
    return textured_part(points, np.asarray(part.faces)[:, ::-1], uv, part.visual.material.baseColorTexture)
