"""Mesh files.

Every format is written in the frame of glTF: y up, front towards +z, (x, y, z)_file = (y, z, x)_world. OBJ and PLY say
nothing about axes; most viewers take them as y up too, so one object looks the same way in all of them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from jaxtyping import Float, UInt8
from PIL import Image

from threedrec.mesh.types import Mesh, vertex_normals
from threedrec.mesh.unwrap import Atlas


@dataclass(frozen=True)
class TexturedMesh:
    """Everything that a mesh file may hold, in world coordinates."""

    mesh: Mesh
    colors: Float[np.ndarray, "V 3"]
    """Of the vertices, in [0, 1]."""
    atlas: Atlas | None = None
    texture: UInt8[np.ndarray, "S S 3"] | None = None


def to_file_frame(vectors: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
    """From the world (z up, front +x) to files (y up, front +z). A rotation, so the winding stays."""
    return vectors[:, [1, 2, 0]]


def write_glb(path: Path, model: TexturedMesh, normals: bool = True) -> None:
    """Binary glTF 2.0 with one rough, non-metallic material; the texture is inside the file."""
    vertices, directions = to_file_frame(model.mesh.vertices), to_file_frame(vertex_normals(model.mesh))
    visual: trimesh.visual.ColorVisuals | trimesh.visual.TextureVisuals
    if model.atlas is None or model.texture is None:
        faces = model.mesh.faces
        visual = trimesh.visual.ColorVisuals(vertex_colors=_bytes(model.colors))
    else:
        vertices, directions = vertices[model.atlas.original], directions[model.atlas.original]
        faces = model.atlas.faces
        material = trimesh.visual.material.PBRMaterial(
            name="baked",
            baseColorTexture=Image.fromarray(model.texture),
            baseColorFactor=[255, 255, 255, 255],
            metallicFactor=0.0,
            roughnessFactor=1.0,
            doubleSided=False,
        )
        visual = trimesh.visual.TextureVisuals(uv=model.atlas.uv, material=material)
    solid = trimesh.Trimesh(vertices, faces, vertex_normals=directions, visual=visual, process=False)
    scene = trimesh.Scene(solid, base_frame="world")
    path.write_bytes(trimesh.exchange.gltf.export_glb(scene, include_normals=normals))


def write_ply(path: Path, model: TexturedMesh, normals: bool = True) -> None:
    """Binary PLY with vertex colours; seams of the texture do not split its vertices."""
    solid = trimesh.Trimesh(
        to_file_frame(model.mesh.vertices),
        model.mesh.faces,
        vertex_normals=to_file_frame(vertex_normals(model.mesh)),
        vertex_colors=_bytes(model.colors),
        process=False,
    )
    path.write_bytes(trimesh.exchange.ply.export_ply(solid, vertex_normal=normals))


def write_obj(path: Path, model: TexturedMesh, normals: bool = True, texture_suffix: str = ".png") -> list[Path]:
    """OBJ; beside it, where the model has a texture, the material and the image, which it names relatively.

    Positions, texture coordinates and normals have indices of their own, so that the surface stays closed across
    seams. Without a texture, colours follow the positions on the vertex lines, as most readers understand.

    Returns:
        The files written, the OBJ last.
    """
    vertices = to_file_frame(model.mesh.vertices)
    corners = [model.mesh.faces]
    textured = model.atlas is not None and model.texture is not None
    lines = ["# y up, front towards +z"]
    written = []
    if model.atlas is not None and model.texture is not None:
        written = _write_material(path, model.texture, texture_suffix)
        lines += [f"mtllib {path.stem}.mtl", "usemtl baked", f"o {path.stem}"]
        lines += [_rows("v %.6f %.6f %.6f", vertices), _rows("vt %.6f %.6f", model.atlas.uv)]
        corners.append(model.atlas.faces)
    else:
        lines += [f"o {path.stem}", _rows("v %.6f %.6f %.6f %.4f %.4f %.4f", np.hstack([vertices, model.colors]))]
    if normals:
        lines.append(_rows("vn %.4f %.4f %.4f", to_file_frame(vertex_normals(model.mesh))))
        corners.append(model.mesh.faces)
    corner = {(True, True): "%d/%d/%d", (True, False): "%d/%d", (False, True): "%d//%d", (False, False): "%d"}
    face = "f " + " ".join([corner[textured, normals]] * 3)
    lines.append(_rows(face, np.stack(corners, axis=2).reshape(len(model.mesh.faces), -1) + 1))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [*written, path]


def _write_material(path: Path, texture: np.ndarray, suffix: str) -> list[Path]:
    image, material = path.with_name(path.stem + suffix), path.with_name(path.stem + ".mtl")
    Image.fromarray(texture).save(image, quality=95)
    lines = ["newmtl baked", "Ka 0 0 0", "Kd 1 1 1", "Ks 0 0 0", "d 1", "illum 1", f"map_Kd {image.name}"]
    material.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [image, material]


def _rows(template: str, rows: np.ndarray) -> str:
    return "\n".join([template] * len(rows)) % tuple(rows.reshape(-1).tolist())


def _bytes(colors: np.ndarray) -> np.ndarray:
    return np.round(np.clip(colors, 0.0, 1.0) * 255.0).astype(np.uint8)
