"""Meshes of the Glest engine (.g3d, versions 3 and 4): parts with a texture each, in the first frame of the animation.

The layout is described in the engine's documentation, https://docs.megaglest.org/G3D_support.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.sources.objects import plain_part, team_coloured, textured_part

TEAM_COLOUR = 1  # bit of a version 4 mesh's properties: low alpha shows the team's colour
NO_TEXTURE_V3, TEAM_COLOUR_V3 = 1, 4
MOST_TEXTURES = 5


class _Reader:
    """Reads a little-endian buffer from front to back."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._content, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def array(self, kind: str, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        values = np.frombuffer(self._content, kind, count, self._at).reshape(shape)
        self._at += values.nbytes
        return values

    def text(self, length: int) -> str:
        return self.unpack(f"{length}s")[0].split(b"\0")[0].decode("latin-1")


def read_g3d(path: Path, team: tuple[float, float, float]) -> list[Any]:
    """Parts of a model, each a textured ``trimesh.Trimesh``; y up, the front faces +z.

    Args:
        path: the .g3d; its textures lie relative to it.
        team: colour (sRGB, 0..1) of what a player owns.

    Raises:
        InputError: the file is damaged, of another version, or lacks a texture that it names.
    """
    try:
        reader = _Reader(path.read_bytes())
        magic, version = reader.unpack("3sB")
        if magic != b"G3D" or version not in (3, 4):
            raise InputError(f"{path}: is no .g3d model of version 3 or 4")
        (count,) = reader.unpack("HB")[:1] if version == 4 else reader.unpack("I")
        read = _read_v4 if version == 4 else _read_v3
        return [part for part in (read(reader, path.parent, team) for _ in range(count)) if len(part.faces)]
    except (OSError, struct.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a .g3d model ({error})") from error


def _read_v4(reader: _Reader, folder: Path, team: tuple[float, float, float]) -> Any:
    reader.text(64)
    frames, count, indices = reader.unpack("3I")
    colour = reader.unpack("8f")[:3]  # then: specular colour and power, opacity
    properties, textures = reader.unpack("2I")
    names = [reader.text(64) for bit in range(MOST_TEXTURES) if textures & 1 << bit]
    points = reader.array("<f4", frames, count, 3)[0]
    reader.array("<f4", frames, count, 3)  # normals
    if not textures:
        return plain_part(points, reader.array("<u4", indices // 3, 3), colour)
    uv = reader.array("<f4", count, 2)
    faces = reader.array("<u4", indices // 3, 3)
    return textured_part(points, faces, uv, _texture(folder, names[0], bool(properties & TEAM_COLOUR), team))


def _read_v3(reader: _Reader, folder: Path, team: tuple[float, float, float]) -> Any:
    frames, normal_frames, uv_frames, colour_frames, count, indices, properties = reader.unpack("7I")
    name = reader.text(64)
    points = reader.array("<f4", frames, count, 3)[0]
    reader.array("<f4", normal_frames, count, 3)
    textured = not properties & NO_TEXTURE_V3
    uv = reader.array("<f4", uv_frames, count, 2)[0] if textured else np.zeros((count, 2))
    colour = reader.array("<f4", colour_frames, 4)[0]
    faces = reader.array("<u4", indices // 3, 3)
    if not textured:
        return plain_part(points, faces, colour)
    return textured_part(points, faces, uv, _texture(folder, name, bool(properties & TEAM_COLOUR_V3), team))


def _texture(folder: Path, name: str, team_coloured_alpha: bool, team: tuple[float, float, float]) -> Image.Image:
    image = Image.open(folder / name)
    image.load()
    if team_coloured_alpha and image.mode == "RGBA":
        return team_coloured(image, team)
    return image.convert("RGB")
