"""From a tree of YAML values to typed dataclasses, with every problem found on the way.

The tree has the shape of the dataclasses. Where a dataclass leaves a part to a component (``geometry`` beside
``geometry_type``), the part takes the shape of that component's ``Config``.
"""

import dataclasses
import logging
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from threedrec.config_values import InvalidValueError, check_limits, convert
from threedrec.errors import InputError
from threedrec.registry import config_class, nearest

logger = logging.getLogger(__name__)

Tree = dict[str, Any]


@dataclass
class Slot:
    """One key that a config may have."""

    name: str
    hint: Any
    """Its type; a dataclass for a group of keys."""
    field: Field[Any]

    @property
    def group(self) -> type | None:
        """The dataclass of a group of keys (optional or not), None for a value."""
        arms = typing.get_args(self.hint) or (self.hint,)
        return next((arm for arm in arms if isinstance(arm, type) and dataclasses.is_dataclass(arm)), None)


def slots(cls: type, values: Mapping[str, Any]) -> Iterator[Slot]:
    """Yield the keys of a dataclass; ``values`` (the tree at its place) name the components.

    The part of an unknown component takes any shape; ``unknown_components`` is what complains about it.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind = field.metadata.get("component")
        if kind:
            try:
                hint = config_class(kind, str(_component_name(cls, kind, values)))
            except InputError:
                hint = Any
        yield Slot(field.name, hint, field)


def unknown_components(cls: type, values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the problem of every component whose name is unknown."""
    for field in dataclasses.fields(cls):
        kind = field.metadata.get("component")
        if kind:
            try:
                config_class(kind, str(_component_name(cls, kind, values)))
            except InputError as error:
                yield _join(path, f"{kind}_type"), str(error)
    for slot in slots(cls, values):
        inside = values.get(slot.name)
        if slot.group is not None and isinstance(inside, Mapping):
            yield from unknown_components(slot.group, inside, _join(path, slot.name))


def default_tree(cls: type, values: Mapping[str, Any]) -> Tree:
    """Return the defaults of a dataclass as a tree, components resolved by the names in ``values``."""
    tree: Tree = {}
    for slot in slots(cls, values):
        default = _field_default(slot.field)
        inside = values.get(slot.name)
        if slot.group is not None and (default is not None or inside is not None):
            tree[slot.name] = default_tree(slot.group, inside if isinstance(inside, Mapping) else {})
            if dataclasses.is_dataclass(default):
                _overlay(tree[slot.name], default)
        elif default is not MISSING:
            tree[slot.name] = _as_tree(default)
    return tree


def hint_at(cls: type, values: Mapping[str, Any], key: str) -> Any:
    """Return the declared type of a dotted key, None where there is no such key."""
    name, _, rest = key.partition(".")
    slot = next((slot for slot in slots(cls, values) if slot.name == name), None)
    if slot is None or not rest:
        return slot and slot.hint
    inside = values.get(name)
    return hint_at(slot.group, inside if isinstance(inside, Mapping) else {}, rest) if slot.group else None


class Builder:
    """Builds the typed config and gathers what is wrong; ``where(key)`` names the source of a dotted key."""

    def __init__(self, where: Callable[[str], str]) -> None:
        self.where = where
        self.problems: list[str] = []

    def complain(self, key: str, what: str) -> None:
        """Note one problem of one dotted key."""
        self.problems.append(f"{self.where(key)}: {key}: {what}")

    def finish(self) -> None:
        """Raise all problems as one InputError."""
        if len(self.problems) == 1:
            raise InputError(self.problems[0])
        if self.problems:
            raise InputError(f"{len(self.problems)} problems:\n  " + "\n  ".join(self.problems))

    def check_keys(self, cls: type, values: Mapping[str, Any], path: str = "") -> Tree:
        """Complain about every key of ``values`` that ``cls`` does not have; return what is left without them."""
        known = {slot.name: slot for slot in slots(cls, values)}
        kept: Tree = {}
        for name, value in values.items():
            key = _join(path, str(name))
            if name not in known:
                self.complain(key, f"unknown key{self._suggestion(str(name), path, list(known))}")
            elif (group := known[name].group) is None:
                kept[name] = value
            elif isinstance(value, Mapping):
                kept[name] = self.check_keys(group, value, key)
            elif value is not None:
                self.complain(key, f"expected a group of keys, got {value!r}")
        return kept

    def build(self, cls: type, node: DictConfig, path: str = "") -> Any:
        """Return the dataclass ``cls`` filled from a complete tree, or None after complaining."""
        before = len(self.problems)
        arguments = {slot.name: self._slot(slot, node, _join(path, slot.name)) for slot in slots(cls, node)}
        if len(self.problems) > before:
            return None
        try:
            return cls(**arguments)
        except (InputError, ValueError, TypeError) as error:
            self.problems.append(f"{self.where(path)}: {_prefixed(str(error), path, arguments)}")
            return None

    def _slot(self, slot: Slot, node: DictConfig, key: str) -> Any:
        try:
            value = node[slot.name]
        except OmegaConfBaseException as error:
            self.complain(key, _first_line(error))
            return None
        if slot.group is not None and isinstance(value, DictConfig):
            return self.build(slot.group, value, key)
        try:
            return self._value(slot, value, key)
        except InvalidValueError as problem:
            self.complain(key, str(problem))
        except OmegaConfBaseException as error:
            self.complain(key, _first_line(error))
        return None

    def _value(self, slot: Slot, value: Any, key: str) -> Any:
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        group = _dict_group(slot.hint)
        if group is not None and isinstance(value, DictConfig):
            return {name: self._member(group, name, value, key) for name in value}
        converted = convert(plain, slot.hint)
        check_limits(converted, slot.hint, slot.field.metadata)
        if "ignored" in slot.field.metadata and converted not in slot.field.metadata["harmless"]:
            logger.warning("%s: %s is ignored: %s", self.where(key), key, slot.field.metadata["ignored"])
        return converted

    def _member(self, group: type, name: Any, value: DictConfig, key: str) -> Any:
        if not isinstance(value[name], DictConfig):
            raise InvalidValueError(f"{name}: expected a group of keys, got {value[name]!r}")
        inside: Any = OmegaConf.to_container(value[name])
        kept = self.check_keys(group, inside, f"{key}.{name}")
        tree = OmegaConf.create(default_tree(group, kept) | kept)
        return self.build(group, tree, f"{key}.{name}")

    def _suggestion(self, name: str, path: str, known: list[str]) -> str:
        near = nearest(name, known)
        if near:
            return near if not path else near.replace("'", f"'{path}.", 1)
        return f" (known here: {', '.join(known)})"


def _dict_group(hint: Any) -> type | None:
    """Return the dataclass of the values of ``dict[str, SomeConfig]`` (optional or not)."""
    for arm in typing.get_args(hint) if typing.get_origin(hint) is not dict else (hint,):
        inner = typing.get_args(arm)
        if typing.get_origin(arm) is dict and dataclasses.is_dataclass(inner[1]):
            return inner[1]  # type: ignore[return-value]
    return None


def _prefixed(message: str, path: str, arguments: Mapping[str, Any]) -> str:
    """Complete the dotted key at the head of a message that a dataclass raised about its own fields."""
    head = re.split(r"[:. ]", message, maxsplit=1)[0]
    parent, _, last = path.rpartition(".")
    if not path or message.startswith(f"{path}.") or message.startswith(f"{path}:"):
        return message
    if head == last:
        return _join(parent, message)
    return f"{path}.{message}" if head in arguments else f"{path}: {message}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _component_name(cls: type, kind: str, values: Mapping[str, Any]) -> Any:
    name = values.get(f"{kind}_type")
    if name:
        return name
    return next(_field_default(field) for field in dataclasses.fields(cls) if field.name == f"{kind}_type")


def _field_default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _overlay(tree: Tree, default: Any) -> None:
    """Put the values of a dataclass over the tree of its class; components keep the defaults of their own class."""
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            _overlay(tree[field.name], value)
        elif "component" not in field.metadata:
            tree[field.name] = _as_tree(value)


def _as_tree(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _as_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_as_tree(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_tree(item) for key, item in value.items()}
    return value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
