"""The images that come with the project: usable, small, accounted for."""

import pytest

from threedrec.image import SingleImageConfig, load_support_view
from threedrec.lookup import find_path

NAMES = [
    "chair.png",
    "coffee.png",
    "cupcake.png",
    "mushroom.png",
    "pear_on_grey.jpg",
    "penguin.png",
    "robot.png",
    "teapot.png",
]


def test_exactly_these_images_are_there_and_small(repository):
    files = sorted((repository / "load" / "images").iterdir())
    assert [file.name for file in files] == NAMES
    assert sum(file.stat().st_size for file in files) < 1_500_000


def test_every_image_is_accounted_for(repository):
    readme = (repository / "load" / "README.md").read_text(encoding="utf-8")
    assert all(name in readme for name in NAMES)
    assert "Copyright (c) Microsoft Corporation" in readme and "CC0" in readme


@pytest.mark.parametrize("name", NAMES)
def test_every_image_loads_and_is_framed(repository, name):
    config = SingleImageConfig(image_path=str(repository / "load" / "images" / name), segmentation="auto")
    if name.endswith(".jpg"):
        config.segmentation = "plain"
    view = load_support_view(config, size=64)
    inside = view.mask[..., 0] > 0.5
    longer = max(int(inside.any(dim=axis).sum()) for axis in (0, 1))
    assert longer == pytest.approx(config.fill * 64, abs=1.01)
    assert view.rgb.min() >= 0 and view.rgb.max() <= 1
    assert view.rgb[0].min() == 1  # white around


def test_samples_are_found_from_the_source_folder(repository, monkeypatch):
    monkeypatch.chdir(repository / "3drec")
    assert find_path("./load/images/chair.png").is_file()
