"""Which images a batch finds, and what it says of the rest."""

import os
from pathlib import Path

import pytest

from threedrec.batch.folders import result_folders
from threedrec.batch.inputs import find_inputs, hash_file, hash_inputs
from threedrec.batch_command import sort_words
from threedrec.errors import InputError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def found(sources, output: Path) -> tuple[list[str], dict[str, str]]:
    inputs = find_inputs([str(source) for source in sources], output)
    return [image.name for image in inputs.images], dict(inputs.skipped)


def test_folders_are_read_recursively_and_what_is_left_out_is_said(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpg", "deep/er/ünï 写真.webp", "old.gif", "notes.txt", ".hidden.png", ".git/x.png")
    names, skipped = found([tmp_path], tmp_path / "out")
    assert names == ["a.jpg", "b.PNG", "deep/er/ünï 写真.webp", "old.gif"]
    assert skipped == {"notes.txt": "is no image by its name", ".hidden.png": "is hidden", ".git": "is hidden"}


def test_links_that_lead_in_circles_and_folders_met_twice(tmp_path):
    touch(tmp_path, "in/z/real.png", "elsewhere/far.png")
    os.symlink("..", tmp_path / "in" / "z" / "up")
    os.symlink("z", tmp_path / "in" / "a-link")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "far")
    os.symlink("self", tmp_path / "in" / "self")
    os.symlink("z/real.png", tmp_path / "in" / "linked.png")
    names, skipped = found([tmp_path / "in"], tmp_path / "out")
    assert names == ["far/far.png", "linked.png", "z/real.png"]
    assert skipped["z/up"] == "is the same folder as ." and skipped["a-link"] == "is the same folder as z"
    assert skipped["self"] == "is no image by its name"


def test_the_output_folder_is_never_searched(tmp_path):
    touch(tmp_path, "a.png", "out/objects/a.png/save/input.png")
    names, skipped = found([tmp_path], tmp_path / "out")
    assert names == ["a.png"] and skipped == {"out": "is the output folder"}


def test_maps_beside_an_image_belong_to_it(tmp_path):
    touch(tmp_path, "chair_rgba.png", "chair_depth.png", "cup.jpg", "cup_normal.png", "sea_depth.png")
    names, skipped = found([tmp_path], tmp_path / "out")
    assert names == ["chair_rgba.png", "cup.jpg", "sea_depth.png"]
    assert skipped == {"chair_depth.png": "belongs to chair_rgba.png", "cup_normal.png": "belongs to cup.jpg"}


def test_patterns_files_and_several_sources(tmp_path, monkeypatch):
    touch(tmp_path, "p/1.png", "p/q/2.png", "p/q/3.jpg", "p/[x].png", "scan")
    monkeypatch.chdir(tmp_path)
    assert found(["p/**/*.png"], tmp_path / "out")[0] == ["1.png", "[x].png", "q/2.png"]
    assert found(["p/*"], tmp_path / "out")[0] == ["1.png", "[x].png", "q/2.png", "q/3.jpg"]
    assert found(["p/[x].png"], tmp_path / "out")[0] == ["[x].png"]
    assert found(["scan"], tmp_path / "out")[0] == ["scan"]
    assert found(["p/q", "p/1.png"], tmp_path / "out")[0] == ["1.png", "q/2.png", "q/3.jpg"]


@pytest.mark.parametrize(
    "source, words",
    [("nothing", "no such file or folder"), ("no*.png", "matches no file"), ("empty", "holds no image")],
)
def test_sources_without_images(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "empty/readme.md")
    with pytest.raises(InputError, match=words):
        find_inputs([source], tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_locked_folder_is_a_problem_of_its_own(tmp_path):
    touch(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "locked").chmod(0)
    images = find_inputs([str(tmp_path)], tmp_path / "out").images
    (tmp_path / "locked").chmod(0o700)
    assert [image.name for image in images] == ["a.png", "locked"]
    assert images[1].problem == "the folder cannot be opened: Permission denied"


def test_a_name_that_is_no_text_is_a_problem_of_its_own(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(b"b")
    images = find_inputs([str(tmp_path)], tmp_path / "out").images
    assert {image.name: image.problem for image in images} == {
        "a.png": "",
        "\udcff.png": "its name is no valid UTF-8; rename it",
    }
    assert hash_inputs(images)["\udcff.png"] is None


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("nowhere", tmp_path / "dangling.png")
    images = find_inputs([str(tmp_path)], tmp_path / "out").images
    assert hash_inputs(images) == {
        "a.png": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2, example B.1
        "dangling.png": None,
        "pipe.png": None,
    }
    assert hash_file(str(tmp_path)) is None


def test_a_changed_map_is_a_changed_input(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    images = find_inputs([str(tmp_path)], tmp_path / "out").images
    hashes = [hash_inputs(images)["a.png"]]
    for content in (b"far", b"near"):
        (tmp_path / "a_depth.png").write_bytes(content)
        hashes.append(hash_inputs(images)["a.png"])
    assert len(set(hashes)) == 3
    (tmp_path / "a_depth.png").unlink()
    assert hash_inputs(images)["a.png"] == hashes[0]


def test_no_two_images_share_a_folder():
    names = [
        "chair.png",
        "chair.jpg",
        "Chair.png",
        "a/chair.png",
        "e\u0301.png",
        "\xe9.png",
        "a:b.png",
        "a_b.png",
        "\udcff.png",
    ]
    folders = result_folders(names, {})
    assert folders["chair.jpg"] == "objects/chair.jpg" and folders["a/chair.png"] == "objects/a/chair.png"
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    for folder in folders.values():
        folder.encode()
        assert ":" not in folder
    # A newcomer takes nobody's folder.
    before = {"Chair.png": "objects/Chair.png"}
    assert result_folders(["CHAIR.png", "Chair.png"], before)["Chair.png"] == "objects/Chair.png"
    assert result_folders(["CHAIR.png", "Chair.png"], before)["CHAIR.png"].startswith("objects/CHAIR.png-")


def test_names_too_long_for_a_disk_are_cut():
    long = "写" * 80 + ".png"
    folders = result_folders([long, "b" * 251 + ".png", "..png"], {})
    assert all(len(part.encode()) <= 255 for folder in folders.values() for part in folder.split("/"))


def test_values_and_images_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a=b.png")
    words = ["photos", "a=b.png", "trainer.max_steps=3", "x*=y.png"]
    assert sort_words(words) == (["photos", "a=b.png", "x*=y.png"], ["trainer.max_steps=3"])
