"""Packages of Debian and npm, downloaded and unpacked without being installed."""

import io
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from nvsadapter_guidance.errors import InputError

NPM_REGISTRY = "https://registry.npmjs.org"


def debian_package(name: str, cache: Path) -> Path:
    """The folder with a Debian package's files; downloaded with ``apt-get`` unless it is there already.

    Raises:
        InputError: ``apt-get`` or ``dpkg-deb`` is missing or fails.
    """
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        _run(["apt-get", "download", "-q", name], folder)
        archives = list(folder.glob("*.deb"))
        if len(archives) != 1:
            raise InputError(f"Debian package {name}: apt-get left {len(archives)} archives; run apt-get update first")
        _run(["dpkg-deb", "-x", str(archives[0]), str(folder / "files")], folder)
        shutil.move(folder / "files", target)
    return target


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(
            f"{command[0]} is not on this machine: collect Debian's packages on Debian or Ubuntu"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise InputError(f"{' '.join(command)}: {reason}; run apt-get update first") from error


def npm_package(name: str, version: str, cache: Path) -> Path:
    """The folder with an npm package's files; downloaded from the registry unless it is there already.

    Raises:
        InputError: the registry cannot be reached or does not have it.
    """
    bare = name.rpartition("/")[2]
    target = cache / f"{bare}-{version}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    url = f"{NPM_REGISTRY}/{name}/-/{bare}-{version}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise InputError(f"{url}: cannot be downloaded ({error})") from error
    with tempfile.TemporaryDirectory(dir=cache) as temporary, tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(temporary, filter="data")
        shutil.move(Path(temporary) / "package", target)
    return target
