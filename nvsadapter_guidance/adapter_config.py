"""Options of an NVS-Adapter, as they are written beside its weights."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from nvsadapter_guidance.cameras import CONVENTIONS
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.rays import RAY_KINDS, RayEmbedding

VIEW_ATTN_MODES = ("support_skip", "support_sattn", "support_sattn_mq", "support_xattn")
IMAGE_ATTN_MODES = ("query_only", "support_query", None)
QUERY_COMPOSER_MODES = ("learnable_emb", "all_to_all", "all_to_all_attention", None)


@dataclass(frozen=True)
class NVSAdapterConfig:
    """Options of an NVS-Adapter; defaults are those of the released model.

    Raises:
        InputError: a value is out of range or unknown.
    """

    num_query: int = 4
    """Query views per sample in training; any number works at inference."""
    view_attn_mode: str = "support_sattn_mq"
    """What support tokens do in view attention: "support_skip" nothing, "support_sattn" and "support_sattn_mq"
    attend to themselves, "support_xattn" attend to the query views. Query tokens always attend to support tokens."""
    image_attn_mode: Optional[str] = "query_only"
    """Who attends to the image token: "query_only" (the support stream is then doubled, as released),
    "support_query" both, None nobody."""
    query_composer_mode: Optional[str] = "learnable_emb"
    """How query views see each other: "learnable_emb" through learned tokens, "all_to_all_attention" directly,
    "all_to_all" not at all (the released mode of that name never calls its attention), None not at all."""
    query_emb_scale: float = 1.0
    """Learned tokens per block over the number of latent positions at its level."""
    latent_resolution: int = 32
    """Side of the latent grid that sets the number of learned tokens; inputs may have other sizes."""
    image_context_dim: int = 1024
    """Width of the image token."""
    imgemb_to_text: bool = False
    """The image token replaces the text tokens, and image attention is skipped."""
    ray_embedding: str = "plucker"
    """"plucker", "rayo_rayd" or "extrinsic"."""
    ray_degrees: Tuple[int, int] = (15, 8)
    """Frequencies of (moment or origin or extrinsics, direction)."""
    ray_channels: Optional[int] = None
    """Channels of the ray embedding when it is not one of ours; None: from its kind and degrees."""
    camera_convention: str = "released"
    """Name in `cameras.CONVENTIONS` of the convention the weights were trained with."""
    num_train_timesteps: int = 1000
    """Diffusion steps; the support view of an unconditional sample is given the last one."""
    zero_init: bool = True
    """Output layers start at zero, so a fresh adapter leaves the base model's output as it is."""

    def __post_init__(self) -> None:
        _check_choice("view_attn_mode", self.view_attn_mode, VIEW_ATTN_MODES)
        _check_choice("image_attn_mode", self.image_attn_mode, IMAGE_ATTN_MODES)
        _check_choice("query_composer_mode", self.query_composer_mode, QUERY_COMPOSER_MODES)
        _check_choice("ray_embedding", self.ray_embedding, RAY_KINDS)
        _check_choice("camera_convention", self.camera_convention, tuple(CONVENTIONS))
        for name in ("num_query", "query_emb_scale", "latent_resolution", "image_context_dim", "num_train_timesteps"):
            if not getattr(self, name) > 0:
                raise InputError(f"adapter config: {name} is {getattr(self, name)}; it must be greater than 0")

    @property
    def rays(self) -> RayEmbedding:
        """The encoder of view poses."""
        return RayEmbedding(self.ray_embedding, self.ray_degrees)  # type: ignore[arg-type]

    @property
    def posemb_dim(self) -> int:
        """Channels of the ray embedding that the network is given."""
        return self.rays.channels if self.ray_channels is None else self.ray_channels

    @property
    def support_is_independent(self) -> bool:
        """Whether the support stream does not depend on the query views, so that it can be cached."""
        return self.view_attn_mode != "support_xattn"

    def to_dict(self) -> Dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Dict[str, Any], source: str = "adapter config") -> "NVSAdapterConfig":
        """Strict inverse of `to_dict`.

        Raises:
            InputError: a key is unknown (names `source`, the key and the nearest known one) or a value is bad.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(known)}"
                raise InputError(f"{source}: unknown key '{key}'; {hint}")
        # JSON has no tuples.
        plain: Dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        try:
            return cls(**plain)
        except TypeError as error:
            raise InputError(f"{source}: a value has the wrong type ({error}); see NVSAdapterConfig") from error

    @classmethod
    def load(cls, path: Path) -> "NVSAdapterConfig":
        """Read a JSON file written by `NVSAdapter.save_pretrained`.

        Raises:
            InputError: the file is missing, is not a JSON object, or has a bad key or value.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); give a folder with a saved adapter"
            ) from error
        except ValueError as error:
            raise InputError(f"{path}: is not JSON ({error}); save the adapter again") from error
        if not isinstance(values, dict):
            raise InputError(f"{path}: holds no JSON object; save the adapter again")
        return cls.from_dict(values, str(path))


def _check_choice(name: str, value: Optional[str], choices: Tuple[Optional[str], ...]) -> None:
    if value not in choices:
        raise InputError(f"adapter config: {name} '{value}' is unknown; use one of {list(choices)}")
