"""Objects of Sweet Home 3D's furniture libraries that the base set of training meshes leaves out."""

import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nvsadapter_guidance.training.sources.objects import SourceObject, plain_part, slug, textured_part
from nvsadapter_guidance.training.sources.packages import debian_package

LICENCES = {"BlendSwap-CC-0": "CC0-1.0", "KatorLegaz": "CC-BY-3.0-US", "Scopia": "CC-BY-3.0"}
# The library BlendSwap-CC-BY is left alone, so that it can serve as an independent test.
PREFIXES = {"BlendSwap-CC-0": "bs0", "KatorLegaz": "kl", "Scopia": "sco"}
WANTED = {
    "BlendSwap-CC-0": "shippingContainer wardrobeWithSlidingDoors decorativePlant cuckooClock outdoorLamp"
    " plantie upperCornerCabinet radiator radiator2 islandExtension lowerCornerCabinet stove",
    "KatorLegaz": "porch-column-02 porch-column-03 concept-sedan-02 oil-servers trunk-large porch-light"
    " ashtray plate-and-ustensils",
    "Scopia": "little_lamp1 little_lamp3 candelabre escalator air-mattress bicycle"
    " round-swimming-pool casque desk_table deepFryerWithFrenchFries letters_box video-projector montre"
    " indoor-bike christmas_tree barnum sleepingBag islandBath"
    " kitchenHood jacuzzi clothes-horse elevator scie-egoine passage-a-niveau bonsai-tree",
}
GLASS = 0.3  # materials of a lower opacity are left out
PLAIN = (200, 200, 200, 255)  # of what has no material


def read_catalogue(text: str) -> list[dict[str, str]]:
    """Entries of a ``PluginFurnitureCatalog.properties``, in order: ``key#number=value`` lines by number."""
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)\s*=\s*(.*?)\s*$", text, re.MULTILINE):
        entries.setdefault(int(number), {})[key] = value
    return [entries[number] for number in sorted(entries)]


def furniture(cache: Path) -> Iterator[SourceObject]:
    """Chosen objects of sweethome3d-furniture."""
    root = debian_package("sweethome3d-furniture", cache)
    for library, names in WANTED.items():
        path = root / f"usr/share/sweethome3d/furniture/{library}.sh3f"
        wanted = set(names.split())
        with zipfile.ZipFile(path) as archive:
            text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
            files = set(archive.namelist())
        for entry in read_catalogue(text):
            model = entry["model"].removeprefix("/")
            stem = Path(model).stem
            if stem not in wanted or model not in files:
                continue
            yield SourceObject(
                name=f"{PREFIXES[library]}_{slug(stem)}",
                label=entry["name"],
                category=entry.get("category", ""),
                creator=entry.get("creator", ""),
                library=library,
                licence=LICENCES[library],
                source=f"sweethome3d-furniture: {library}.sh3f/{model}",
                load=partial(load_model, path, model, catalogue_size(entry), cache / "sh3f" / library),
            )


def catalogue_size(entry: dict[str, str]) -> list[float]:
    """Width, height and depth of a catalogue's entry, in its unit (cm)."""
    return [float(entry[key]) for key in ("width", "height", "depth")]


def load_model(library: Path, model: str, size: list[float], unpacked: Path) -> list[Any]:
    """Parts of an OBJ in a library, stretched to its size in the catalogue."""
    import trimesh

    folder = Path(model).parent.as_posix()
    with zipfile.ZipFile(library) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(f"{folder}/")])
    meshes = trimesh.load_scene(unpacked / model).dump()
    low, high = (function([mesh.bounds[i] for mesh in meshes], axis=0) for i, function in enumerate((np.min, np.max)))
    stretch = np.asarray(size) / np.maximum(high - low, 1e-9)
    parts = []
    for mesh in meshes:
        material = getattr(mesh.visual, "material", None)
        opacity = getattr(material, "kwargs", {}).get("d", 1.0)  # trimesh keeps what it does not know as read
        if float(np.ravel(opacity)[0]) < GLASS:
            continue
        colour = np.asarray(getattr(material, "diffuse", PLAIN)) / 255
        image, uv = getattr(material, "image", None), getattr(mesh.visual, "uv", None)
        points = (np.asarray(mesh.vertices) - low) * stretch
        if image is None or uv is None:
            parts.append(plain_part(points, mesh.faces, colour.tolist()))
        else:
            parts.append(textured_part(points, mesh.faces, uv, image.convert("RGB")))
    return parts
