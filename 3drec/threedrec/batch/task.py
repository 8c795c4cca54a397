"""One image is one task: a function that writes into its own folder only, and is safe to repeat."""

import contextlib
import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from threedrec.errors import InputError
from threedrec.files import read_json, write_json
from threedrec.host import Host, Interrupted

if TYPE_CHECKING:
    from threedrec.config_schema import ExperimentConfig
    from threedrec.image import SupportView

logger = logging.getLogger(__name__)

MARKER = "task.json"
"""In a result folder: which content and config its files belong to."""
LOG = "log.txt"

DONE, FAILED, HALFWAY, INTERRUPTED = "done", "failed", "halfway", "interrupted"

FINISHING = "test"
"""The first stage that needs no diffusion model: from here another process can finish."""

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Task:
    """Everything a worker needs to know; all paths are absolute."""

    input: str
    """Name in the manifest."""
    image: str
    hash: str | None
    folder: str
    config: str
    """A resolved config file, the same for all tasks of a batch."""
    fingerprint: str
    """Of that config."""
    device: str = "auto"
    """As ``--gpu`` takes it."""
    attempt: int = 1
    afresh: bool = False
    """Begin anew even where a checkpoint is."""
    part: str = "all"
    """``all``; or the two halves ``optimise`` (up to the turntable) and ``finish`` (the rest)."""
    next_image: str = ""
    """The image that this worker will be given next: it may be read ahead."""
    values: dict[str, Any] = field(default_factory=dict)
    """Config values of this worker's machine (where it has put the weights)."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended."""

    status: str
    """``done``, ``failed``, ``halfway`` (the first half is done) or ``interrupted`` (checkpointed, as asked)."""
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    kind: str = ""
    """Of a failure; ``disk`` concerns the whole batch, the others are those of the manifest."""


def reconstruct(task: Task, host: Host) -> Outcome:
    """Reconstruct one image into its own folder, from its checkpoint if there is one of this image and config.

    Every failure is an outcome; only the end of the process is not.
    """
    start = time.perf_counter()
    folder = Path(task.folder)
    try:
        host.progress("prepare", 0, 1)
        config = _config(task, folder)
        image = _image(task, config, host)
        checkpoint = _open_folder(task, folder)
        config.resume = None if checkpoint is None else str(checkpoint)
        with _log_into(folder / LOG):
            finished = _run(task, config, replace(host, support=image))
        metrics = summary(read_json(folder / "metrics.json"))
        return Outcome(DONE if finished else HALFWAY, time.perf_counter() - start, metrics)
    except Interrupted:
        return Outcome(INTERRUPTED, time.perf_counter() - start)
    except Exception as error:
        kind = kind_of(error)
        if kind == "error":
            logger.debug("%s", task.input, exc_info=error)
        return Outcome(FAILED, time.perf_counter() - start, {}, one_line(error), kind)


class BadImageError(InputError):
    """The image itself cannot be used, today or tomorrow."""


def kind_of(error: BaseException) -> str:
    """Return the manifest's word for a failure."""
    if isinstance(error, BadImageError):
        return "input"
    # Not imported for this: an error of a module's comes from a module that is there.
    divergence, torch = sys.modules.get("threedrec.divergence"), sys.modules.get("torch")
    if divergence is not None and isinstance(error, divergence.DivergenceError):
        return "diverged"
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)):
        return "memory"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL_DISK:
            return "disk"
        cause = cause.__cause__
    return "error"


def one_line(error: BaseException) -> str:
    """Return the message of an error; for a fault of the program also its type and place."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
    return f"{type(error).__name__}: {text}{where}"


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers of ``metrics.json`` that a table of many objects shows."""
    stages = {name: stage.get("seconds") for name, stage in metrics.get("stages", {}).items()}
    peaks = [stage.get("peak_memory_gb") or 0.0 for stage in metrics.get("stages", {}).values()]
    mesh = {
        name: metrics["mesh"][name] for name in ("vertices", "faces", "watertight") if name in metrics.get("mesh", {})
    }
    kept = {name: metrics[name] for name in ("device", "model", "recipe") if name in metrics}
    return {
        **metrics.get("reference", {}),
        **mesh,
        **kept,
        "peak_memory_gb": max(peaks, default=None),
        "stages": stages,
    }


def _image(task: Task, config: "ExperimentConfig", host: Host) -> "SupportView":
    """Return the support view of the task's image, read ahead or now."""
    from threedrec.image import load_support_view
    from threedrec.reconstruct import SUPPORT_SIZE

    if host.support is not None and host.support.path == task.image:
        return host.support
    if not os.access(task.image, os.R_OK) and os.path.exists(task.image):
        raise BadImageError(f"{task.image}: cannot be read: permission denied; change its permissions")
    try:
        return load_support_view(config.data, SUPPORT_SIZE)
    except InputError as error:
        raise BadImageError(str(error)) from error


def _config(task: Task, folder: Path) -> "ExperimentConfig":
    from threedrec.config import load_config

    own = {"data": {"image_path": task.image}, "tag": folder.name, "trial_dir": str(folder)}
    return load_config(task.config, values={**task.values, **own})


def _open_folder(task: Task, folder: Path) -> Path | None:
    """Make the folder this task's, and return the checkpoint to go on from.

    Raises:
        InputError: it holds something that no batch has put there, or cannot be written.
    """
    from threedrec.launch import ensure_writable

    marker = {"input": task.input, "hash": task.hash, "config": task.fingerprint}
    checkpoint = folder / "ckpts" / "last.ckpt"
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file() and not all(_is_half_written(path) for path in folder.iterdir()):
            raise InputError(f"{folder}: holds files that are not of a batch; move them")
        if not task.afresh and checkpoint.is_file() and _marker(folder) == marker:
            return checkpoint
        _empty(folder)
    ensure_writable(folder)
    write_json(folder / MARKER, marker)
    return None


def _is_half_written(path: Path) -> bool:
    """Whether a process that was killed while it made the folder its own left this.

    Before the marker there is only the probe of `ensure_writable` and the marker's own temporary file.
    """
    return path.name.startswith((".writable-", f".{MARKER}."))


def _marker(folder: Path) -> Any:
    try:
        return read_json(folder / MARKER)
    except InputError:
        return None  # damaged: as good as another task's


def _empty(folder: Path) -> None:
    """Remove all but the marker, which says until the last moment whose folder this is."""
    for path in folder.iterdir():
        if path.name == MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """Copy what both packages log into a file of the task."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    packages = [logging.getLogger(name) for name in ("threedrec", "nvsadapter_guidance")]
    for package in packages:
        package.addHandler(handler)
    try:
        yield
    except Exception:
        logger.exception("the task failed")
        raise
    finally:
        for package in packages:
            package.removeHandler(handler)
        handler.close()


def _run(task: Task, config: "ExperimentConfig", host: Host) -> bool:
    """Do the task's part; return whether all is done."""
    from threedrec.config import dump_config
    from threedrec.launch import PARSED, choose_device
    from threedrec.registry import find

    folder = Path(task.folder)
    dump_config(replace(config, resume=None, trial_dir=None, timestamp=None), folder / PARSED)
    device = choose_device(task.device)
    logger.info("%s, attempt %d, on %s%s", task.input, task.attempt, device, ", resumed" if config.resume else "")
    reconstruction = find("system", config.system_type)(config, folder, device, host)
    reconstruction.train(until=FINISHING if task.part == "optimise" else None)
    return task.part != "optimise"


def copy_result(source: Path, task: Task) -> None:
    """Give a task the results of another one whose image and config are the same.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    from threedrec.files import write_error

    folder = Path(task.folder)
    _open_folder(replace(task, afresh=True), folder)
    try:
        shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=_link, ignore=shutil.ignore_patterns(MARKER))
    except (OSError, shutil.Error) as error:
        raise write_error(folder, error if isinstance(error, OSError) else OSError(str(error))) from error


def _link(source: str, target: str) -> str:
    """Copy by a second name for the same bytes where the disk can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
