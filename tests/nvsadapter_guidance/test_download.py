"""Downloads from a local server: cuts, mirrors, checksums, full disks, and what is left behind."""

import contextlib
import hashlib
import http.server
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from nvsadapter_guidance import http_download
from nvsadapter_guidance.download import HUB_STAGING, download, sha256_of
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.http_download import SourceError, fetch, part_of
from nvsadapter_guidance.weight_files import WeightFile

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes by path; ``cut_after`` breaks that many answers off in the middle."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/model.ckpt": CONTENT}
        self.cut_after = 0
        self.ranges = True
        self.tells_end = self.tells_length = True
        self.tag = '"one"'
        self.content_type = "application/octet-stream"
        self.requests: list[tuple[str, str | None]] = []

    def url(self, path: str = "/model.ckpt") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if asked and self.server.ranges and self.headers.get("If-Range", self.server.tag) == self.server.tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(content):
            self.send_response(416)
            if self.server.tells_end:
                self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        rest = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("ETag", self.server.tag)
        self.end_headers()
        if self.server.cut_after > 0:
            self.server.cut_after -= 1
            rest = rest[: len(rest) // 2]
        with contextlib.suppress(ConnectionError):  # of a client that asked for the length alone
            self.wfile.write(rest)

    def log_message(self, *values: object) -> None:
        """Silence."""


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(http_download.time, "sleep", lambda seconds: None)


def model(*urls: str, size: int | None = len(CONTENT), sha256: str | None = DIGEST) -> WeightFile:
    return WeightFile("model.ckpt", "a model", "a licence", urls=urls, size=size, sha256=sha256)


def test_a_file_arrives_checked_with_progress_and_nothing_beside_it(server, tmp_path):
    seen = []
    done = download(model(server.url()), tmp_path / "new", on_progress=lambda *step: seen.append(step))
    assert done.path.read_bytes() == CONTENT and done.source == server.url() and "as published" in done.checked
    assert os.listdir(tmp_path / "new") == ["model.ckpt"]
    assert (len(CONTENT), len(CONTENT)) in seen


def test_what_is_there_is_checked_and_not_fetched_again(server, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(CONTENT)
    assert download(model(server.url()), tmp_path).source == "" and not server.requests


def test_a_cut_download_goes_on_where_it_was(server, tmp_path):
    server.cut_after = 2
    fetch(server.url(), tmp_path / "x.part")
    assert (tmp_path / "x.part").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.requests[1:] == [("/model.ckpt", f"bytes={half}-"), ("/model.ckpt", f"bytes={half + half // 2}-")]


def test_a_later_command_goes_on_where_an_earlier_one_was_killed(server, tmp_path):
    part_of(tmp_path / "model.ckpt").write_bytes(CONTENT[:1000])
    assert download(model(server.url()), tmp_path).path.read_bytes() == CONTENT
    assert server.requests == [("/model.ckpt", "bytes=1000-")]


def test_a_whole_part_needs_no_more_bytes(server, tmp_path):
    part_of(tmp_path / "model.ckpt").write_bytes(CONTENT)
    assert download(model(server.url()), tmp_path).path.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_whole_part_is_kept_where_the_server_does_not_tell_the_end(server, tmp_path, size):
    server.tells_end = False
    part = part_of(tmp_path / "model.ckpt")
    part.write_bytes(CONTENT)
    os.utime(part, (1, 1))
    path = download(model(server.url(), size=size), tmp_path).path
    assert path.read_bytes() == CONTENT and path.stat().st_mtime == 1


@pytest.mark.parametrize("tells_end", [True, False])
def test_a_part_that_is_longer_than_the_file_begins_anew(server, tmp_path, tells_end):
    server.tells_end = tells_end
    (tmp_path / "x.part").write_bytes(CONTENT + b"more")
    fetch(server.url(), tmp_path / "x.part")
    assert (tmp_path / "x.part").read_bytes() == CONTENT


def test_a_part_is_kept_where_nobody_knows_the_end(server, tmp_path):
    server.tells_end = server.tells_length = False
    (tmp_path / "x.part").write_bytes(CONTENT)
    with pytest.raises(SourceError, match="gives nothing after the 1,048,576 bytes"):
        fetch(server.url(), tmp_path / "x.part")
    assert (tmp_path / "x.part").read_bytes() == CONTENT


def test_another_version_on_the_server_begins_anew(server, tmp_path):
    part = tmp_path / "x.part"
    part.write_bytes(b"old" * 100)
    part.with_name("x.part.tag").write_text('"zero"')
    fetch(server.url(), part)
    assert part.read_bytes() == CONTENT


def test_a_server_without_ranges_begins_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / "x.part").write_bytes(b"old")
    fetch(server.url(), tmp_path / "x.part")
    assert (tmp_path / "x.part").read_bytes() == CONTENT


def test_mirrors_are_tried_in_order(server, tmp_path):
    done = download(model(server.url("/gone"), server.url(), server.url("/never")), tmp_path)
    assert done.source == server.url()
    assert [path for path, _ in server.requests] == ["/gone", "/model.ckpt"]


def test_a_wrong_checksum_is_refused_and_the_next_mirror_taken(server, tmp_path):
    server.files["/wrong"] = CONTENT[::-1]
    done = download(model(server.url("/wrong"), server.url()), tmp_path)
    assert done.path.read_bytes() == CONTENT
    with pytest.raises(InputError, match="SHA-256 is .* is published") as caught:
        download(model(server.url("/wrong")), tmp_path / "other")
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()


def test_a_wrong_size_is_refused_before_anything_arrives(server, tmp_path):
    with pytest.raises(SourceError, match=r"offers 1,048,576 bytes where the file has 7"):
        fetch(server.url(), tmp_path / "x.part", size=7)
    assert not (tmp_path / "x.part").exists()


def test_nothing_anywhere_names_every_source(server, tmp_path):
    with pytest.raises(InputError) as caught:
        download(model(server.url("/a"), server.url("/b")), tmp_path / "new")
    message = str(caught.value)
    assert message.startswith("model.ckpt: cannot be downloaded") and message.count("HTTP 404") == 2
    assert "--hub-id" in message and "\n" not in message and not (tmp_path / "new").exists()


def test_a_server_that_always_cuts_is_given_up_but_its_bytes_are_kept(server, tmp_path):
    server.cut_after = 10**9
    with pytest.raises(SourceError, match="cut after"):
        fetch(server.url(), tmp_path / "x.part")
    assert CONTENT.startswith((tmp_path / "x.part").read_bytes()) and (tmp_path / "x.part").stat().st_size > 1000


def test_a_web_page_is_no_checkpoint(server, tmp_path):
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(InputError, match="web page"):
        download(model(server.url(), size=None, sha256=None), tmp_path)


def test_without_a_published_checksum_it_says_so(server, tmp_path):
    assert "no published checksum" in download(model(server.url(), size=None, sha256=None), tmp_path).checked


def test_a_disk_that_fills_up_is_one_line_that_names_the_file(server, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    part_of(tmp_path / "model.ckpt").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"model\.ckpt\.part: cannot be written: No space left") as caught:
        download(model(server.url()), tmp_path)
    assert "--to" in str(caught.value) and not (tmp_path / "model.ckpt").exists()


def test_a_disk_without_room_is_refused_at_once(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 10, 1000))
    with pytest.raises(InputError, match="needed and the disk has"):
        download(model(server.url()), tmp_path)
    assert not (tmp_path / "model.ckpt.part").exists()


def test_a_half_file_in_the_target_s_place_is_named(server, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(CONTENT[:10])
    with pytest.raises(InputError, match=r"has 10 bytes .* rename it to model\.ckpt\.part"):
        download(model(server.url()), tmp_path)


@pytest.mark.parametrize("url", ["nonsense://x", "file:///etc/passwd"])
def test_an_address_that_is_none(tmp_path, url):
    with pytest.raises(InputError, match="no http or https address"):
        download(model(url), tmp_path)


def test_checksums_of_files(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    assert sha256_of(tmp_path / "x") == DIGEST


class FakeHub:
    """Stands for ``huggingface_hub``: repositories by name, LFS checksums as entity tags."""

    def __init__(self, monkeypatch, repositories, tag=DIGEST):
        self.asked = []
        self.repositories, self.tag = repositories, tag
        for name in ("hf_hub_download", "get_hf_file_metadata"):
            monkeypatch.setattr(f"huggingface_hub.{name}", getattr(self, name))

    def hf_hub_download(self, repository, name, local_dir):
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.asked.append(repository)
        content = self.repositories[repository]
        if isinstance(content, Exception):
            raise content
        if content is None:
            raise LocalEntryNotFoundError("404 Client Error.\n\nRepository Not Found")
        (Path(local_dir) / ".cache").mkdir(parents=True)
        path = Path(local_dir) / name
        path.write_bytes(content)
        return str(path)

    def get_hf_file_metadata(self, url):
        return namedtuple("metadata", "etag")(self.tag)


def hub_file(sha256: str | None = DIGEST) -> WeightFile:
    return WeightFile("model.ckpt", "a model", "a licence", hubs=("a/gone", "b/wrong", "c/right"), sha256=sha256)


@pytest.mark.parametrize("sha256", [DIGEST, None])
def test_hubs_are_tried_in_order_and_checked(tmp_path, monkeypatch, sha256):
    hub = FakeHub(monkeypatch, {"a/gone": None, "b/wrong": CONTENT[::-1], "c/right": CONTENT})
    done = download(hub_file(sha256), tmp_path)
    assert (done.source, hub.asked) == ("c/right", ["a/gone", "b/wrong", "c/right"])
    assert done.path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["model.ckpt"]
    assert "as published" in done.checked


def test_unfinished_downloads_of_other_files_stay(tmp_path, monkeypatch):
    FakeHub(monkeypatch, {"c/right": CONTENT})
    other = tmp_path / HUB_STAGING / "other.ckpt" / "c--right" / "x.incomplete"
    other.parent.mkdir(parents=True)
    other.touch()
    download(hub_file(), tmp_path, sources=["c/right"])
    assert other.exists() and not (tmp_path / HUB_STAGING / "model.ckpt").exists()


@pytest.mark.parametrize("arrived", [b"", b"half"])
def test_a_hub_that_cannot_be_reached_leaves_nothing_but_what_had_arrived(tmp_path, monkeypatch, arrived):
    def cut(repository, name, local_dir):
        marks = Path(local_dir) / ".cache" / "huggingface" / "download"
        marks.mkdir(parents=True)
        (marks / f"{name}.lock").touch()
        (marks / f"{name}.abc.incomplete").write_bytes(arrived)
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cut)
    with pytest.raises(InputError, match="no connection"):
        download(hub_file(), tmp_path / "new", sources=["a/b"])
    assert [path.read_bytes() for path in tmp_path.rglob("*.incomplete")] == ([arrived] if arrived else [])
    assert (tmp_path / "new").exists() == bool(arrived)


def test_another_hub_can_be_named(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, {"my/own": CONTENT}, tag="0123")
    done = download(hub_file(sha256=None), tmp_path, sources=["my/own"])
    assert hub.asked == ["my/own"] and "no published checksum" in done.checked


def test_a_full_disk_under_the_hub_s_client(tmp_path, monkeypatch):
    FakeHub(monkeypatch, {"a/gone": OSError(28, "No space left on device")})
    with pytest.raises(InputError, match="cannot be written: No space left"):
        download(hub_file(), tmp_path)
