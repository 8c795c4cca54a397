import json
import struct
import zipfile

import numpy as np
import pytest
import trimesh
from PIL import Image

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import read_index
from nvsadapter_guidance.training.sources import packages
from nvsadapter_guidance.training.sources.catalogues import zero_ad
from nvsadapter_guidance.training.sources.collect import Lookalikes, collect, known_shapes
from nvsadapter_guidance.training.sources.furniture import catalogue_size, load_model, read_catalogue
from nvsadapter_guidance.training.sources.g3d import read_g3d
from nvsadapter_guidance.training.sources.objects import (
    SourceObject,
    Tidying,
    extents,
    plain_part,
    slug,
    team_coloured,
    textured_part,
    tidy,
)
from nvsadapter_guidance.training.sources.pyrogenesis import load_actor, read_pmd

RED = (1.0, 0.0, 0.0)
POINTS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def box(extents=(1.0, 2.0, 3.0), colour=(0.2, 0.4, 0.6)):
    mesh = trimesh.creation.box(extents)
    return [plain_part(mesh.vertices, mesh.faces, colour)]


def source_object(name, load):
    return SourceObject(name, name.title(), "Things", "Somebody", "library", "CC0-1.0", f"package: {name}", load)


def run(objects, folder, lookalikes=None, taken=frozenset()):
    results = collect(
        objects, folder, options=Tidying(), lookalikes=lookalikes or Lookalikes(), taken=set(taken), thinnest=0.03
    )
    return {item.name: reason for item, reason in results}


def test_tidied_parts_are_centred_with_the_farthest_vertex_at_half():
    parts = tidy([*box(), plain_part(POINTS + 5, FACES, (1, 1, 1))], Tidying())
    points = np.concatenate([part.vertices for part in parts])
    np.testing.assert_allclose((points.min(axis=0) + points.max(axis=0)) / 2, 0, atol=1e-9)
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(0.5)


def test_tidying_decimates_and_shrinks_pictures():
    ball = trimesh.creation.icosphere(subdivisions=4)
    uv = ball.vertices[:, :2] / 2 + 0.5
    (part,) = tidy(
        [textured_part(ball.vertices, ball.faces, uv, Image.new("RGB", (400, 100), "red"))],
        Tidying(faces=1000, texture=64),
    )
    assert len(part.faces) == pytest.approx(1000, rel=0.1)
    assert part.visual.material.baseColorTexture.size == (64, 16)
    np.testing.assert_allclose(part.visual.uv, part.vertices[:, :2] + 0.5, atol=0.05)


@pytest.mark.parametrize("parts", [[], [plain_part(np.full((3, 3), np.nan), [[0, 1, 2]], RED)]], ids=["none", "nan"])
def test_tidying_refuses_what_has_no_shape(parts):
    with pytest.raises(InputError):
        tidy(parts, Tidying())


def test_team_colour_shows_where_alpha_is_low():
    image = Image.fromarray(np.array([[[0, 0, 200, 255], [0, 0, 200, 0]]], dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(team_coloured(image, RED)), [[[0, 0, 200], [255, 0, 0]]])
    with pytest.raises(InputError, match="no alpha"):
        team_coloured(Image.new("RGB", (2, 2)), RED)


def test_slugs_are_plain():
    assert slug("Props/Helmet-01 (é).xml") == "props_helmet_01_xml"


def test_collecting_writes_meshes_and_their_index(tmp_path):
    objects = [source_object("box", box), source_object("cube", lambda: box((1, 1, 1)))]
    assert run(objects, tmp_path) == {"box": "", "cube": ""}
    entries = read_index(tmp_path)
    assert entries[0] == {
        "file": "box.glb",
        "label": "Box",
        "category": "Things",
        "creator": "Somebody",
        "library": "library",
        "licence": "CC0-1.0",
        "source": "package: box",
        "faces": 12,
        "faces_original": 12,
        "textured": False,
        "extents": [0.267, 0.535, 0.802],
    }
    parts = trimesh.load_scene(tmp_path / "box.glb").dump()
    np.testing.assert_allclose(extents(parts), [0.267, 0.535, 0.802], atol=1e-3)
    colour = np.asarray(parts[0].visual.material.baseColorTexture.convert("RGB"))[0, 0]
    np.testing.assert_allclose(colour, [51, 102, 153], atol=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box.glb", "cube.glb", "index.json"]


def test_collecting_leaves_out_lookalikes_flat_things_broken_ones_and_taken_names(tmp_path):
    def broken():
        raise InputError("nothing to read")

    objects = [
        source_object("box", box),
        source_object("bigger", lambda: box((2.0, 4.0, 6.0))),
        source_object("red", lambda: box(colour=(0.9, 0.1, 0.1))),
        source_object("sheet", lambda: box((1.0, 1.0, 0.01))),
        source_object("broken", broken),
        source_object("chair", lambda: box((1.0, 1.0, 2.0))),
    ]
    assert run(objects, tmp_path, taken={"chair"}) == {
        "box": "",
        "bigger": "looks like another one",
        "red": "",
        "sheet": "flat",
        "broken": "nothing to read",
        "chair": "there already",
    }


def test_a_cut_run_goes_on_without_taking_anything_twice(tmp_path):
    objects = [source_object("box", box), source_object("cube", lambda: box((1, 1, 1)))]
    run(objects[:1], tmp_path)
    again = Lookalikes()
    assert known_shapes(tmp_path, again) == {"box"}
    twin = source_object("twin", box)
    assert run([*objects, twin], tmp_path, again) == {
        "box": "there already",
        "cube": "",
        "twin": "looks like another one",
    }
    assert [entry["file"] for entry in read_index(tmp_path)] == ["box.glb", "cube.glb"]


def test_shapes_kept_for_validation_are_ruled_out_in_any_colour(tmp_path):
    run([source_object("box", box)], tmp_path / "validation")
    lookalikes = Lookalikes()
    taken = known_shapes(tmp_path / "validation", lookalikes, any_colour=True)
    red = source_object("red", lambda: box((2, 4, 6), colour=(0.9, 0.1, 0.1)))
    cube = source_object("cube", lambda: box((1, 1, 1)))
    assert run([red, cube], tmp_path / "new", lookalikes, taken) == {"red": "looks like another one", "cube": ""}


def test_a_damaged_index_is_one_clear_error(tmp_path):
    (tmp_path / "index.json").write_text("[{")
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        run([source_object("box", box)], tmp_path)


def g3d_content(version, points, faces, texture="", properties=0):
    uv = np.tile([[0.25, 0.75]], (len(points), 1)).astype("<f4")
    frames = np.stack([points, points + 9]).astype("<f4")
    triangles = faces.astype("<u4")
    sizes = (2, len(points), triangles.size)
    if version == 4:
        header = struct.pack("<3sBHB", b"G3D", 4, 1, 0) + struct.pack("<64s3I", b"part", *sizes)
        header += struct.pack("<8f2I", 0.5, 0.25, 0.75, *[0.0] * 5, properties, bool(texture))
        header += struct.pack("<64s", texture.encode()) if texture else b""
        body = [frames, frames, uv, triangles] if texture else [frames, frames, triangles]
    else:
        header = struct.pack("<3sBI", b"G3D", 3, 1)
        header += struct.pack("<7I64s", 2, 2, 1, 1, len(points), triangles.size, properties, texture.encode())
        body = [frames, frames, uv, np.ones((1, 4), "<f4"), triangles]
    return header + b"".join(array.tobytes() for array in body)


@pytest.mark.parametrize("version", [3, 4])
def test_a_glest_model_is_read_in_its_first_frame(tmp_path, version):
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(tmp_path / "skin.png")
    path = tmp_path / "unit.g3d"
    path.write_bytes(g3d_content(version, POINTS, FACES, "skin.png", properties=1 if version == 4 else 4))
    (part,) = read_g3d(path, RED)
    np.testing.assert_allclose(part.vertices, POINTS)
    np.testing.assert_array_equal(part.faces, FACES)
    np.testing.assert_allclose(part.visual.uv[0], [0.25, 0.75])
    assert part.visual.material.baseColorTexture.getpixel((0, 0)) == (255, 0, 0), "alpha 0 is the team's colour"


def test_a_glest_model_without_a_texture_has_its_colour(tmp_path):
    path = tmp_path / "unit.g3d"
    path.write_bytes(g3d_content(4, POINTS, FACES))
    (part,) = read_g3d(path, RED)
    assert part.visual.material.baseColorTexture.getpixel((0, 0)) == (128, 64, 191)


@pytest.mark.parametrize("content", [b"", b"G3D\x09", g3d_content(4, POINTS, FACES)[:-8]], ids=["empty", "v9", "cut"])
def test_a_damaged_glest_model_is_refused(tmp_path, content):
    path = tmp_path / "unit.g3d"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"unit\.g3d"):
        read_g3d(path, RED)


def pmd_content(points, faces, props=()):
    content = struct.pack("<4sIIII", b"PSMD", 4, 0, len(points), 1)
    for point in points:
        content += struct.pack("<8f", *point, 0, 0, 1, 0.5, 0.5) + b"\xff" * 4 + struct.pack("<4f", 0, 0, 0, 0)
    content += struct.pack("<I", len(faces)) + faces.astype("<u2").tobytes()
    content += struct.pack("<I7f", 1, *[0.0] * 7) + struct.pack("<I", len(props))
    for name, shift in props:
        content += struct.pack("<I", len(name)) + name.encode() + struct.pack("<7fB", *shift, 0, 0, 0, 1, 0xFF)
    return content


@pytest.fixture
def art(tmp_path):
    """A house that wears a red picture, with a hut hanging on its roof."""
    for folder in ("actors", "meshes", "textures/skins"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "meshes/house.dae.cached.pmd").write_bytes(pmd_content(POINTS, FACES, [("prop-roof", (0, 10, 1))]))
    (tmp_path / "meshes/hut.dae.cached.pmd").write_bytes(pmd_content(POINTS, FACES))
    Image.new("RGBA", (8, 8), (200, 0, 0, 255)).save(tmp_path / "textures/skins/wall.png.cached.dds", "dds")
    actor = """<actor version="1"><group>
        <variant frequency="0"><mesh>wrong.dae</mesh></variant>
        <variant frequency="1"><mesh>{mesh}.dae</mesh><props>{prop}</props></variant></group>
        <group><variant><textures><texture file="wall.png" name="baseTex"/></textures></variant></group>
        <material>{material}</material></actor>"""
    hut = '<prop actor="hut.xml" attachpoint="roof"/><prop actor="missing.xml" attachpoint="root"/>'
    (tmp_path / "actors/house.xml").write_text(actor.format(mesh="house", prop=hut, material="player_trans.xml"))
    (tmp_path / "actors/hut.xml").write_text(actor.format(mesh="hut", prop="", material="default.xml"))
    (tmp_path / "actors/bush.xml").write_text(actor.format(mesh="hut", prop="", material="basic_trans.xml"))
    return tmp_path


def test_an_actor_is_put_together_with_its_props_and_faces_plus_z(art):
    house, hut = load_actor(art, "house.xml", (0.0, 1.0, 0.0))
    np.testing.assert_allclose(house.vertices, POINTS * [1, 1, -1])
    np.testing.assert_allclose(hut.vertices, (POINTS + [0, 10, 1]) * [1, 1, -1])
    assert house.visual.material.baseColorTexture.getpixel((0, 0)) == (200, 0, 0)
    before = trimesh.Trimesh(POINTS, FACES).volume
    assert trimesh.Trimesh(house.vertices, house.faces).volume == pytest.approx(before), "still inside out or outside"


def test_the_catalogue_of_a_game_is_read_from_its_archive(art, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "0ad-data/usr/share/games/0ad/mods/public"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "public.zip", "w") as archive:
        archive.write(art / "actors/hut.xml", "art/actors/structures/a_first.xml")
        for path in (path for path in art.rglob("*") if path.is_file()):
            name = path.relative_to(art).as_posix().replace("actors/", "actors/structures/")
            archive.write(path, f"art/{name}")
        archive.write(art / "actors/hut.xml", "art/actors/structures/a_decal.xml")
        archive.writestr("audio/song.ogg", "")
    for _ in range(2):  # unpacked, then found unpacked
        (hut,) = (item for item in zero_ad(cache) if "hut" in item.name)
        assert (hut.name, hut.licence) == ("zad_structures_hut", "CC-BY-SA-3.0")
        assert hut.source == "0ad-data: public.zip/art/actors/structures/hut.xml"
        assert len(hut.load()) == 1
    assert not any("decal" in item.name for item in zero_ad(cache))
    assert sorted(path.name for path in cache.iterdir()) == ["0ad-art", "0ad-data"]


def test_what_lies_underground_is_lifted(art):
    parts = load_actor(art, "house.xml", RED, ground=1.5)
    assert min(part.vertices[:, 1].min() for part in parts) == 1.5
    assert parts[0].vertices[2, 1] == 2.0


@pytest.mark.parametrize("name", ["bush.xml", "none.xml"])
def test_flat_cut_outs_and_missing_actors_are_refused(art, name):
    with pytest.raises(InputError, match=name.split(".")[0]):
        load_actor(art, name, RED)


@pytest.mark.parametrize("content", [b"", b"PSMD\x09" + bytes(30), pmd_content(POINTS, FACES)[:-20]])
def test_a_damaged_pmd_is_refused(content):
    with pytest.raises(InputError, match=r"\.pmd"):
        read_pmd(content)


def test_furniture_is_stretched_to_the_catalogue_and_loses_its_glass(tmp_path):
    obj = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n"
    obj += "usemtl wood\nf 1 3 2\nf 1 2 4\nf 1 4 3\nusemtl pane\nf 2 3 4\n"
    mtl = "newmtl wood\nKd 0.6 0.4 0.2\nnewmtl pane\nKd 1 1 1\nd 0.1\n"
    with zipfile.ZipFile(tmp_path / "library.sh3f", "w") as archive:
        archive.writestr("things/a/a.obj", obj)
        archive.writestr("things/a/a.mtl", mtl)
    entry = read_catalogue("name#2=Later\nname#1=Table top\nwidth#1 = 20\nheight#1=30\ndepth#1=40\n")[0]
    assert entry["name"] == "Table top"
    parts = load_model(tmp_path / "library.sh3f", "things/a/a.obj", catalogue_size(entry), tmp_path / "unpacked")
    np.testing.assert_allclose(extents(parts), [20, 30, 40])
    assert len(parts) == 1 and len(parts[0].faces) == 3
    assert parts[0].visual.material.baseColorTexture.getpixel((0, 0)) == (153, 102, 51)


def test_packages_that_are_there_are_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("downloaded"))
    (tmp_path / "some-data").mkdir()
    (tmp_path / "pictures-1.0").mkdir()
    assert packages.debian_package("some-data", tmp_path) == tmp_path / "some-data"
    assert packages.npm_package("@scope/pictures", "1.0", tmp_path) == tmp_path / "pictures-1.0"


def test_a_machine_without_apt_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt-get is not on this machine"):
        packages.debian_package("some-data", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_index_entries_are_json(tmp_path):
    run([source_object("box", box)], tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())[0]["source"] == "package: box"
