"""Components by the names that configs use.

Built-in components are a table of import paths, so that asking for one imports that one and nothing else. Another
package joins in either way:

* at import: ``@register("guidance", "my-guidance")`` above its class;
* by installation: an entry point in the group ``threedrec.plugins``, named ``<kind>.<name>``, that refers to the class
  (``guidance.my-guidance = "my_package.guidance:MyGuidance"``). It is imported when a config asks for it.

Every registered class carries a dataclass ``Config`` (or is one): the keys, types and defaults of its part of the
config file, see ``config_class``.
"""

import dataclasses
import difflib
import functools
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, TypeVar

from threedrec.errors import InputError

Component = TypeVar("Component", bound=type)

ENTRY_POINT_GROUP = "threedrec.plugins"

_BUILT_IN: dict[str, dict[str, str]] = {
    "data": {"single-image-datamodule": "threedrec.image:SingleImageConfig"},
    "system": {"nvsadapter-system": "threedrec.reconstruct:Reconstruction"},
    "geometry": {"implicit-volume": "threedrec.field.volume:ImplicitVolume"},
    "material": {
        "diffuse-with-point-light-material": "threedrec.rendering.shading:DiffusePointLight",
        "no-material": "threedrec.rendering.shading:NoMaterial",
    },
    "background": {
        "solid-color-background": "threedrec.field.background:SolidBackground",
        "neural-environment-map-background": "threedrec.field.background:NeuralEnvironmentMap",
    },
    "renderer": {"nerf-volume-renderer": "threedrec.rendering.renderer:VolumeRenderer"},
    "guidance": {"nvsadapter-guidance": "threedrec.guidance.nvsadapter:NVSAdapterGuidance"},
    "exporter": {"mesh-exporter": "threedrec.mesh.exporter:MeshExporter"},
}

KINDS = tuple(_BUILT_IN)
"""The kinds of component that a config can name (``<kind>_type``)."""

_registered: dict[tuple[str, str], type] = {}


def register(kind: str, name: str) -> Callable[[Component], Component]:
    """Class decorator that makes a component known under ``name``; a later registration replaces an earlier one.

    Raises:
        InputError: ``kind`` is none of ``KINDS``.
    """
    _check_kind(kind)

    def decorate(cls: Component) -> Component:
        _registered[kind, name] = cls
        return cls

    return decorate


def known_names(kind: str) -> list[str]:
    """Return the sorted names of ``kind``, without importing any component."""
    _check_kind(kind)
    registered = {name for registered_kind, name in _registered if registered_kind == kind}
    return sorted(registered | set(_BUILT_IN[kind]) | set(_plugins(kind)))


def find(kind: str, name: str) -> Any:
    """Return the class registered as ``name``, importing its module now.

    Raises:
        InputError: unknown kind or name (with the nearest known one), or the plugin that has it cannot be imported.
    """
    _check_kind(kind)
    if (kind, name) in _registered:
        return _registered[kind, name]
    plugins = _plugins(kind)
    if name in plugins:
        return _load_plugin(kind, name, plugins[name])
    if name not in _BUILT_IN[kind]:
        raise InputError(_unknown(kind, name))
    module, attribute = _BUILT_IN[kind][name].split(":")
    return getattr(importlib.import_module(module), attribute)


def config_class(kind: str, name: str) -> type:
    """Return the dataclass that types the config of a component.

    Raises:
        InputError: unknown name, or a plugin's class without a dataclass ``Config``.
    """
    component = find(kind, name)
    config = getattr(component, "Config", component)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise InputError(f"{kind} '{name}': {component!r} has no dataclass `Config`")
    return config


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``", did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""


def _check_kind(kind: str) -> None:
    if kind not in _BUILT_IN:
        raise InputError(f"unknown kind of component '{kind}'{nearest(kind, KINDS)} (known: {', '.join(KINDS)})")


def _plugins(kind: str) -> dict[str, EntryPoint]:
    prefix = f"{kind}."
    found = _entry_points(tuple(sys.path))
    return {point.name.removeprefix(prefix): point for point in found if point.name.startswith(prefix)}


@functools.lru_cache(maxsize=1)
def _entry_points(path: tuple[str, ...]) -> EntryPoints:
    """Plugins of the packages on ``path``; to read about all packages takes up to 30 ms, and is asked for 50 times."""
    return entry_points(group=ENTRY_POINT_GROUP)


def _load_plugin(kind: str, name: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"{kind} '{name}': its plugin {point.value} cannot be imported: {error}") from error


def _unknown(kind: str, name: str) -> str:
    known = known_names(kind)
    return f"unknown {kind} '{name}'{nearest(name, known)} (known: {', '.join(known)})"
