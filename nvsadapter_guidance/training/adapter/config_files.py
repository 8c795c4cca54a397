"""From YAML files and `key=value` words to a checked `TrainConfig`. Later ones win; unknown keys are errors."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Dict

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.adapter.config import TrainConfig, check_config

_ADAPTER = "model.adapter"


def load_config(files: Sequence[Path], overrides: Sequence[str] = ()) -> TrainConfig:
    """Merge configuration files from left to right and `dotted.key=value` words (YAML values) on top.

    Raises:
        InputError: a file cannot be read, a key is unknown (names the nearest known one), a value has a wrong type or
            is out of range; names the file or the word.
    """
    merged = OmegaConf.structured(TrainConfig)
    for file in files:
        merged = _merge(merged, _read_yaml(file), str(file))
    for word in overrides:
        merged = _merge(merged, _parse_override(word), f"'{word}'")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(f"config: {_first_line(error)}") from error
    if not isinstance(config, TrainConfig):
        raise TypeError(f"a {type(config).__name__} came out of the config")
    check_config(config)
    return config


def dump_config(config: TrainConfig) -> str:
    """The whole configuration as YAML, which `load_config` reads."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _read_yaml(file: Path) -> Dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); give a file such as configs/adapter/base.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is not YAML ({_first_line(error)}); correct it") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds no keys; write `model:`, `data:`, `optim:` or `trainer:`")
    return values


def _parse_override(word: str) -> Dict[str, Any]:
    key, separator, text = word.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise InputError(f"'{word}' is no key=value, such as data.batch_size=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"'{word}': the value is not YAML ({_first_line(error)})") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(config: DictConfig, values: Dict[str, Any], source: str) -> DictConfig:
    _check_keys(values, TrainConfig, source)
    try:
        adapter = (values.get("model") or {}).get("adapter")
        if adapter is not None:
            # Types too: the options themselves are frozen, so the check is made on a copy.
            options = OmegaConf.structured(NVSAdapterConfig)
            OmegaConf.set_readonly(options, False)
            OmegaConf.merge(options, adapter)
        return OmegaConf.merge(config, values)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise InputError(f"{source}: {f'{key}: ' if key else ''}{_first_line(error)}") from error


def _check_keys(values: Mapping[str, Any], kind: Any, source: str, prefix: str = "") -> None:
    """Raise for the first key that `kind`, a dataclass, does not have."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in known:
            nearest = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean '{prefix}{nearest[0]}'?" if nearest else f"known here: {', '.join(known)}"
            raise InputError(f"{source}: unknown key '{path}'; {hint}")
        inner = NVSAdapterConfig if path == _ADAPTER else known[str(key)].type
        if not dataclasses.is_dataclass(inner):
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{source}: '{path}' is a group of keys, not a value; write '{path}.key'")
        _check_keys(value, inner, source, f"{path}.")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
