"""Shards: the release's layout, splits, resuming, broken objects; read back as the folder reads."""

import json
import runpy
import sys
import tarfile

import pytest
import torch
from zero123_objects import write_object

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.novel_view_data import FolderViews, find_shards, shard_views
from nvsadapter_guidance.training.shards import ShardOptions, ShardWriter, read_paths, split_names, stored_sample
from nvsadapter_guidance.training.zero123 import SampleOptions

NAMES = [f"object{index}" for index in range(5)]


@pytest.fixture
def base(tmp_path):
    for index, name in enumerate(NAMES):
        write_object(tmp_path / "base" / name, seed=index)
    return tmp_path / "base"


def members(shard):
    with tarfile.open(shard) as tar:
        return tar.getnames()


def test_a_shard_holds_the_files_unchanged_under_the_releases_names(base, tmp_path):
    writer = ShardWriter(NAMES[:2], base, tmp_path / "out", "objects")
    assert list(writer.write()) == NAMES[:2]
    assert [path.name for path in writer.shards] == ["objects_000000.tar"]
    expected = {f"{name}.{kind}_{view:03d}" for name in NAMES[:2] for kind in ("png", "npy") for view in range(12)}
    assert set(members(writer.shards[0])) == expected
    with tarfile.open(writer.shards[0]) as tar:
        assert tar.extractfile("object1.png_007").read() == (base / "object1" / "007.png").read_bytes()
        assert tar.extractfile("object1.npy_011").read() == (base / "object1" / "011.npy").read_bytes()


def test_limits_close_shards(base, tmp_path):
    writer = ShardWriter(NAMES, base, tmp_path / "count", "x", ShardOptions(max_objects=2))
    assert list(writer.write()) == NAMES
    assert [sorted({n.split(".")[0] for n in members(s)}) for s in writer.shards] == [NAMES[:2], NAMES[2:4], NAMES[4:]]
    writer = ShardWriter(NAMES[:3], base, tmp_path / "bytes", "x", ShardOptions(max_bytes=1))
    assert list(writer.write()) == NAMES[:3] and len(writer.shards) == 3


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(base, tmp_path):
    options = ShardOptions(max_objects=2)
    whole = ShardWriter(NAMES, base, tmp_path / "whole", "x", options)
    list(whole.write())
    running = ShardWriter(NAMES, base, tmp_path / "cut", "x", options).write()
    for _ in range(4):  # the second shard has its objects and is not finished
        next(running)
    running.close()
    again = ShardWriter(NAMES, base, tmp_path / "cut", "x", options)
    assert again.done == 2 and list(again.write()) == NAMES[2:]
    assert [s.read_bytes() for s in again.shards] == [s.read_bytes() for s in whole.shards]
    assert list(ShardWriter(NAMES, base, tmp_path / "cut", "x", options).write()) == []
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["x.json", *(f"x_00000{i}.tar" for i in range(3))]


def test_another_list_is_refused(base, tmp_path):
    list(ShardWriter(NAMES[:2], base, tmp_path, "x").write())
    with pytest.raises(InputError, match="is of another list or other limits"):
        ShardWriter(NAMES[:3], base, tmp_path, "x")
    with pytest.raises(InputError, match="is of another list or other limits"):
        ShardWriter(NAMES[:2], base, tmp_path, "x", ShardOptions(max_objects=1))
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(InputError, match=r"x\.json: cannot be read"):
        ShardWriter(NAMES[:2], base, tmp_path, "x")


def test_broken_objects_are_skipped_and_listed(base, tmp_path):
    (base / "object0" / "004.npy").unlink()
    (base / "object2" / "011.png").write_bytes(b"rubbish")
    writer = ShardWriter([*NAMES, "nowhere"], base, tmp_path / "out", "x")
    assert list(writer.write()) == [*NAMES, "nowhere"]
    assert [entry["name"] for entry in writer.broken] == ["object0", "object2", "nowhere"]
    reasons = [entry["reason"] for entry in json.loads((tmp_path / "out" / "x.json").read_text())["broken"]]
    assert reasons[0] == "object0: 004.npy is missing" and "011.png cannot be read" in reasons[1]
    assert {name.split(".")[0] for name in members(writer.shards[0])} == {"object1", "object3", "object4"}


def test_a_list_of_broken_objects_leaves_no_shard(tmp_path):
    writer = ShardWriter(["a", "b"], tmp_path, tmp_path / "out", "x")
    list(writer.write())
    assert writer.shards == [] and [path.name for path in (tmp_path / "out").iterdir()] == ["x.json"]


def test_shards_are_read_as_their_folders_are(base, tmp_path):
    writer = ShardWriter(NAMES, base, tmp_path / "out", "x", ShardOptions(max_objects=2))
    list(writer.write())
    options = SampleOptions(3, 16)
    found = {
        s["name"]: s for s in shard_views(find_shards(str(tmp_path / "out" / "x_*.tar")), options, seed=2, epoch=1)
    }
    folder = FolderViews(base, options, seed=2)
    folder.set_epoch(1)
    assert list(found) == folder.names
    for expected in folder:
        for key in ("support_rgb", "query_rgb", "c2w"):
            assert torch.equal(found[expected["name"]][key], expected[key])


def test_shuffled_shards_give_every_object_once_and_repeat_by_seed(base, tmp_path):
    list(ShardWriter(NAMES, base, tmp_path / "out", "x", ShardOptions(max_objects=1)).write())
    shards = find_shards(str(tmp_path / "out" / "x_{000000..000004}.tar"))

    def order(epoch):
        return [s["name"] for s in shard_views(shards, SampleOptions(1, 16), epoch=epoch, shuffle_buffer=10)]

    assert sorted(order(0)) == NAMES and order(0) == order(0)
    assert len({tuple(order(epoch)) for epoch in range(6)}) > 1


def test_workers_divide_the_shards(base, tmp_path):
    list(ShardWriter(NAMES, base, tmp_path / "out", "x", ShardOptions(max_objects=2)).write())
    data = shard_views(find_shards(str(tmp_path / "out" / "*.tar")), SampleOptions(1, 16))
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    assert sorted(sample["name"] for sample in loader) == NAMES


def test_missing_shards_and_members_are_named(tmp_path):
    with pytest.raises(InputError, match="meets no shard"):
        find_shards(str(tmp_path / "*.tar"))
    (tmp_path / "a_0.tar").touch()
    with pytest.raises(InputError, match="not all it counts"):
        find_shards(str(tmp_path / "a_{0..1}.tar"))
    assert find_shards("http://host/a_{0..1}.tar") == ["http://host/a_0.tar", "http://host/a_1.tar"]
    with pytest.raises(InputError, match="a lacks npy_003"):
        stored_sample({"__key__": "a", "png_003": b""})
    with pytest.raises(InputError, match="a lacks png_000"):
        stored_sample({"__key__": "a"})


def test_the_first_99_of_a_hundred_are_trained_on():
    train, valid = split_names([str(i) for i in range(250)])
    assert (len(train), len(valid)) == (247, 3) and train + valid == [str(i) for i in range(250)]


@pytest.mark.parametrize(
    ("content", "words"),
    [("{}", "is no list"), ("[]", "is no list"), ("[1]", "is no list"), ("[", "cannot be read"),
     ('["a", "a"]', "'a' is there twice"), ('["a.b"]', "'a.b' has a dot")],
)  # fmt: skip
def test_bad_lists_are_named(tmp_path, content, words):
    path = tmp_path / "paths.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_paths(path)


@pytest.fixture
def script(repository, monkeypatch, capsys):
    def run(*arguments):
        path = repository / "scripts" / "objaverse_renderings_to_webdataset.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        return stop.value.code, capsys.readouterr().err

    return run


def test_the_script_writes_both_splits(script, base, tmp_path, monkeypatch):
    (tmp_path / "paths.json").write_text(json.dumps(NAMES))
    monkeypatch.chdir(tmp_path / "base")
    line = [f"--paths_json_path={tmp_path / 'paths.json'}", f"--output_dir={tmp_path / 'out'}"]
    code, _ = script(*line)
    assert code == 0
    names = [f"objaverse_rendering_{split}{end}" for split in ("train", "valid") for end in (".json", "_000000.tar")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert {name.split(".")[0] for name in members(tmp_path / "out" / names[3])} == {"object4"}


def test_the_scripts_endings(script, base, tmp_path):
    (tmp_path / "paths.json").write_text(json.dumps([*NAMES, "gone"]))
    line = [f"--paths_json_path={tmp_path / 'paths.json'}", f"--basepath={base}", f"--output_dir={tmp_path / 'out'}"]
    code, said = script(*line)
    assert code == 1 and "1 objects were skipped" in said
    for wrong, words in (
        ("--paths_json_path=none.json", "none.json: no such file"),
        ("--basepath=no", "no such folder"),
    ):
        code, said = script(*line, wrong)
        assert code == 2 and said.strip().splitlines()[-1].startswith("error: ") and words in said
