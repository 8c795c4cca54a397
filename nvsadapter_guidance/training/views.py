"""Banks of rendered views in memory, and batches of (support, queries) drawn from them.

A bank holds the same number of square RGBA views (straight alpha) of each of its objects, with their cameras in the
world frame: z up, azimuth counter-clockwise seen from above, degrees, looking at the origin.
"""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import untile


@dataclass(frozen=True)
class ViewBank:
    """Views of N objects, V each, and their cameras in degrees and world units."""

    rgba: UInt8[Tensor, "n v h w 4"]
    azimuth: Float[Tensor, "n v"]
    elevation: Float[Tensor, "n v"]
    distance: Float[Tensor, "n v"]
    names: tuple[str, ...]
    fovy: float = 49.1

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> "ViewBank":
        """The bank with its tensors on ``device``."""
        tensors = (self.rgba, self.azimuth, self.elevation, self.distance)
        rgba, azimuth, elevation, distance = (tensor.to(device) for tensor in tensors)
        return replace(self, rgba=rgba, azimuth=azimuth, elevation=elevation, distance=distance)

    def first(self, count: int) -> "ViewBank":
        """The first ``count`` objects alone."""
        tensors = {name: getattr(self, name)[:count] for name in ("rgba", "azimuth", "elevation", "distance")}
        return replace(self, **tensors, names=self.names[:count])

    def save(self, path: Path) -> None:
        """Write the bank as safetensors; :meth:`load` reads it back."""
        names = ("rgba", "azimuth", "elevation", "distance")
        tensors = {name: getattr(self, name).contiguous().cpu() for name in names}
        save_file(tensors, path, metadata={"names": json.dumps(self.names), "fovy": repr(self.fovy)})

    @classmethod
    def load(cls, path: Path) -> "ViewBank":
        """Read a bank that :meth:`save` wrote.

        Raises:
            InputError: the file is missing or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in ("rgba", "azimuth", "elevation", "distance")}
            return cls(**tensors, names=tuple(json.loads(metadata["names"])), fovy=float(metadata["fovy"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"view bank {path} cannot be read ({error}): render it again") from error


@dataclass(frozen=True)
class ViewBatch:
    """Views of B objects; view 0 is the support (reference) view, the others are queries."""

    rgba: Float[Tensor, "b v h w 4"]  # straight alpha, in [0, 1]
    azimuth: Float[Tensor, "b v"]
    elevation: Float[Tensor, "b v"]
    distance: Float[Tensor, "b v"]

    @property
    def relative_azimuth(self) -> Float[Tensor, "b v"]:
        """Azimuth from the support view's, in [-180, 180) degrees: all that a model may know of it."""
        return relative_azimuth(self.azimuth, self.azimuth[:, :1])


@dataclass(frozen=True)
class ViewIndex:
    """Which views a batch is made of: the object, its support view and its query views."""

    objects: Int[Tensor, " b"]
    support: Int[Tensor, " b"]
    queries: Int[Tensor, "b q"]


def load_tar(path: Path) -> ViewBank:
    """Read a split written by :func:`nvsadapter_guidance.training.mesh_dataset.render_split` onto the CPU.

    Raises:
        InputError: the file is missing, damaged, empty, or its objects differ in their number of views or size.
    """
    pairs: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    name, _, kind = member.name.rpartition(".")
                    pairs.setdefault(name, {})[kind] = content.read()
        cameras = {name: json.loads(pair["json"]) for name, pair in pairs.items()}
        with ThreadPoolExecutor() as pool:
            rgba = list(pool.map(lambda name: _decode(pairs[name]["webp"], cameras[name]), pairs))
        columns = [[camera[key] for camera in cameras.values()] for key in ("azimuth", "elevation")]
        azimuth, elevation = (torch.tensor(column, dtype=torch.float32) for column in columns)
        distance = torch.tensor([camera["distance"] for camera in cameras.values()], dtype=torch.float32)
        fovy = {float(camera["fovy"]) for camera in cameras.values()}
        stacked = torch.from_numpy(np.stack(rgba))
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise InputError(f"views {path} cannot be read ({error}): render them with render_training_views.py") from error
    if len(fovy) != 1:
        raise InputError(f"views {path} mix fields of view {sorted(fovy)}: render them with one")
    return ViewBank(stacked, azimuth, elevation, distance[:, None].expand_as(azimuth), tuple(pairs), fovy.pop())


def _decode(content: bytes, camera: dict[str, object]) -> UInt8[np.ndarray, "v h w 4"]:
    azimuth, size = camera["azimuth"], camera["size"]
    if not isinstance(azimuth, list) or not isinstance(size, int):
        raise ValueError("a camera file lacks its azimuths or its size")
    grid = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    return untile(grid, len(azimuth), size)


def sample_batch(
    bank: ViewBank,
    batch: int,
    num_query: int,
    generator: torch.Generator,
    *,
    level_share: float = 0.75,
    highest_support: float = 35.0,
    front_share: float = 0.35,
) -> ViewIndex:
    """Draw objects, a support view of each, and distinct other views of it as queries.

    Args:
        bank: the views.
        batch: number of draws; objects may repeat.
        num_query: queries per draw, fewer than the bank has views.
        generator: on the bank's device.
        level_share: share of draws whose support view is at elevation 0, as photographs of objects mostly are.
        highest_support: the other draws' support views lie at or below this elevation in degrees. Where an object
            has no view of the kind wanted, any of its views is taken.
        front_share: share of draws whose support is one of those within 25 degrees of azimuth 0, where it has any:
            meshes stand with their front there, and it is mostly fronts that people photograph.

    Raises:
        InputError: ``num_query`` is not between 1 and one less than the number of views.
    """
    views = bank.rgba.shape[1]
    if not 1 <= num_query < views:
        raise InputError(f"num_query={num_query} needs objects of more views than the bank's {views}")
    device = bank.rgba.device
    objects = torch.randint(len(bank), (batch,), generator=generator, device=device)
    elevation = bank.elevation[objects]
    level = elevation.abs() < 0.5
    low = ~level & (elevation <= highest_support)
    wants_level = torch.rand((batch, 1), generator=generator, device=device) < level_share
    wanted = torch.where(wants_level, level, low).float()
    weights = torch.where(wanted.sum(1, keepdim=True) > 0, wanted, torch.ones_like(wanted))
    wants_front = torch.rand((batch, 1), generator=generator, device=device) < front_share
    front = weights * (relative_azimuth(bank.azimuth[objects], 0.0).abs() <= 25.0)
    weights = torch.where(wants_front & (front.sum(1, keepdim=True) > 0), front, weights)
    support = torch.multinomial(weights, 1, generator=generator)
    order = torch.rand((batch, views), generator=generator, device=device).scatter(1, support, 2.0)
    return ViewIndex(objects, support[:, 0], order.topk(num_query, dim=1, largest=False).indices)


def take(bank: ViewBank, index: ViewIndex) -> ViewBatch:
    """The views that an index names, support first."""
    views = torch.cat([index.support[:, None], index.queries], dim=1)
    rows = index.objects[:, None]
    rgba = bank.rgba[rows, views].float() / 255
    return ViewBatch(rgba, bank.azimuth[rows, views], bank.elevation[rows, views], bank.distance[rows, views])


def composite(rgba: Float[Tensor, "*b h w 4"], background: float = 1.0) -> Float[Tensor, "*b h w 3"]:
    """Straight-alpha colours over a grey background (white by default)."""
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + background * (1 - alpha)


def relative_azimuth(azimuth: Float[Tensor, "*b"], support: Float[Tensor, "*b"] | float) -> Float[Tensor, "*b"]:
    """``azimuth - support`` in [-180, 180) degrees (arguments broadcast)."""
    return torch.remainder(azimuth - support + 180, 360) - 180
