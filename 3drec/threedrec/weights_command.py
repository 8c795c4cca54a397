"""The command ``3drec weights``: list, download, verify and convert weight files."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvsadapter_guidance.weight_files import (
    WEIGHT_FILES,
    WEIGHT_SETS,
    WeightFile,
    checkpoint_folders,
    download_folder,
    find_weight_file,
    known_files,
)
from threedrec.errors import InputError
from threedrec.terminal import add_message_options

if TYPE_CHECKING:
    from nvsadapter_guidance.checkpoints import CheckpointReport
    from nvsadapter_guidance.http_download import OnProgress

EXAMPLES = """\
examples:
  3drec weights list
  3drec weights download released                     # NVS-Adapter on Stable Diffusion 2.1, about 10 GB
  3drec weights download sd21 --hub-id owner/name     # from a repository of your choice
  3drec weights verify checkpoints/base_query_4_step_200000.ckpt
  3drec weights convert checkpoints/base_query_4_step_200000.ckpt -o checkpoints/nvsadapter-sd21

Files go to ./checkpoints, or to the folder in THREEDREC_CHECKPOINTS; every command looks there and in the Hugging Face
cache. A download that was cut goes on where it was. Behind a mirror of the Hugging Face hub set HF_ENDPOINT.
The weights are under licences of their own, which `3drec weights list` names.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the four subcommands and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="which files are known, and which of them are here")
    listing.add_argument("--json", action="store_true", help="as JSON on stdout")
    fetch = actions.add_parser("download", help="fetch files by name; goes on where an earlier attempt was cut")
    fetch.add_argument(
        "names", metavar="NAME", nargs="*", help=f"{', '.join(WEIGHT_SETS)}, or a file's name (default: released)"
    )
    fetch.add_argument("--to", metavar="DIR", default=None, help="folder for the files (default: ./checkpoints)")
    fetch.add_argument(
        "--hub-id",
        metavar="OWNER/NAME",
        action="append",
        default=[],
        help="a Hugging Face repository to take them from",
    )
    fetch.add_argument(
        "--url", metavar="URL", action="append", default=[], help="an address to take one file from, tried first"
    )
    verify = actions.add_parser("verify", help="say which model a file or folder holds, or what is wrong with it")
    verify.add_argument("paths", metavar="PATH", nargs="+", help="a checkpoint file or a model folder")
    verify.add_argument("--json", action="store_true", help="as JSON on stdout")
    verify.add_argument("--checksum", action="store_true", help="compare the SHA-256 with the published one too")
    convert = actions.add_parser("convert", help="write a released checkpoint in this project's adapter-only layout")
    convert.add_argument("source", metavar="CKPT", help="a released checkpoint")
    convert.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the converted files")
    convert.add_argument("--config", metavar="YAML", default=None, help="its configuration (default: YAML beside it)")
    convert.add_argument("--raw", action="store_true", help="take the raw weights, not their average (EMA)")
    for action in (listing, fetch, verify, convert):
        add_message_options(action)


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises:
        InputError: an unknown name, a file that cannot be had, or one that is not what it should be.
    """
    {"list": _list, "download": _download, "verify": _verify, "convert": _convert}[options.action](options)


def file_states() -> list[dict[str, Any]]:
    """What is known about every file and where it is, as plain values for tables and JSON."""
    return [
        {
            "name": file.name,
            "title": file.title,
            "licence": file.licence,
            "size": file.size,
            "sha256": file.sha256,
            "sources": list(file.sources),
            "path": _text(find_weight_file(file.name)),
            "partial": _text(_partial(file)),
        }
        for file in WEIGHT_FILES
    ]


def _partial(file: WeightFile) -> Path | None:
    from nvsadapter_guidance.http_download import part_of

    parts = (part_of(folder / file.name) for folder in checkpoint_folders())
    return next((part for part in parts if part.is_file()), None)


def _list(options: argparse.Namespace) -> None:
    states = file_states()
    if options.json:
        _write_json(states)
        return
    for state in states:
        partly = f"partly here: {state['partial']}" if state["partial"] else "not here"
        size = f"{state['size'] / 1e9:.2f} GB" if state["size"] else "size not published"
        checksum = "SHA-256 known" if state["sha256"] else "no published checksum"
        _print(f"{state['name']}: {state['path'] or partly}")
        _print(f"  {state['title']}; {size}, {checksum}, {state['licence']}")
        _print(f"  from {', '.join(state['sources'])}")
    for name, files in WEIGHT_SETS.items():
        _print(f"3drec weights download {name}: {', '.join(files)}")


def _download(options: argparse.Namespace) -> None:
    from nvsadapter_guidance.download import download

    files = [file for name in options.names or ["released"] for file in known_files(name)]
    if options.url and len(files) != 1:
        raise InputError(f"--url: is the address of one file, and {len(files)} are asked for; name the file")
    folder = Path(options.to).expanduser() if options.to else download_folder()
    for file in files:
        with _progress(file.name) as on_progress:
            done = download(file, folder, (*options.url, *options.hub_id), on_progress)
        _print(f"{done.path}: {f'from {done.source}' if done.source else 'was there'} ({done.checked}; {file.licence})")


def _verify(options: argparse.Namespace) -> None:
    from nvsadapter_guidance.checkpoints import identify

    reports = []
    for text in options.paths:
        path = Path(text).expanduser()
        with _progress(path.name) as on_progress:
            report = identify(path, on_progress)
        details = dict(report.details)
        if options.checksum:
            details["SHA-256"] = _checksum(path)
        reports.append({"path": str(path), **_report_values(report), "details": details})
        if not options.json:
            size = f"{report.tensors:,} tensors, {report.parameters:,} parameters, {report.bytes / 1e9:.2f} GB"
            _print(f"{path}: {report.title} ({size})")
            for name, value in details.items():
                _print(f"  {name}: {value}")
    if options.json:
        _write_json(reports)


def _report_values(report: "CheckpointReport") -> dict[str, Any]:
    return {name: getattr(report, name) for name in ("kind", "title", "tensors", "parameters", "bytes")}


def _checksum(path: Path) -> str:
    """Compare a file with the checksum that is published for its name."""
    from nvsadapter_guidance.download import sha256_of

    if not path.is_file():
        raise InputError(f"{path}: --checksum compares files, and this is a folder")
    with _progress(path.name) as on_progress:
        found = sha256_of(path, on_progress)
    file = next((file for file in WEIGHT_FILES if file.name == path.name), None)
    if file is None or file.sha256 is None:
        return f"{found} (no published checksum)"
    if found != file.sha256:
        raise InputError(f"{path}: its SHA-256 is {found} where {file.sha256} is published; download the file again")
    return f"{found} (as published)"


def _convert(options: argparse.Namespace) -> None:
    from rich.console import Console

    from nvsadapter_guidance.checkpoints import convert_released

    source, output = Path(options.source).expanduser(), Path(options.output).expanduser()
    config = Path(options.config).expanduser() if options.config else None
    with Console(stderr=True).status("reading") as status:
        sizes = convert_released(source, output, config=config, use_ema=not options.raw, progress=status.update)
    for part, size in sizes.items():
        _print(f"{part}: {size / 1e6:,.1f} MB")
    _print(f"{output}: {sum(sizes.values()) / 1e6:,.1f} MB, from {source.stat().st_size / 1e6:,.1f} MB")


@contextmanager
def _progress(name: str) -> "Iterator[OnProgress]":
    """A progress bar on a terminal for bytes of the file ``name``; it appears with the first of them."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    quiet = not sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task(name, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


def _write_json(value: Any) -> None:
    import json

    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
