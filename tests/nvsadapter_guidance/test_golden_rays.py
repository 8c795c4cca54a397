"""Cameras, rays and ray embeddings against the golden tensors."""

import re

import pytest
import torch
from golden_files import GoldenFile, golden, golden_file, needs_golden
from torch import Tensor

from nvsadapter_guidance.cameras import (
    RELEASED,
    RELEASED_SAMPLING,
    CameraConvention,
    intrinsic_matrix,
    look_at,
    relative_to_support,
)
from nvsadapter_guidance.rays import RayEmbedding, latent_rays, plucker_coordinates

pytestmark = [golden, needs_golden]

CODE_PATHS = {"train": RELEASED, "guidance3d": RELEASED, "sampling_script": RELEASED_SAMPLING}
RAYS_TOLERANCE = 1e-5
# The highest frequency, 2^14, makes up to 2e-2 of float32 differences between poses.
POSE_EMBEDDING_TOLERANCE = 2e-2
STORED_EMBEDDING_TOLERANCE = 1e-4


def rays_file() -> GoldenFile:
    return golden_file("rays")


def poses(convention: CameraConvention) -> Tensor:
    file = rays_file()
    return look_at(file["in.azimuth_deg"], file["in.elevation_deg"], file["in.distance"], convention)


def image_size() -> tuple[int, int]:
    size = rays_file().options["image_size"]
    return size, size


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)


def test_view_matrix_and_intrinsics() -> None:
    file, (height, width) = rays_file(), image_size()
    close(poses(RELEASED), file["view_matrix"], RAYS_TOLERANCE)
    intrinsics = intrinsic_matrix(file.options["fov_deg"], height, width, RELEASED)
    close(intrinsics, file[f"intrinsic_{height}"], RAYS_TOLERANCE)


@pytest.mark.parametrize("path", CODE_PATHS)
def test_poses_and_rays_of_every_code_path(path: str) -> None:
    file, convention = rays_file(), CODE_PATHS[path]
    c2w = poses(convention)
    close(c2w, file[f"{path}.c2w"], RAYS_TOLERANCE)
    relative = relative_to_support(c2w)
    close(relative, file[f"{path}.rel_c2w"], RAYS_TOLERANCE)
    rays_o, rays_d = latent_rays(relative, file.options["fov_deg"], image_size(), file.options["stride"], convention)
    close(rays_o, file[f"{path}.rays_offset"], RAYS_TOLERANCE)
    close(rays_d, file[f"{path}.rays_direction"], RAYS_TOLERANCE)


def test_dataset_matrices_give_the_training_poses() -> None:
    file = rays_file()
    world_to_camera = torch.eye(4).repeat(file["train.c2w"].shape[0], 1, 1)
    world_to_camera[:, :3] = file["train.npy_w2c_3x4"]
    c2w = torch.linalg.inv(world_to_camera)
    c2w[:, :3, :3] *= -1.0
    close(c2w, file["train.c2w"], RAYS_TOLERANCE)
    close(poses(RELEASED), c2w, RAYS_TOLERANCE)


def test_other_strides() -> None:
    file = rays_file()
    for name in file.tensors:
        match = re.fullmatch(r"(\w+)\.rays_(offset|direction)_stride(\d+)", name)
        if match:
            convention = CODE_PATHS[match[1]]
            rays = latent_rays(
                relative_to_support(poses(convention)), file.options["fov_deg"], image_size(), int(match[3]), convention
            )
            close(rays[match[2] == "direction"], file[name], RAYS_TOLERANCE)


def test_plucker_coordinates() -> None:
    file = rays_file()
    moment, direction = plucker_coordinates(file["guidance3d.rays_offset"], file["guidance3d.rays_direction"])
    close(moment, file["guidance3d.plucker_moment"], RAYS_TOLERANCE)
    close(direction, file["guidance3d.plucker_direction"], RAYS_TOLERANCE)


def embeddings() -> list[tuple[str, str, str, list[int]]]:
    """(tensor, code path, kind, views) of every stored embedding."""
    found = []
    for name in rays_file().tensors:
        match = re.fullmatch(r"(\w+)\.emb_(plucker|rayo_rayd|extrinsic)_\d+(?:_views?(\d+))?", name)
        if match:
            views = [int(digit) for digit in match[3] or ""]
            found.append((name, match[1], match[2], views))
    return found


def test_embeddings_from_poses_and_from_stored_rays() -> None:
    file = rays_file()
    fov, stride = file.options["fov_deg"], file.options["stride"]
    assert {kind for _, _, kind, _ in embeddings()} == {"plucker", "rayo_rayd", "extrinsic"}
    for name, path, kind, views in embeddings():
        encoder = RayEmbedding(kind)  # type: ignore[arg-type]
        convention = CODE_PATHS[path]
        from_poses = encoder(poses(convention), fov, image_size(), stride, convention)
        if kind == "extrinsic":
            size = tuple(file[f"{path}.rays_offset"].shape[1:3])
            stored = encoder.encode_poses(file[f"{path}.rel_c2w"], *size)
        else:
            stored = encoder.encode_rays(file[f"{path}.rays_offset"], file[f"{path}.rays_direction"])
        for actual, tolerance in ((from_poses, POSE_EMBEDDING_TOLERANCE), (stored, STORED_EMBEDDING_TOLERANCE)):
            chosen = actual[views] if views else actual
            chosen = chosen[..., 0, 0] if file[name].ndim == 2 else chosen
            close(chosen.reshape(file[name].shape), file[name], tolerance)
