"""The command ``3drec batch``: its options, what it says before and after, and its exit code."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from threedrec.terminal import add_message_options, command_line, guarded

if TYPE_CHECKING:
    from threedrec.batch import BatchOptions
    from threedrec.batch.inputs import Inputs
    from threedrec.batch.plan import Plan

logger = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  3drec batch photos/ -o objects                              every image in photos/ and the folders inside
  3drec batch 'photos/**/*.png' -o objects trainer.max_steps=200
  3drec batch photos/ -o objects --dry-run                    what would be done, and what would be left out
  3drec batch photos/ -o objects --resume                     go on: finished images stay, changed ones are done again
  3drec batch photos/ -o objects --gpu 0,1 --gpus-per-task 0.5         two objects at a time on each of two GPUs
  3drec batch photos/ -o objects --engine ray --address auto  on the Ray cluster that this machine belongs to

DIR/index.html shows everything, DIR/summary.csv is the table, DIR/manifest.jsonl has a line for each attempt, and
DIR/objects/PATH/save the mesh and the turntable of PATH. Exit codes: 0 all images have a result, 1 some have failed,
2 a mistake in the command, 130 interrupted. Ctrl-C once ends with checkpoints, twice at once.
docs/scaling.md: many GPUs, SLURM, Kubernetes, machines that vanish.
"""

_OVERRIDE = re.compile(r"\w+(\.\w+)*=")
_MOST_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("images", metavar="IMAGES", nargs="+", help="folders, files, or quoted patterns (** for any folders)")
    add("-o", "--output", metavar="DIR", required=True, help="folder for the results")
    add("--config", metavar="C", default="configs/nvsadapter.yaml", help="YAML file (default %(default)s)")
    add(
        "--gpu",
        metavar="G",
        default="auto",
        help="local engine: auto (default), cpu, or ids such as 0,1 to use them all",
    )
    add("--engine", metavar="E", default="local", help="local (default): GPUs of this machine; ray: also many machines")
    add("--address", metavar="A", help="Ray cluster: auto, HOST:PORT or ray://HOST:PORT (default: this machine alone)")
    add(
        "--gpus-per-task",
        metavar="N",
        type=float,
        help="GPUs of each worker: 0.5 puts two images on a GPU (default 1; Ray: 0 for CPUs)",
    )
    add("--workers", metavar="N", type=int, help="Ray: how many workers (default: as many as the cluster has room for)")
    add("--max-retries", metavar="N", type=int, default=2, help="attempts after a first that failed (default 2)")
    add(
        "--timeout", metavar="S", type=float, default=7200.0, help="seconds for one attempt (default 7200; 0: no limit)"
    )
    add("--memory", metavar="GB", type=float, help="local: give up images that need more memory; Ray: place by it")
    add("--resume", action="store_true", help="go on with the batch in DIR; without one, begin")
    add("--retry-failed", action="store_true", help="with --resume: try again what has failed for good")
    add("--dry-run", action="store_true", help="say what would be done, and do nothing")
    add_message_options(parser)
    # Only for --help: overrides may stand anywhere between the options, which a positional argument cannot.
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').strip()} [key=value ...]"


def sort_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell images from ``key=value``; a file may have a name like that."""
    overrides = [word for word in words if _OVERRIDE.match(word) and not os.path.lexists(word)]
    return [word for word in words if word not in overrides], overrides


def start(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run the batch and return the exit code."""
    images, overrides = sort_words([*options.images, *rest])
    code = 0

    def command() -> None:
        nonlocal code
        code = run(_options(options, images, overrides))

    again = [*sys.argv, *([] if options.resume else ["--resume"])]
    return guarded(command, debug=options.debug, resume_hint=f"go on with: {command_line(again)}") or code


def run(options: "BatchOptions") -> int:
    """Do the batch, say what came out, and return 0, or 1 when an image has failed.

    Raises:
        InputError: see `batch.run_batch`.
        KeyboardInterrupt: the batch was interrupted.
    """
    from threedrec.batch import run_batch

    report = run_batch(options, _show_plan)
    if options.dry_run:
        return 0
    logger.info(
        "%d done, %d failed, %d left; %s",
        len(report.done),
        len(report.failed),
        len(report.left),
        report.output / "index.html",
    )
    for line in report.failed[:_MOST_SHOWN]:
        logger.warning("failed: %s: %s", line.input, line.error)
    if len(report.failed) > _MOST_SHOWN:
        logger.warning("… and %d more, see %s", len(report.failed) - _MOST_SHOWN, report.output / "summary.csv")
    if report.interrupted:
        raise KeyboardInterrupt
    return 1 if report.failed else 0


def _show_plan(plan: "Plan", inputs: "Inputs") -> None:
    copies = sum(len(tasks) for tasks in plan.copies.values())
    counts = {
        "to do": len(plan.tasks),
        "with the same content as another": copies,
        "done before": len(plan.finished),
        "failed before (--retry-failed tries them again)": len(plan.given_up),
        "cannot be opened": len(plan.broken),
    }
    words = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    changed = f"; {len(plan.changed)} of them changed since" if plan.changed else ""
    logger.info("%d images under %s: %s%s", len(inputs.images), inputs.root, words, changed)
    if inputs.skipped:
        logger.info("%d other files left out", len(inputs.skipped))


def _options(options: argparse.Namespace, images: list[str], overrides: list[str]) -> "BatchOptions":
    from threedrec.batch import BatchOptions

    return BatchOptions(
        images=images,
        output=options.output,
        config=options.config,
        overrides=overrides,
        gpu=options.gpu,
        engine=options.engine,
        address=options.address,
        gpus_per_task=options.gpus_per_task,
        workers=options.workers,
        max_retries=options.max_retries,
        timeout=options.timeout,
        memory_gb=options.memory,
        resume=options.resume,
        retry_failed=options.retry_failed,
        dry_run=options.dry_run,
    )
