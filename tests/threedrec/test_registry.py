import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from threedrec import registry
from threedrec.errors import InputError


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


class Plugin:
    @dataclass
    class Config:
        strength: float = 2.0


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in registry.KINDS for name in registry._BUILT_IN[kind]]
)
def test_every_built_in_component_has_a_config(kind, name):
    assert registry.find(kind, name)
    registry.config_class(kind, name)()  # every key has a default


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(InputError) as caught:
        registry.find("geometry", "implict-volume")
    assert "'implict-volume', did you mean 'implicit-volume'? (known: implicit-volume" in str(caught.value)


def test_unknown_kind():
    with pytest.raises(InputError, match="did you mean 'geometry'"):
        registry.find("geometri", "implicit-volume")
    with pytest.raises(InputError, match="unknown kind"):
        registry.register("lens", "fisheye")


def test_register_makes_known_and_replaces():
    registry.register("guidance", "mine")(Plugin)
    assert registry.find("guidance", "mine") is Plugin
    assert registry.config_class("guidance", "mine") is Plugin.Config
    assert "mine" in registry.known_names("guidance")
    registry.register("guidance", "nvsadapter-guidance")(Plugin)
    assert registry.find("guidance", "nvsadapter-guidance") is Plugin


def test_entry_points_are_loaded_when_asked_for(monkeypatch):
    points = [
        EntryPoint("exporter.mine", f"{__name__}:Plugin", registry.ENTRY_POINT_GROUP),
        EntryPoint("exporter.broken", "no_such_module:Thing", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "_entry_points", lambda path: points)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    assert registry.known_names("exporter") == ["broken", "mesh-exporter", "mine"]
    assert registry.find("exporter", "mine").__name__ == "Plugin"
    with pytest.raises(InputError, match="no_such_module"):
        registry.find("exporter", "broken")


def test_packages_are_read_once_until_the_path_changes(monkeypatch):
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [])
    registry._entry_points.cache_clear()
    for kind in registry.KINDS:
        registry.known_names(kind)
    assert asked == [registry.ENTRY_POINT_GROUP]
    monkeypatch.syspath_prepend("/nowhere")
    registry.known_names("exporter")
    assert len(asked) == 2
    registry._entry_points.cache_clear()


def test_a_component_without_config_is_refused():
    registry.register("material", "bare")(type("Bare", (), {}))
    with pytest.raises(InputError, match="no dataclass `Config`"):
        registry.config_class("material", "bare")


def test_importing_the_registry_imports_no_component():
    code = "import sys, threedrec.registry; print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
