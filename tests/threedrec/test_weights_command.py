"""``3drec weights``: what it prints, where files go, and how mistakes end."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import nvsadapter_guidance.checkpoints  # noqa: F401 - reads the catalogue, so before a test changes it
from nvsadapter_guidance import download as download_module
from nvsadapter_guidance import weight_files
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.http_download import SourceError
from nvsadapter_guidance.weight_files import RELEASED_CHECKPOINT, WEIGHT_FILES, WEIGHT_SETS, WeightFile
from threedrec import cli, weights_command

CONTENT = b"weights"


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    """A folder for checkpoints, an empty cache, and a small catalogue."""
    files = (
        WeightFile(
            "one.ckpt", "the first", "a licence", urls=("http://one/one.ckpt",), size=7, sha256=_digest(CONTENT)
        ),
        WeightFile("two.yaml", "the second", "a licence", hubs=("owner/two",)),
    )
    for module in (weight_files, weights_command):
        monkeypatch.setattr(module, "WEIGHT_FILES", files)
        monkeypatch.setattr(module, "WEIGHT_SETS", {"released": ("one.ckpt", "two.yaml"), "second": ("two.yaml",)})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def sources(monkeypatch):
    """What every source gives, None for nothing; the list of those asked."""
    given: dict[str, bytes | None] = {"http://one/one.ckpt": CONTENT, "owner/two": b"a: 1\n"}
    asked: list[str] = []

    def bring(source, file, target, on_progress):
        asked.append(source)
        if given.get(source) is None:
            raise SourceError("HTTP 404 Not Found")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(given[source])
        on_progress(len(given[source]), None)
        return "checked"

    monkeypatch.setattr(download_module, "_from", bring)
    return given, asked


@pytest.fixture
def weights(capsys):
    """Run ``3drec weights`` in this process; returns exit code, stdout and the last line of stderr."""

    def run(*arguments):
        try:
            code = cli.main(["weights", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]

    return run


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_list_says_what_is_here_and_what_is_not(weights, checkpoints):
    checkpoints.mkdir()
    (checkpoints / "two.yaml").write_text("a: 1")
    (checkpoints / "one.ckpt.part").write_bytes(b"wei")
    code, out, _ = weights("list")
    assert code == 0
    assert f"two.yaml: {checkpoints / 'two.yaml'}" in out
    assert f"one.ckpt: partly here: {checkpoints / 'one.ckpt.part'}" in out
    assert "a licence" in out and "http://one/one.ckpt" in out


def test_list_as_json(weights, checkpoints):
    code, out, _ = weights("list", "--json")
    first, second = json.loads(out)
    assert code == 0 and first["name"] == "one.ckpt" and first["path"] is None and first["size"] == 7
    assert second["sources"] == ["owner/two"] and second["sha256"] is None


def test_download_puts_a_set_into_the_checkpoints_folder(weights, sources, checkpoints):
    code, out, _ = weights("download")
    assert code == 0 and (checkpoints / "one.ckpt").read_bytes() == CONTENT and (checkpoints / "two.yaml").is_file()
    assert "one.ckpt: from http://one/one.ckpt (checked; a licence)" in out
    code, out, _ = weights("download", "one.ckpt")
    assert code == 0 and "was there (SHA-256 as published" in out and len(sources[1]) == 2


def test_download_elsewhere_and_from_elsewhere(weights, sources, tmp_path):
    sources[0]["my/own"] = b"b: 2\n"
    code, _, _ = weights("download", "second", "--to", tmp_path / "there", "--hub-id", "my/none", "--hub-id", "my/own")
    assert code == 0 and sources[1] == ["my/none", "my/own"]
    assert (tmp_path / "there" / "two.yaml").read_bytes() == b"b: 2\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("download", "thre.ckpt"), "no weights are known as 'thre.ckpt'; known are released, second, one.ckpt"),
        (("download", "released", "--url", "http://x/y"), "--url: is the address of one file"),
        (("download", "second", "--hub-id", "my/none"), "my/none: HTTP 404 Not Found"),
        (("verify", "--checksum"), "the following arguments are required: PATH"),
        (("convert", "x.ckpt"), "required: -o/--output"),
        ((), "required: ACTION"),
        (("fetch",), "invalid choice: 'fetch'"),
        (("list", "x=1"), "unknown argument"),
    ],
)
def test_mistakes_end_in_one_line_and_two(weights, sources, arguments, words):
    code, out, line = weights(*arguments)
    assert code == 2 and line.startswith("error: ") and words in line and not out


@dataclass
class Report:
    kind: str = "stable-diffusion"
    title: str = "Stable Diffusion 2.1"
    tensors: int = 3
    parameters: int = 12345
    bytes: int = 49380
    details: dict[str, str] = field(default_factory=lambda: {"precision": "float32"})


@pytest.fixture
def identify(monkeypatch):
    def look(path: Path, progress) -> Report:
        progress(1, 2)
        if path.read_bytes() != CONTENT:
            raise InputError(f"{path}: tensor 'a.weight' is missing; download it again")
        return Report()

    monkeypatch.setattr("nvsadapter_guidance.checkpoints.identify", look)


def test_verify_says_which_model_a_file_is(weights, identify, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(CONTENT)
    code, out, _ = weights("verify", tmp_path / "x.ckpt")
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path / 'x.ckpt'}: Stable Diffusion 2.1 (3 tensors, 12,345 parameters, 0.00 GB)",
        "  precision: float32",
    ]
    code, out, _ = weights("verify", tmp_path / "x.ckpt", "--json")
    assert json.loads(out)[0]["parameters"] == 12345


def test_verify_names_a_file_that_is_wrong(weights, identify, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"other")
    code, out, line = weights("verify", tmp_path / "x.ckpt")
    assert (code, out) == (2, "") and line.startswith(f"error: {tmp_path / 'x.ckpt'}: tensor 'a.weight' is missing")


@pytest.mark.parametrize(
    ("name", "published", "code", "words"),
    [
        ("one.ckpt", CONTENT, 0, "(as published)"),
        ("one.ckpt", b"others", 2, "is published; download the file again"),
        ("mine.ckpt", CONTENT, 0, "(no published checksum)"),
    ],
)
def test_verify_compares_checksums_when_asked(weights, identify, tmp_path, monkeypatch, name, published, code, words):
    files = (WeightFile("one.ckpt", "the first", "a licence", sha256=_digest(published)),)
    monkeypatch.setattr(weights_command, "WEIGHT_FILES", files)
    (tmp_path / name).write_bytes(CONTENT)
    found, out, line = weights("verify", tmp_path / name, "--checksum")
    assert found == code and words in out + line


def test_convert_reports_sizes_and_passes_its_options_on(weights, tmp_path, monkeypatch):
    calls = []

    def convert(source, output, *, config, use_ema, progress):
        calls.append((source, output, config, use_ema))
        progress("working")
        return {"adapter": 2_000_000, "text encoder": 1_500_000_000}

    monkeypatch.setattr("nvsadapter_guidance.checkpoints.convert_released", convert)
    source = tmp_path / "x.ckpt"
    source.write_bytes(bytes(300_000))
    code, out, _ = weights("convert", source, "-o", tmp_path / "out", "--config", "x.yaml", "--raw")
    assert code == 0 and calls == [(source, tmp_path / "out", Path("x.yaml"), False)]
    assert "adapter: 2.0 MB" in out and f"{tmp_path / 'out'}: 1,502.0 MB, from 0.3 MB" in out


def test_the_catalogue_is_consistent():
    names = [file.name for file in WEIGHT_FILES]
    assert len(set(names)) == len(names) and RELEASED_CHECKPOINT in names
    for file in WEIGHT_FILES:
        assert file.sources and file.licence
        assert all(url.startswith("https://") and url.endswith(file.name) for url in file.urls)
        assert all(hub.count("/") == 1 for hub in file.hubs)
        assert file.sha256 is None or len(file.sha256) == 64
    assert {name for files in WEIGHT_SETS.values() for name in files} <= set(names)


def test_the_page_on_weights_lists_the_catalogue(repository):
    page = (repository / "docs" / "weights.md").read_text(encoding="utf-8")
    for file in WEIGHT_FILES:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{file.name}`"))
        assert file.licence in row and (file.size is None or f"{file.size:,}" in row)
        assert file.sha256 is None or file.sha256 in row
        assert all(hub in page for hub in file.hubs)
