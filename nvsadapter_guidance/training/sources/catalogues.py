"""Which objects each source offers: one function a source, each yielding what :mod:`.collect` converts."""

import colorsys
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from nvsadapter_guidance.training.sources import furniture
from nvsadapter_guidance.training.sources.emoji_solids import drawn_inflation, inflate
from nvsadapter_guidance.training.sources.g3d import read_g3d
from nvsadapter_guidance.training.sources.objects import SourceObject, slug
from nvsadapter_guidance.training.sources.packages import debian_package, npm_package
from nvsadapter_guidance.training.sources.pyrogenesis import load_actor

EMOJI, EMOJI_VERSION = "@lobehub/fluent-emoji-3d", "1.1.0"
YELLOW_FACES = ((0x1F600, 0x1F644), (0x1F910, 0x1F92F), (0x1F970, 0x1F97A), (0x1FAE0, 0x1FAE8))
UNWANTED_EMOJI = re.compile(
    r"(?i)squared|arrow|button|sign|clock face|regional|keycap|symbol|triangle|large .*(circle|square)|mark|emoji modif"
    r"|negative|ideograph|capricorn|aries|taurus|gemini|cancer|leo$|virgo|libra|scorpius|sagittarius|aquarius|pisces"
    r"|sparkle|trigram|cross$|black (?!.*(cat|heart))|input|circled|moon symbol|with .*arrow|star of|om$|peace|no "
)
ART_FOLDERS = {
    "fauna": 1,
    "structures": 2,
    "special": 1,
    "campaigns/structures": 1,
    "units": 1,
    "props/special/eyecandy": 1,
    "props/units/helmets": 5,
    "props/units/weapons": 8,
    "props/units/shields": 10,
    "geology": 4,
    "fungi": 1,
}
"""Folders of 0 A.D.'s actors, and which of each to look at: every one, every fifth... of those that are much alike."""
UNWANTED_ACTORS = re.compile(
    r"fndn|destruct|plot_|decal|ambient|water|field|grass|marker|foundation|_rubble|garrison|flag|smoke|bolt|arrow"
    r"|cover|gate_door|blood|line|rope|sand|path|road|plane|banner|cloth|net|shadow|shoreline|dead|decor|_fin|fish\\."
    r"|wall_(short|medium)|rubble|_props|(^|/)old|crest|plume|settlement|curtain|delimitator|_hair|pivot"
)
AFLOAT = re.compile(r"ship|reme|merchant|penteconter|lembos|barge|junk|boat|raft|trier|juggernaut|wreck|canoe")


def team_colour(name: str) -> tuple[float, float, float]:
    """A strong colour (sRGB, 0..1) that depends on a name alone."""
    seed = zlib.crc32(name.encode())
    return colorsys.hsv_to_rgb((seed % 360) / 360, 0.6 + 0.4 * (seed // 360 % 100) / 100, 0.9)


def emoji(cache: Path) -> Iterator[SourceObject]:
    """Fluent emoji, inflated; no skin tones, flags, keycaps or joined ones, few signs and every third plain face."""
    folder = npm_package(EMOJI, EMOJI_VERSION, cache) / "assets"
    for number, path in enumerate(sorted(folder.glob("*.webp"))):
        codes = [int(code, 16) for code in path.stem.split("-")]
        letters = [code for code in codes if code != 0xFE0F]
        # Several letters are joined, toned and flags; of eight neighbours, often much alike, five will do.
        if len(letters) != 1 or number % 8 in (2, 5, 7):
            continue
        label = unicodedata.name(chr(letters[0]), path.stem).capitalize()
        yellow_face = any(first <= letters[0] <= last for first, last in YELLOW_FACES)
        if UNWANTED_EMOJI.search(label) or (yellow_face and letters[0] % 3):
            continue
        yield SourceObject(
            name=f"emo_{slug(path.stem)}",
            label=label,
            category="Emoji",
            creator="Microsoft (Fluent Emoji), packaged by LobeHub",
            library="fluent-emoji-3d",
            licence="MIT",
            source=f"npm {EMOJI} {EMOJI_VERSION}: assets/{path.name}",
            load=partial(_inflated, path, f"emo_{path.stem}", "face" not in label.lower()),
        )


def _inflated(path: Path, name: str, two_sided: bool) -> list[object]:
    with Image.open(path) as image:
        return inflate(image.convert("RGBA"), drawn_inflation(name, two_sided))


def zero_ad(cache: Path) -> Iterator[SourceObject]:
    """Animals, buildings, siege engines, ships, arms and things of 0 A.D. (0ad-data)."""
    art = _unzipped_art(debian_package("0ad-data", cache), cache / "0ad-art")
    actors = art / "actors"
    for folder, step in ART_FOLDERS.items():
        for path in sorted((actors / folder).rglob("*.xml"))[::step]:
            name = path.relative_to(actors).as_posix()
            # Men and riders are put together from props on bones, which stay in their resting pose.
            if UNWANTED_ACTORS.search(name) or (folder == "units" and "siege" not in path.stem):
                continue
            key = f"zad_{slug(name.removesuffix('.xml'))}"
            ground = -0.2 if folder.endswith("structures") and not AFLOAT.search(name) else None
            yield SourceObject(
                name=key,
                label=path.stem.replace("_", " ").capitalize(),
                category=folder,
                creator="Wildfire Games",
                library="0ad-data",
                licence="CC-BY-SA-3.0",
                source=f"0ad-data: public.zip/art/actors/{name}",
                load=partial(load_actor, art, name, team_colour(key), ground=ground),
            )


def _unzipped_art(package: Path, target: Path) -> Path:
    """Actors, meshes and their textures of 0ad-data's archive, unpacked once."""
    if not target.is_dir():
        partial_target = target.with_name(f".{target.name}.part")
        with zipfile.ZipFile(package / "usr/share/games/0ad/mods/public/public.zip") as archive:
            wanted = ("art/actors/", "art/meshes/", "art/textures/skins/")
            archive.extractall(partial_target, [n for n in archive.namelist() if n.startswith(wanted)])
        (partial_target / "art").rename(target)
        partial_target.rmdir()
    return target


def megaglest(cache: Path) -> Iterator[SourceObject]:
    """Units, buildings and landmarks of MegaGlest (megaglest-data)."""
    root = debian_package("megaglest-data", cache)
    units = sorted(path for path in root.rglob("units/*/models") if "/factions/" in path.as_posix())
    found = [(path.parent.name, path.parts[-4], _standing(path)) for path in units]
    landmarks = re.compile(r"statue|obelisk|cross|birdbath|skull")
    tilesets = sorted(root.rglob("tilesets/*/models/*.g3d"))
    # Tilesets share their statues, in the colours of the season: one of each will do.
    found += list(
        {path.stem: (path.stem, path.parts[-3], path) for path in tilesets if landmarks.search(path.stem)}.values()
    )
    for label, owner, path in found:
        if path is None:
            continue
        key = f"mgl_{slug(owner)}_{slug(label)}"
        yield SourceObject(
            name=key,
            label=label.replace("_", " ").capitalize(),
            category=owner,
            creator="The Glest Team, The MegaGlest Team",
            library="megaglest-data",
            licence="CC-BY-SA-3.0",
            source=f"megaglest-data: {path.relative_to(root).as_posix()}",
            load=partial(read_g3d, path, team_colour(key)),
        )


def _standing(models: Path) -> Path | None:
    """The model of a unit at rest: the one called so, else the shortest name."""
    files = sorted(models.glob("*.g3d"), key=lambda path: (len(path.stem), path.stem))
    moving = re.compile(r"dying|construct|destr|attack|walk|repair|build|harvest|upgrad|charg|arrow|dead|particle")
    still = [path for path in files if not moving.search(path.stem)]
    return next((path for path in still if "standing" in path.stem), still[0] if still else None)


SOURCES: dict[str, Callable[[Path], Iterator[SourceObject]]] = {
    "emoji": emoji,
    "0ad": zero_ad,
    "megaglest": megaglest,
    "furniture": furniture.furniture,
}
