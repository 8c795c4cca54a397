"""What ``config.json`` of a model folder holds, read strictly."""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPTextConfig, CLIPVisionConfig

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.errors import InputError, one_line
from nvsadapter_guidance.schedule import NoiseSchedule


@dataclass
class NVSModelConfig:
    """What ``config.json`` of a model folder holds."""

    name: str
    """Short name for people and metrics files."""
    image_size: int
    """Side of the square images the model sees, in pixels."""
    unet: dict[str, Any]
    """Arguments of ``diffusers.UNet2DConditionModel``."""
    vae: dict[str, Any]
    """Arguments of ``diffusers.AutoencoderKL``; its ``scaling_factor`` multiplies latents."""
    image_encoder: dict[str, Any]
    """Arguments of ``transformers.CLIPVisionConfig``."""
    adapter: dict[str, Any]
    """Arguments of ``NVSAdapterConfig``."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``NoiseSchedule``."""
    text_tokens: int = 4
    """How many tokens stand in place of text: learned constants, or those of the empty prompt."""
    text_encoder: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``transformers.CLIPTextConfig``; empty where the tokens are learned constants."""
    image_preprocessing: str = "none"
    """What happens to images before the image encoder: ``none``, or ``clip`` (`encoders.clip_images`)."""
    fov_deg: float = 49.1
    distance: float = 1.5
    """Camera distance of the training views, in object diameters (objects have radius 0.5)."""
    unconditional_support: str = "zeros"
    """What replaces the support latents of unconditional samples: ``zeros``, or ``noise`` as released."""
    sampling_noise: float = 1.0
    """Standard deviation of the noise that sampling starts from where nothing else is asked for: below 1, samples lie
    nearer to the mean of the views that the model thinks possible, with fewer wrong details and softer ones."""

    @property
    def family(self) -> Literal["mini", "released"]:
        """``mini`` or ``released``, the keys of `sampling_defaults`."""
        return "released" if self.unconditional_support == "noise" else "mini"


_SECTIONS: dict[str, Callable[..., Any]] = {
    "unet": UNet2DConditionModel.__init__,
    "vae": AutoencoderKL.__init__,
    "image_encoder": CLIPVisionConfig,
    "text_encoder": CLIPTextConfig,
    "adapter": NVSAdapterConfig,
    "schedule": NoiseSchedule,
}
"""What the keys of each section are arguments of."""
_CHOICES = {"image_preprocessing": ("none", "clip"), "unconditional_support": ("zeros", "noise")}
_DEPTHS = ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block")
_MAX_DEPTH = 100
"""Layers beyond this are a damaged number; building them would take forever."""
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip
"""With what diffusers, transformers and torch refuse settings that they cannot build."""


def read_config(path: Path) -> NVSModelConfig:
    """The configuration in a JSON file.

    Raises:
        InputError: the file cannot be read, or as `config_from_dict`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is this a model folder?") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON (line {error.lineno}); copy the file again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)}); copy the file again") from error
    return config_from_dict(values, str(path))


def config_from_dict(values: Any, source: str) -> NVSModelConfig:
    """A configuration from plain values.

    Raises:
        InputError: a key, also one inside a section, is unknown or missing, or a value is of the wrong kind; names
            `source` and the key.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: holds no settings but {type(values).__name__}; copy the file again")
    fields = {f.name: f for f in dataclasses.fields(NVSModelConfig)}
    _check_keys(values, set(fields), source)
    for name, about in sorted(fields.items()):
        optional = about.default is not dataclasses.MISSING or about.default_factory is not dataclasses.MISSING
        if name not in values and not optional:
            raise InputError(f"{source}: key '{name}' is missing; copy the file again")
    config = NVSModelConfig(**values)
    check_config(config, source)
    return config


def check_config(config: NVSModelConfig, source: str) -> None:
    """Look at every value's kind, the keys of all sections, and depths.

    Raises:
        InputError: names `source` and the key.
    """
    for section, builder in _SECTIONS.items():
        values = getattr(config, section)
        if not isinstance(values, dict):
            raise _wrong(source, section, values, "settings in braces")
        _check_keys(values, set(inspect.signature(builder).parameters) - {"self"}, f"{source}: {section}")
        for key in _DEPTHS:
            depths = values.get(key, 1)
            for depth in depths if isinstance(depths, (list, tuple)) else (depths,):
                if isinstance(depth, (int, float)) and not depth <= _MAX_DEPTH:
                    raise _wrong(source, f"{section}.{key}", depth, f"at most {_MAX_DEPTH}")
    if not isinstance(config.name, str):
        raise _wrong(source, "name", config.name, "text")
    for key in ("image_size", "text_tokens"):
        if type(value := getattr(config, key)) is not int or value < 1:
            raise _wrong(source, key, value, "a whole number above 0")
    for key in ("fov_deg", "distance"):
        if type(value := getattr(config, key)) not in (int, float) or not 0 < value < math.inf:
            raise _wrong(source, key, value, "a number above 0")
    for key, choices in _CHOICES.items():
        if (value := getattr(config, key)) not in choices:
            raise _wrong(source, key, value, f"one of {', '.join(choices)}")


@contextmanager
def building(source: str) -> Iterator[None]:
    """Turn what is raised while a model is built from settings into one line.

    Raises:
        InputError: names `source` and the reason.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except _REFUSALS as error:
        raise InputError(
            f"{source}: no model can be built with these settings ({one_line(error)}); give the files that belong "
            "together"
        ) from error


def _check_keys(values: dict[str, Any], known: set[str], source: str) -> None:
    # diffusers notes its own version and classes in keys with an underscore, and ignores them.
    unknown = sorted(str(key) for key in values if key not in known and not str(key).startswith("_"))
    if unknown:
        raise InputError(f"{source}: unknown key '{unknown[0]}'; known keys are {', '.join(sorted(known))}")


def _wrong(source: str, key: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{source}: {key} is {value!r:.60}; it must be {wanted}")
