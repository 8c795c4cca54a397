import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from threedrec import files
from threedrec.errors import InputError
from threedrec.files import atomic_folder, atomic_path, read_json, write_json, write_text


def test_a_written_file_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".txt"
        temporary.write_text("hello")
        assert not target.exists()
    assert target.read_text() == "hello"
    assert [file.name for file in target.parent.iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(KeyError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyError("something else")
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_reported_with_the_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.bin: cannot be written: the disk is full; free some space"):
        with atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("PytorchStreamWriter failed writing file data/0"), ValueError("I/O error: (os error 28)")]
)
def test_a_full_disk_seen_by_a_library_is_reported_alike(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(InputError, match="the disk is full"), atomic_path(tmp_path / "a.pt"):
        raise error


def test_an_unwritable_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/a\.txt: cannot be written: part of its path is a file"):
        write_text(tmp_path / "file" / "a.txt", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: cannot be written: a folder of that name is in the way"):
        write_text(tmp_path / "folder", "")


def test_an_unrelated_os_error_of_the_block_passes_through(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out" / "a.txt"):
        (tmp_path / "missing").read_text()


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_kept(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    leftover = tmp_path / f".a.txt.{files._host()}-{int(dead.stdout)}.tmp.txt"
    living = tmp_path / f".a.txt.{files._host()}-{os.getppid()}.tmp.txt"
    leftover.write_text("half")
    living.write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert not leftover.exists() and living.exists()


def test_files_of_a_folder_appear_together_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise KeyError
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "kept").write_text("0")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a", "b", "kept"]


def test_json_round_trip_of_what_runs_produce(tmp_path: Path) -> None:
    value = {"a": torch.tensor(1.5), "b": np.float32(2), "c": [float("nan"), np.arange(2)], "d": Path("x/y"), "e": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {"a": 1.5, "b": 2.0, "c": [None, [0, 1]], "d": "x/y", "e": None}
    json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_reading_bad_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json: not a JSON file"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"missing\.json: no such file"):
        read_json(tmp_path / "missing.json")
