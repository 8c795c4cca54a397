"""How alike predicted and true views are, image by image."""

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from nvsadapter_guidance.errors import InputError

Backbone = Literal["alex", "vgg", "squeeze"]
SSIM_WINDOW = 11
MAX_PSNR = 100.0  # of equal images; as a mean must stay a number
FAINTEST = 0.06
"""A pixel of a view on white can belong to the object where a channel is darker than white by more."""
COVERED = 0.45
"""Share of its darkest neighbour's darkness from which on a pixel is half covered: with it, silhouettes of true views
of training objects meet their own masks best (IoU 0.984). The threshold alone, which takes in every pixel that an edge
touches, gives 0.923."""

Lpips = Callable[[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]], Float[Tensor, " b"]]


def image_psnr(prediction: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image in [0, 1], dB, at most ``MAX_PSNR``."""
    error = (prediction.double() - target.double()).square().flatten(1).mean(dim=1)
    return (-10.0 * error.clamp_min(10.0 ** (-MAX_PSNR / 10.0)).log10()).float()


def image_ssim(prediction: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each image in [0, 1]: Gaussian window of 11 pixels, sigma 1.5.

    Wang et al. 2004, eq. 13, averaged over the places where the window lies inside.

    Raises:
        InputError: the images are smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(prediction.shape[-2:]) < SSIM_WINDOW:
        raise InputError(f"SSIM needs images of {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {tuple(prediction.shape[-2:])}")
    values = structural_similarity_index_measure(
        prediction.float(), target.float(), data_range=1.0, reduction="none", sigma=1.5
    )
    return cast(Tensor, values).reshape(-1)


def silhouette(images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b h w"]:
    """Pixels of views in [0, 1] on white that the object covers by about half or more."""
    darkness = (1.0 - images).amax(dim=1, keepdim=True)
    darkest = functional.max_pool2d(darkness, 3, stride=1, padding=1)
    return (darkness > (COVERED * darkest).clamp_min(FAINTEST))[:, 0]


def mask_iou(prediction: Bool[Tensor, "b h w"], target: Bool[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Intersection over union of each pair of masks; 1 for two empty ones."""
    both, either = ((op(prediction, target)).flatten(1).sum(1) for op in (torch.logical_and, torch.logical_or))
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both, dtype=torch.float32))


def load_lpips(backbone: str, device: torch.device | str = "cpu") -> Lpips:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) of images in [0, 1], from torchmetrics.

    The backbone's ImageNet weights come from torchvision, which fetches them once into ``$TORCH_HOME``. The published
    numbers of NVS-Adapter and of SyncDreamer take ``vgg``.

    Raises:
        InputError: an unknown backbone, torchvision is missing, or the weights are neither there nor can be fetched.
    """
    if backbone not in get_args(Backbone):
        raise InputError(f"LPIPS backbone '{backbone}' is unknown; use one of {', '.join(get_args(Backbone))}")
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity(net_type=backbone, normalize=True).net.to(device).eval()
    except ImportError as error:
        raise InputError("LPIPS needs torchvision: pip install -e '.[metrics]'") from error
    except RuntimeError as error:  # torchvision of another build than torch
        reason = str(error).splitlines()[0]
        raise InputError(
            f"LPIPS: torchvision does not fit torch {torch.__version__} ({reason}); install both from one index"
        ) from error
    except OSError as error:
        folder = torch.hub.get_dir() + "/checkpoints"
        raise InputError(f"LPIPS: cannot fetch the weights of {backbone} ({error}); put them into {folder}") from error

    @torch.no_grad()
    def distance(prediction: Tensor, target: Tensor) -> Tensor:
        values = network(prediction.to(device).clamp(0, 1), target.to(device).clamp(0, 1), normalize=True)
        return values.reshape(-1).cpu()

    return distance
