"""Which weights are chosen, and what is said when they are missing."""

from pathlib import Path

import pytest

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import MINI_MODEL
from nvsadapter_guidance.weight_files import find_weight_file
from nvsadapter_guidance.weights import RELEASED_CHECKPOINT, RELEASED_CONFIG, choose_weights


@pytest.fixture(autouse=True)
def _nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("THREEDREC_CHECKPOINTS", raising=False)


def test_auto_falls_back_to_the_embedded_model_and_says_how_to_get_the_other() -> None:
    choice = choose_weights("auto")
    assert (choice.family, choice.path) == ("mini", MINI_MODEL)
    assert (
        RELEASED_CHECKPOINT in choice.reason and "3drec weights download" in choice.reason and "\n" not in choice.reason
    )


@pytest.mark.parametrize("place", ["checkpoints", "hub/models--a--b/snapshots/0", "elsewhere"])
def test_released_weights_are_found_and_taken(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(tmp_path / "elsewhere"))
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / RELEASED_CHECKPOINT).touch()
    assert choose_weights("released").family == "released"
    assert choose_weights("mini").family == "mini"
    choice = choose_weights("auto")
    assert choice.family == "released" and RELEASED_CHECKPOINT in choice.reason and choice.path.is_file()


def test_released_weights_that_are_missing_are_an_error_with_names_sizes_and_commands() -> None:
    with pytest.raises(InputError) as caught:
        choose_weights("released")
    message = str(caught.value)
    assert all(
        part in message
        for part in (RELEASED_CHECKPOINT, RELEASED_CONFIG, "GB", "kB", "3drec weights download", "checkpoints")
    )
    assert "\n" not in message


def test_a_folder_in_the_cache_of_the_hub_is_no_weight_file(tmp_path: Path) -> None:
    (tmp_path / "hub/models--a--b/snapshots/0/unet").mkdir(parents=True)
    assert find_weight_file("unet") is None


def test_a_path_that_leads_nowhere_is_named() -> None:
    with pytest.raises(InputError, match="^weights: none at 'no/such/model'"):
        choose_weights("no/such/model")
