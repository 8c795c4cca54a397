"""One model from several of one family: the mean of their weights (Wortsman et al. 2022, arXiv 2203.05482).

Trainings that went on from common weights lie in one basin, and the middle between them is flatter, and generalises
better, than each of them.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel


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
    if any(not math.isfinite(share) or share <= 0 for share in shares):
        raise InputError(f"shares {', '.join(map(str, shares))}: each must be greater than 0")
    average = NVSModel.load(folders[0])
    mean: dict[str, Tensor] = {}
    for folder, share in zip(folders, shares, strict=True):
        model = NVSModel.load(folder)
        if model.config != average.config:
            raise InputError(f"{folder}: its configuration differs from that of {folders[0]}; models must be alike")
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                part = tensor.double() * (share / math.fsum(shares))
                mean[key] = mean[key] + part if key in mean else part
    average.load_state_dict(average.state_dict() | mean)
    return average
