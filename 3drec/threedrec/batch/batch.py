"""A whole batch: find the images, compare them with the manifest, have the rest done, write down what became of it."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from threedrec.batch import engine_ray
from threedrec.batch.dispatch import Dispatcher, Interrupts, Pool
from threedrec.batch.engine_local import LocalPool, worker_devices
from threedrec.batch.gallery import write_gallery
from threedrec.batch.inputs import Inputs, find_inputs, hash_inputs
from threedrec.batch.lock import locked
from threedrec.batch.manifest import DONE, FAILED, Line, Manifest
from threedrec.batch.options import RAY, BatchOptions
from threedrec.batch.plan import FINAL, Plan, Settings, fingerprint, make_plan, starts_afresh
from threedrec.batch.summary import write_summary
from threedrec.batch.task import Outcome, Task, copy_result, kind_of
from threedrec.batch.view import BatchView, batch_view, counting, printable
from threedrec.errors import InputError

if TYPE_CHECKING:
    from threedrec.config_schema import ExperimentConfig

logger = logging.getLogger(__name__)

MANIFEST, GALLERY, SUMMARY, CONFIG, LOGS = "manifest.jsonl", "index.html", "summary.csv", "config.yaml", "workers"

SECONDS_BETWEEN_PAGES = 60.0
_SHARE_OF_PAGES = 50
"""Pages that take a second to write are not written again for so many."""
_MOST_LOSSES = 10
"""How often the machine under one image may vanish."""


@dataclass
class BatchReport:
    """What became of a batch."""

    output: Path
    done: list[Line] = field(default_factory=list)
    """Every image that has a result, now or from an earlier sitting."""
    failed: list[Line] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Not settled: the batch was interrupted, or this was a dry run."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Files that are no images of the batch, and why."""
    interrupted: bool = False


def run_batch(options: BatchOptions, show_plan: Callable[[Plan, Inputs], None] | None = None) -> BatchReport:
    """Reconstruct every image that the options name, each into a folder of its own.

    Images that fail are lines of the manifest and of the report, not exceptions.

    Args:
        options: what to do.
        show_plan: told what is left to do, before it is done.

    Raises:
        InputError: the options, the config, the weights or the output folder cannot be used; or the disk is full.
        KeyboardInterrupt: interrupted twice; what was under way goes on from its last checkpoint when resumed.
    """
    options.check()
    with engine_ray.connection():
        return _run(options, show_plan)


def _run(options: BatchOptions, show_plan: Callable[[Plan, Inputs], None] | None) -> BatchReport:
    output = Path(os.path.abspath(os.path.expanduser(options.output)))
    devices = [] if options.engine == RAY else worker_devices(options.gpu, options.gpus_per_task)
    config = _load_config(options, devices)
    inputs = find_inputs(options.images, output)
    manifest_file = output / MANIFEST
    if manifest_file.exists() and not options.resume:
        raise InputError(f"{output}: holds a batch already; add --resume to go on with it, or name another folder")
    settings = Settings(output, str(output / CONFIG), fingerprint(config), options.max_retries, options.retry_failed)
    if options.dry_run:
        plan = _plan(inputs, Manifest(manifest_file, repair=False), settings, show_plan)[0]
        tasks = [*plan.tasks, *(task for copies in plan.copies.values() for task in copies)]
        return BatchReport(output, left=[task.input for task in tasks], skipped=inputs.skipped)
    from threedrec.launch import ensure_writable

    ensure_writable(output)
    with locked(output), Interrupts() as interrupts:
        manifest = Manifest(manifest_file)
        plan, hashes = _plan(inputs, manifest, settings, show_plan)
        _write_config(config, Path(settings.config))
        sitting = _Sitting(inputs, hashes, manifest, settings, plan)
        try:
            sitting.run(lambda: _pool(options, settings, devices), options.timeout or None, interrupts)
        except InputError:
            with suppress(InputError):  # a full disk, say; the first error is the one to be told
                sitting.write_pages()
            raise
        sitting.write_pages()
        return sitting.report(interrupts.asked)


def _load_config(options: BatchOptions, devices: Sequence[str]) -> "ExperimentConfig":
    """Return the config that all images share; weights that are missing are found out about here."""
    from threedrec.config import load_config
    from threedrec.registry import find

    if options.engine == RAY:
        device = engine_ray.device_type(options)
    else:
        device = "cpu" if "cpu" in devices else "cuda"
    # The name stands in for all images; what depends on it is set for each.
    config = load_config(
        options.config, options.overrides, values={"data": {"image_path": "image.png"}}, device_type=device
    )
    if not config.checkpoint.save_last:
        raise InputError("checkpoint.save_last: a batch goes on from last checkpoints; leave it true")
    tell = getattr(find("guidance", config.system.guidance_type), "model_family", None)
    if tell is not None:
        wanted = config.system.guidance
        family = tell(getattr(wanted, "pretrained_model_name_or_path", "") or wanted.pretrained)
        if wanted.pretrained == "auto":
            wanted.pretrained = family  # what was found here, all workers are to use
    return config


def _write_config(config: "ExperimentConfig", path: Path) -> None:
    from threedrec.config import changed_keys, dump_config

    config.data.image_path, config.tag = "", "batch"
    if path.exists():
        changed = changed_keys(config, path)
        if changed:
            logger.warning("not as when the batch began: %s; all images are done again", ", ".join(changed))
    dump_config(config, path)


def _plan(
    inputs: Inputs, manifest: Manifest, settings: Settings, show: Callable[[Plan, Inputs], None] | None
) -> tuple[Plan, dict[str, str | None]]:
    with counting("reading images", len(inputs.images)) as bar:
        hashes = hash_inputs(inputs.images, lambda: bar.advance(bar.task_ids[0]) if bar else None)
    plan = make_plan(inputs, hashes, manifest, settings)
    for name, reason in inputs.skipped:
        logger.info("left out: %s %s", name, reason)
    for name in plan.gone:
        logger.warning("%s: in the manifest, but no longer among the images", name)
    if show is not None:
        show(plan, inputs)
    return plan, hashes


@dataclass
class _Sitting:
    """One sitting of a batch."""

    inputs: Inputs
    hashes: dict[str, str | None]
    manifest: Manifest
    settings: Settings
    plan: Plan

    def __post_init__(self) -> None:
        self._losses: dict[str, int] = {}
        self._next_pages = time.monotonic() + SECONDS_BETWEEN_PAGES
        self._copies = dict(self.plan.copies)
        self._view: BatchView | None = None

    def run(self, make_pool: Callable[[], Pool], timeout: float | None, interrupts: Interrupts) -> None:
        """Do what is left."""
        plan = self.plan
        total = len(plan.tasks) + len(plan.broken) + sum(len(copies) for copies in plan.copies.values())
        with batch_view(total) as self._view:
            for image in plan.broken:
                error = f"{printable(image.path)}: {image.problem}"
                line = Line(
                    image.name, None, FAILED, 0.0, 1, error=error, kind="input", config=self.settings.fingerprint
                )
                last = self.manifest.last.get(image.name)
                if last is None or (last.error, last.config) != (line.error, line.config):
                    self.manifest.append(line)
                self._view.finished(image.name, error, failed=True)
            for leader in set(self._copies) - {task.input for task in plan.tasks}:
                self._settle_copies(self.manifest.last[leader])
            if plan.tasks:
                Dispatcher(make_pool(), self.settle, interrupts, timeout, self._tick).run(plan.tasks)

    def settle(self, task: Task, outcome: Outcome) -> Task | None:
        """Write down how an attempt ended; return the task to try again."""
        if outcome.kind == "disk":
            raise InputError(outcome.error or "the disk is full")
        if outcome.kind == "lost" and self._lose(task):
            return task
        status = DONE if outcome.status == DONE else FAILED
        line = Line(
            task.input,
            task.hash,
            status,
            round(outcome.seconds, 3),
            task.attempt,
            outcome.metrics,
            outcome.error,
            outcome.kind,
            task.fingerprint,
            Path(task.folder).relative_to(self.settings.output).as_posix(),
        )
        self.manifest.append(line)
        if status == FAILED and outcome.kind not in FINAL and task.attempt <= self.settings.max_retries:
            logger.warning("%s: attempt %d failed: %s; trying again", task.input, task.attempt, outcome.error)
            return replace(task, attempt=task.attempt + 1, afresh=starts_afresh(outcome.kind))
        self._say(line)
        self._settle_copies(line)
        return None

    def _lose(self, task: Task) -> bool:
        """Whether a task may be given to another machine once more, since its own has vanished."""
        self._losses[task.input] = self._losses.get(task.input, 0) + 1
        return self._losses[task.input] <= _MOST_LOSSES

    def _settle_copies(self, line: Line) -> None:
        """Give images of the same content the same results, or the same failure."""
        for task in self._copies.pop(line.input, []):
            start = time.perf_counter()
            output = Path(task.folder).relative_to(self.settings.output).as_posix()
            copy = replace(line, input=task.input, attempt=1, output=output, copy_of=line.input)
            if line.status == DONE:
                try:
                    copy_result(self.settings.output / line.output, task)
                except InputError as error:
                    if kind_of(error) == "disk":
                        raise
                    copy = replace(copy, status=FAILED, metrics={}, error=str(error), kind="error")
            self.manifest.append(replace(copy, seconds=round(time.perf_counter() - start, 3)))
            self._say(copy)

    def _say(self, line: Line) -> None:
        if self._view is not None:
            words = line.error or ""
            if line.status == DONE:
                words = f"same as {line.copy_of}" if line.copy_of else f"done in {line.seconds:.1f} s"
            self._view.finished(line.input, words, line.status == FAILED)

    def _tick(self, dispatcher: Dispatcher) -> None:
        if self._view is not None:
            self._view.tick(dispatcher)
        if time.monotonic() > self._next_pages:
            self.write_pages()

    def write_pages(self) -> None:
        """Write the gallery and the summary as of now."""
        lines, start = self._lines(), time.monotonic()
        write_summary(lines, self.settings.output / SUMMARY)
        write_gallery(lines, self.inputs.root, self.settings.output)
        now = time.monotonic()
        # Many images on a slow disk: the workers come first.
        self._next_pages = now + max(SECONDS_BETWEEN_PAGES, _SHARE_OF_PAGES * (now - start))

    def report(self, interrupted: bool) -> BatchReport:
        """Say what became of every image."""
        lines = [line for line in self._lines() if not self._to_be_retried(line)]
        settled = {line.input for line in lines}
        left = [image.name for image in self.inputs.images if image.name not in settled]
        done = [line for line in lines if line.status == DONE]
        failed = [line for line in lines if line.status == FAILED]
        stopped = interrupted and bool(left)
        return BatchReport(self.settings.output, done, failed, left, self.inputs.skipped, stopped)

    def _to_be_retried(self, line: Line) -> bool:
        """Whether an interruption came before the last attempt at an image."""
        if line.status == DONE or line.kind in FINAL or line.copy_of:
            return False
        return self.manifest.attempts(line.input, line.hash, line.config) <= self.settings.max_retries

    def _lines(self) -> list[Line]:
        """The line that counts of every image that is settled as it is now."""
        lines: Sequence[Line | None] = [self.manifest.last.get(image.name) for image in self.inputs.images]
        now = self.settings.fingerprint
        return [line for line in lines if line is not None and line.of(self.hashes[line.input], now)]


def _pool(options: BatchOptions, settings: Settings, devices: Sequence[str]) -> Pool:
    if options.engine == RAY:
        return engine_ray.RayPool(options, settings)
    # Workers that share a GPU are in different stages already.
    alone = "cpu" not in devices and len(devices) == len(set(devices)) and (os.cpu_count() or 1) >= 4 * len(devices)
    overlap = alone if options.overlap is None else options.overlap
    return LocalPool(options.function, settings.output / LOGS, devices, overlap, options.memory_gb)
