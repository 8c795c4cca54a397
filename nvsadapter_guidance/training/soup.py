"""One model from several of one family: the mean of their weights (Wortsman et al. 2022, arXiv 2203.05482).

Trainings that went on from common weights lie in one basin, and the middle between them is flatter, and generalises
better, than each of them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel, NVSModelConfig

LARGEST_SHARE = 1e9


def average_models(folders: Sequence[Path], shares: Sequence[float] | None = None) -> NVSModel:
    """The weighted mean of model folders; ``shares`` (default: equal) are positive and are divided by their sum.

    Raises:
        InputError: fewer than two folders, shares that do not fit them, a folder that is no model, or one of another
            configuration than the first.
    """
    if len(folders) < 2:
        raise InputError(f"an average needs at least two model folders, not {len(folders)}")
    shares = [1.0] * len(folders) if shares is None else list(shares)
    if len(shares) != len(folders):
        raise InputError(f"{len(shares)} shares for {len(folders)} model folders; give one for each")
    if any(not 0 < share < LARGEST_SHARE for share in shares):
        raise InputError(
            f"shares {', '.join(map(str, shares))}: each must be greater than 0, and below {LARGEST_SHARE:g}"
        )
    average = NVSModel.load(folders[0])
    mean: dict[str, Tensor] = {}
    for folder, share in zip(folders, shares, strict=True):
        model = NVSModel.load(folder)
        for name, (found, wanted) in _differences(model.config, average.config).items():
            raise InputError(f"{folder}: its {name} is {found}, but {wanted} in {folders[0]}; models must be alike")
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                part = tensor.double() * (share / math.fsum(shares))
                mean[key] = mean[key] + part if key in mean else part
    average.load_state_dict(average.state_dict() | mean)
    return average


def _differences(first: NVSModelConfig, second: NVSModelConfig) -> dict[str, tuple[Any, Any]]:
    """Both values of what differs by path, without the name."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, one in vars(first).items():
        other = getattr(second, key)
        if isinstance(one, dict) and isinstance(other, dict):
            names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
            found |= {f"{key}.{name}": (one.get(name), other.get(name)) for name in names}
        elif one != other and key != "name":
            found[key] = one, other
    return found
