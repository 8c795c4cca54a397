"""Reading config files: YAML, a recipe and the command line in, a checked ``ExperimentConfig`` out.

Order, later wins: the dataclasses' defaults, the YAML file, its recipe, the command line. Interpolations see the merged
result. Every problem of every source is reported at once, before any model is loaded.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from threedrec.config_build import Builder, Tree, default_tree, hint_at, unknown_components
from threedrec.config_resolvers import register_resolvers
from threedrec.config_schema import ExperimentConfig
from threedrec.config_values import takes_text_only
from threedrec.errors import InputError
from threedrec.files import write_text
from threedrec.lookup import find_path
from threedrec.recipes import AUTO, NONE, choose_recipe, recipe_file
from threedrec.registry import known_names

logger = logging.getLogger(__name__)

COMMAND_LINE = "command line"


@dataclass
class Source:
    """Config values from one place."""

    name: str
    """What error messages call it: a file, or the command line."""
    values: Tree


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
    device_type: str = "cpu",
) -> ExperimentConfig:
    """Read a config file.

    Args:
        path: YAML file; looked up from the current folder, then from the repository's root.
        overrides: ``dotted.key=value`` from the command line, values in YAML.
        values: a tree of values laid under ``overrides`` as they are (text is not interpolated).
        device_type: "cpu" or "cuda"; decides ``recipe: auto``.

    Raises:
        InputError: unreadable file, unknown key, wrong type or value out of range; lists all problems, each with its
            source, its dotted key and, for an unknown one, the nearest known key.
    """
    register_resolvers()
    file = find_path(path)
    typed = _escaped(dict(values or {}))
    typed_on_line = _parse_overrides(overrides)
    sources = [Source(str(path), read_yaml(file)), Source(COMMAND_LINE, _merge(typed, typed_on_line))]
    recipe = _recipe(sources, device_type)
    if recipe != NONE:
        sources.insert(1, Source(f"recipe {recipe}", read_yaml(recipe_file(recipe))))
    _take_text_literally(sources[-1].values, overrides, _merge(*(source.values for source in sources)))
    config = _build(sources)
    if recipe != NONE:
        logger.info("recipe %s for this model and device; recipe=NAME takes another, key=value changes a value", recipe)
    config.recipe = recipe if recipe != NONE or not config.resolved else config.recipe
    config.data.image_path = _found(config.data.image_path)
    return config


def dump_config(config: ExperimentConfig, path: str | Path) -> None:
    """Write the resolved config as YAML that loads to the same values, whatever becomes of the recipes."""
    tree = _escaped(_plain(asdict(config))) | {"resolved": True}
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(tree)))


def changed_keys(config: ExperimentConfig, path: Path) -> list[str]:
    """Return the dotted keys of ``config`` whose values differ from a dumped config, the run's own paths left out.

    Raises:
        InputError: ``path`` cannot be read.
    """
    own = ("resume", "timestamp", "trial_dir", "resolved", "recipe")
    before, now = dict(_leaves(read_yaml(path))), dict(_leaves(_escaped(_plain(asdict(config)))))
    return sorted(key for key, value in now.items() if key not in own and before.get(key, value) != value)


def read_yaml(path: Path) -> Tree:
    """Return the keys of a YAML file, interpolations untouched.

    Raises:
        InputError: missing, a folder, not readable, not YAML, or no group of keys.
    """
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file; the shipped ones are in configs/") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a config file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a text file") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or _one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: expected keys and values (`name: value` lines), got something else")
    tree = OmegaConf.to_container(loaded)
    return tree if isinstance(tree, dict) else {}  # type: ignore[return-value]


def _build(sources: Sequence[Source]) -> ExperimentConfig:
    def where(key: str) -> str:
        return next((source.name for source in reversed(sources) if _has(source.values, key)), sources[0].name)

    builder = Builder(where)
    merged = _merge(*(source.values for source in sources))
    kept = builder.check_keys(ExperimentConfig, merged)
    for key, what in unknown_components(ExperimentConfig, kept):
        builder.complain(key, what)
    tree = OmegaConf.create(_merge(default_tree(ExperimentConfig, kept), kept))
    config = builder.build(ExperimentConfig, tree)
    if config is not None and not builder.problems:
        _check_together(config, builder)
    builder.finish()
    return config


def _check_together(config: ExperimentConfig, builder: Builder) -> None:
    """Check what no single group of keys can know."""
    num_query = getattr(config.system.guidance, "num_query", None)
    camera = getattr(config.data, "random_camera", None)
    if num_query and camera is not None:
        sizes = camera.batch_size if isinstance(camera.batch_size, list) else [camera.batch_size]
        if any(size % num_query for size in sizes):
            builder.complain(
                "data.random_camera.batch_size",
                f"{camera.batch_size} must be multiples of system.guidance.num_query, which is {num_query}",
            )
    if not config.tag and not config.use_timestamp:
        builder.complain("tag", "must not be empty when use_timestamp is false")


def _recipe(sources: Sequence[Source], device_type: str) -> str:
    """Return the name of the recipe to lay over the file, or "none"."""
    file, line = (source.values for source in sources)
    asked = line.get("recipe", NONE if file.get("resolved") else file.get("recipe", NONE))
    if asked in (None, NONE):
        return NONE
    where = sources[1].name if "recipe" in line else sources[0].name
    if asked != AUTO:
        try:
            recipe_file(str(asked))
        except InputError as error:
            raise InputError(f"{where}: recipe: {error}") from None
        return str(asked)
    system = _merge(file, line).get("system")
    system = system if isinstance(system, Mapping) else {}
    guidance = system.get("guidance")
    guidance = guidance if isinstance(guidance, Mapping) else {}
    pretrained = guidance.get("pretrained_model_name_or_path") or guidance.get("pretrained", "auto")
    guidance_type = str(system.get("guidance_type", "nvsadapter-guidance"))
    if guidance_type not in known_names("guidance"):
        return NONE  # reported with all other problems
    return choose_recipe(guidance_type, str(pretrained), device_type)


def _parse_overrides(overrides: Sequence[str]) -> Tree:
    tree: Tree = {}
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problems.append(f"{COMMAND_LINE}: '{text}': expected key=value, such as trainer.max_steps=100")
            continue
        *groups, last = key.split(".")
        inside = tree
        for group in groups:
            if not isinstance(inside.get(group), dict):
                inside[group] = {}
            inside = inside[group]
        inside[last] = _yaml_value(value)
    if problems:
        raise InputError("\n  ".join(problems))
    return tree


def _yaml_value(text: str) -> Any:
    """Read one value as a YAML file would have it; text that is no YAML stays text."""
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
        return OmegaConf.to_container(parsed)["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException):
        return text


def _take_text_literally(line: Tree, overrides: Sequence[str], merged: Tree) -> None:
    """Replace values of text keys by what was typed: a file called ``1.png`` or ``[a] b: c.png`` is no YAML."""
    typed = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    for key, value in typed.items():
        hint = hint_at(ExperimentConfig, merged, key)
        if not takes_text_only(hint) or (hint is not str and value in ("", "null", "~", "None")):
            continue
        *groups, last = key.split(".")
        inside = line
        for group in groups:
            inside = inside[group]
        inside[last] = value


def _merge(*trees: Tree) -> Tree:
    """Merge nested dictionaries, later wins; lists and values are replaced, and so are groups by null."""
    merged: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            under = merged.get(key)
            merged[key] = _merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _has(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _escaped(value: Any) -> Any:
    """Protect text from interpolation."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _found(path: str) -> str:
    found = find_path(path)
    return path if not path or found == Path(path) else str(found)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
