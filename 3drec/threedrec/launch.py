"""From command-line arguments to a finished job: config, device, run folder, reconstruction."""

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from threedrec.errors import InputError
from threedrec.terminal import DISK_ERRORS, command_line

if TYPE_CHECKING:
    import torch

    from threedrec.config_schema import ExperimentConfig

logger = logging.getLogger(__name__)

Mode = Literal["train", "validate", "test", "export"]
AUTO = "auto"
CHECKPOINTS = "ckpts"
PARSED = Path("configs") / "parsed.yaml"


@dataclass
class Job:
    """One command, before anything is read."""

    mode: Mode
    config: str
    overrides: Sequence[str] = ()
    """``dotted.key=value`` as typed."""
    values: Mapping[str, Any] | None = None
    """Config values from other options of the command line."""
    gpu: str = AUTO


def run_job(job: Job) -> Path:
    """Do the job and return its run folder.

    Raises:
        InputError: any mistake in the config, the image, the checkpoint or the output folder.
    """
    from threedrec.startup import quick_imports, wake_driver, warm_device

    if job.gpu != "cpu":
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        if "torch" not in sys.modules:
            wake_driver()
    with quick_imports():
        from threedrec.config import changed_keys, dump_config, load_config

        device = choose_device(job.gpu)
        warming = warm_device(device) if device.type == "cuda" else None
        config = load_config(job.config, job.overrides, values=job.values, device_type=device.type)
    _check_image(config.data.image_path)
    if job.mode == "train" and config.resume is None:
        _check_weights(config)
    if config.resume == AUTO or (config.resume is None and job.mode != "train"):
        config.trial_dir = config.trial_dir or _run_of(job.config)
    run_dir = open_run(config, job.mode)
    there_before = set(run_dir.iterdir())
    if config.resume and (run_dir / PARSED).is_file():
        changed = changed_keys(config, run_dir / PARSED)
        if changed:
            logger.warning("not as when the run began: %s", ", ".join(changed))
    if job.mode == "train":
        # Where this run lies and what it went on from is no part of what repeats it.
        dump_config(replace(config, resume=None, trial_dir=None, timestamp=None), run_dir / PARSED)
        _record_command(run_dir)
    if device.type == "cpu":
        from threedrec.threads import choose_threads

        choose_threads()
    if warming is not None:
        warming.join()
    logger.info("%s on %s, results in %s", job.mode, device, run_dir)
    try:
        _work(job.mode, config, run_dir, device)
    except InputError as error:
        if job.mode == "train" and config.resume is None and not _has_begun(run_dir, error):
            _discard(run_dir, there_before)
        raise
    return run_dir


def _work(mode: Mode, config: "ExperimentConfig", run_dir: Path, device: "torch.device") -> None:
    from threedrec.files import write_error
    from threedrec.host import Host
    from threedrec.registry import find

    host = Host(startup_seconds=process_seconds)
    reconstruction = find("system", config.system_type)(config, run_dir, device, host)
    work = {
        "train": reconstruction.train,
        "validate": reconstruction.validate,
        "test": reconstruction.test,
        "export": reconstruction.export,
    }[mode]
    try:
        work()
    except OSError as error:
        # Writers of logs do not say which file they could not write.
        if error.errno in DISK_ERRORS and error.filename is None:
            raise write_error(run_dir, error) from error
        raise


def process_seconds() -> float | None:
    """Return how long this process has been there, None where the system does not tell (it does on Linux)."""
    try:
        # The name of the program, in brackets, may hold spaces; the 20th field after it is the start, in clock ticks.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None


def _has_begun(run_dir: Path, error: InputError) -> bool:
    """Whether a run that ended with ``error`` left more than preparations: a diverged one has logs to look at."""
    from threedrec.checkpoint import PREPARE, load_checkpoint
    from threedrec.divergence import DivergenceError

    if isinstance(error, DivergenceError):
        return True
    try:
        return any(load_checkpoint(path).stage != PREPARE for path in (run_dir / CHECKPOINTS).glob("[!.]*"))
    except InputError:
        return True


def _discard(run_dir: Path, kept: set[Path]) -> None:
    """Remove what a run left, but nothing that was there before it (``kept``)."""
    for path in set(run_dir.iterdir()) - kept:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not kept:
        with contextlib.suppress(OSError):
            run_dir.rmdir()


def choose_device(gpu: str) -> "torch.device":
    """Return the device for ``--gpu``: "auto", "cpu", or CUDA ids of which the first is used.

    Asking for a GPU on a machine without CUDA warns and gives the CPU.

    Raises:
        InputError: not of that form, or no GPU of that id.
    """
    import torch

    if gpu == "cpu":
        return torch.device("cpu")
    if gpu == AUTO:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"\d+(,\d+)*,?", gpu):
        raise InputError(f"--gpu {gpu}: expected auto, cpu, or ids such as 0 or 0,1")
    if not torch.cuda.is_available():
        logger.warning("--gpu %s: no CUDA device here, using the CPU", gpu)
        return torch.device("cpu")
    ids = [int(entry) for entry in gpu.split(",") if entry]
    found = torch.cuda.device_count()
    missing = [index for index in ids if index >= found]
    if missing:
        raise InputError(f"--gpu {gpu}: no GPU {missing[0]}, this machine has 0 to {found - 1}")
    if len(ids) > 1:
        logger.warning("--gpu %s: one reconstruction uses one GPU, taking %d", gpu, ids[0])
    return torch.device(f"cuda:{ids[0]}")


def open_run(config: "ExperimentConfig", mode: Mode) -> Path:
    """Return the run's folder, made and writable; completes ``config.resume``, ``timestamp`` and ``trial_dir``.

    Raises:
        InputError: nothing to resume where something must be, the folder holds another run, or it cannot be written.
    """
    if mode != "train" and config.resume is None:
        config.resume = AUTO
    unbegun = None
    if config.resume == AUTO:
        unbegun = _run_without_checkpoint(config) if mode == "train" else None
        found = newest_checkpoint(config) if unbegun is None else None
        if found is None and mode != "train":
            raise InputError(f"resume: no checkpoint to {mode} under {_run_pattern(config)}; give resume=FILE")
        if found is None:
            logger.info("nothing to resume under %s, starting afresh", unbegun or _run_pattern(config))
        config.resume = None if found is None else str(found)
    if config.resume is not None:
        return _resumed_run(config)
    run_dir = _new_run(config) if unbegun is None else unbegun
    _stay_in(run_dir, config)
    return run_dir


def newest_checkpoint(config: "ExperimentConfig") -> Path | None:
    """Return the newest checkpoint of the newest run of this name and tag that has one, None without any."""
    for run in _runs(config):
        checkpoints = _checkpoints(run)
        if checkpoints:
            return max(checkpoints, key=lambda file: file.stat().st_mtime_ns)
    return None


def _run_without_checkpoint(config: "ExperimentConfig") -> Path | None:
    """Return the newest run of this name and tag if it was killed before its first checkpoint, otherwise None."""
    newest = next((run for run in _runs(config) if _holds_run(run) or _checkpoints(run)), None)
    return None if newest is None or _checkpoints(newest) else newest


def ensure_writable(folder: Path) -> None:
    """Make ``folder`` and prove by a small file that it can be written.

    Raises:
        InputError: it cannot; names the folder.
    """
    from threedrec.files import write_error

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise write_error(folder, error) from error


def _new_run(config: "ExperimentConfig") -> Path:
    from threedrec.lookup import output_root

    if config.trial_dir:
        return _unused(Path(config.trial_dir))
    if config.timestamp is None:
        config.timestamp = datetime.now().strftime("@%Y%m%d-%H%M%S") if config.use_timestamp else ""
    run_dir = output_root(config.exp_root_dir) / config.name / f"{_one_name(config.tag)}{config.timestamp}"
    if not config.use_timestamp:
        return _unused(run_dir)
    # Two runs that start in one second must not share a folder.
    unique, count = run_dir, 2
    while os.path.exists(unique):
        unique, count = run_dir.with_name(f"{run_dir.name}-{count}"), count + 1
    return unique


def _unused(run_dir: Path) -> Path:
    """Return ``run_dir``, which has a name of its own and so could be used twice, if it holds no run."""
    if _holds_run(run_dir):
        raise InputError(f"{run_dir}: holds a run already; add resume=auto to continue it, or name another folder")
    return run_dir


def _resumed_run(config: "ExperimentConfig") -> Path:
    from threedrec.lookup import find_path

    checkpoint = find_path(str(config.resume))
    if not os.path.isfile(checkpoint):
        what = "is a folder, give a file from it" if os.path.isdir(checkpoint) else "no such checkpoint"
        raise InputError(f"resume: {config.resume}: {what}; resume=auto takes the newest run's")
    config.resume = str(checkpoint)
    run_dir = checkpoint.resolve().parent
    if run_dir.name == CHECKPOINTS:
        run_dir = run_dir.parent
    _stay_in(run_dir, config)
    logger.info("resuming from %s", checkpoint)
    return run_dir


def _stay_in(run_dir: Path, config: "ExperimentConfig") -> None:
    """Make ``run_dir`` the run's folder, and prove that it can be written."""
    config.trial_dir = str(run_dir)
    stamp = re.search(r"@\d{8}-\d{6}(-\d+)?$", run_dir.name)
    config.timestamp = stamp.group() if stamp else ""
    ensure_writable(run_dir)


def _run_pattern(config: "ExperimentConfig") -> Path:
    from threedrec.lookup import output_root

    if config.trial_dir:
        return Path(config.trial_dir)
    return output_root(config.exp_root_dir) / config.name / f"{_one_name(config.tag)}@*"


def _run_of(config_file: str) -> str | None:
    """Return the run whose ``parsed.yaml`` a config file is, None for any other file."""
    from threedrec.lookup import find_path

    path = find_path(config_file).resolve()
    return str(path.parent.parent) if path.parts[-2:] == PARSED.parts else None


def _runs(config: "ExperimentConfig") -> list[Path]:
    """Return the folders of this name and tag, the newest first; ``trial_dir`` alone where it is given."""
    pattern = _run_pattern(config)
    if config.trial_dir:
        return [pattern]
    folder = pattern.parent
    name = re.escape(_one_name(config.tag)) + r"(@\d{8}-\d{6}(-\d+)?)?"
    runs = [run for run in folder.iterdir() if re.fullmatch(name, run.name)] if os.path.isdir(folder) else []
    return sorted(runs, key=lambda run: run.name, reverse=True)


def _holds_run(folder: Path) -> bool:
    return os.path.isfile(folder / PARSED)


def _checkpoints(run: Path) -> list[Path]:
    return [file for file in (run / CHECKPOINTS).glob("[!.]*.ckpt") if file.is_file()]


def _one_name(tag: str) -> str:
    """Return ``tag`` as the name of one folder."""
    return tag.replace("/", "_").replace(os.sep, "_")


def _check_image(path: str) -> None:
    """Refuse a missing image before a model is loaded."""
    if not path:
        raise InputError("data.image_path: no image given; add data.image_path=PHOTO.png")
    if not os.path.isfile(path):
        raise InputError(f"data.image_path: {path}: {'is a folder' if os.path.isdir(path) else 'no such file'}")


def _check_weights(config: "ExperimentConfig") -> None:
    """Refuse missing weights before anything is written; a guidance knows them by ``model_family``."""
    from threedrec.registry import find

    tell = getattr(find("guidance", config.system.guidance_type), "model_family", None)
    given = config.system.guidance
    if tell is not None:
        tell(getattr(given, "pretrained_model_name_or_path", "") or getattr(given, "pretrained", "auto"))


def _record_command(run_dir: Path) -> None:
    """Append the command to ``cmd.txt``: a resumed run keeps the lines of its earlier lives."""
    try:
        with (run_dir / "cmd.txt").open("a", encoding="utf-8") as file:
            file.write(command_line(sys.argv) + "\n")
    except OSError as error:
        from threedrec.files import write_error

        raise write_error(run_dir / "cmd.txt", error) from error
