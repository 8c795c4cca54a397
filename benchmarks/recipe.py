"""The released recipe of 8000 iterations with random full-size weights, in sittings: what each iteration takes.

    python benchmarks/recipe.py --seconds 500                 go on for about 500 seconds, then keep a checkpoint
    python benchmarks/recipe.py                               go on to the end: turntable and mesh included
    python benchmarks/recipe.py --short                       30 iterations at each resolution, from the first fog on
    python benchmarks/recipe.py --settled                     the same on a solid ball that does not change
    python benchmarks/recipe.py --short --steps 2 --device cpu --weights mini recipe=mini-cpu     to try the script

Sittings share ``--folder``, which holds the weights (5 GB, written by the first one), the run, and the time of every
iteration. Minutes are the sums of the stages in the run's ``metrics.json``, which every sitting adds to; they include
loading, pictures and checkpoints. Iterations are timed from one to the next, and summed up by resolution: a median, and
the mean, in which previews and validation are counted too. Every sitting is added to ``<out>/recipe.jsonl``.

With random weights the field grows into an opaque room that fills its box, with more samples than an object has. What
iterations take on an object is told by ``--settled``: its ball has about as many visible samples as a finished object,
and the learning rate is next to nothing. ``settled_minutes`` are the recipe's iterations times these medians.
"""

import argparse
import contextlib
import csv
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, TextIO

import records
import torch
from rich.console import Console
from sds import write_weights

from threedrec import registry
from threedrec.cameras import RandomCameraSampler
from threedrec.config import load_config
from threedrec.config_schema import ExperimentConfig
from threedrec.distillation import DISTILLATION
from threedrec.host import Host, Interrupted
from threedrec.launch import choose_device, open_run, process_seconds

REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHTS = "random_step_1.ckpt"
SHORT_STEPS = 30
SETTLED = ("system.geometry.density_blob_scale=200.0", "system.optimizer.args.lr=1.0e-12")
"""A solid ball in place of fog, for good: so small a step changes nothing that is seen."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of this sitting (default: to the end)")
    parser.add_argument("--short", action="store_true", help="a few iterations at each resolution, thrown away")
    parser.add_argument("--settled", action="store_true", help="like --short, on a solid ball that does not change")
    parser.add_argument(
        "--steps",
        type=int,
        default=SHORT_STEPS,
        help=f"at each resolution with --short or --settled (default {SHORT_STEPS})",
    )
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "outputs" / "recipe", help="shared by sittings")
    parser.add_argument("--weights", help="a released checkpoint, or mini (default: a random one is written)")
    parser.add_argument("--family", choices=("sd21", "sd15"), default="sd21")
    parser.add_argument("--config", default=str(REPOSITORY / "configs" / "nvsadapter.yaml"))
    parser.add_argument("--image", type=Path, default=REPOSITORY / "load" / "images" / "robot.png")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("overrides", nargs="*", help="key=value, as for launch.py")
    return parser.parse_args(arguments)


class Clock:
    """Listens to a run: writes the seconds of every iteration, and knows when the sitting is over.

    Rows are an iteration's number, 1 for the first, and its seconds; the first of a sitting has no beginning and is
    left out. They are written at once, so that a sitting that is cut short leaves what it measured.
    """

    def __init__(self, limit: float, rows: TextIO) -> None:
        self._end = time.monotonic() + limit
        self._last: tuple[int, float] | None = None
        self._rows = rows

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end

    def tick(self, stage: str, done: int, total: int) -> None:
        """Hear that a step is over."""
        if stage not in DISTILLATION:
            self._last = None
            return
        now = time.perf_counter()
        if self._last is not None and self._last[0] == done - 1:
            self._rows.write(f"{done},{now - self._last[1]:.6f}\n")
        self._last = done, now


def run(args: argparse.Namespace, folder: Path, overrides: Sequence[str], until: str | None = None) -> tuple[Any, Path]:
    """Go on with the run in ``folder`` for a sitting; return its configuration and where it is."""
    weights = args.weights
    if weights is None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / WEIGHTS
        if not weights.is_file():
            write_weights(argparse.Namespace(family=args.family, device=args.device), folder)
    values = [
        f"data.image_path={args.image}",
        "recipe=full-gpu",
        f"system.guidance.pretrained={weights}",
        "trainer.enable_progress_bar=false",
        f"trial_dir={folder / 'run'}",
        "resume=auto",
    ]
    given = {text.split("=")[0] for text in args.overrides}
    values = [text for text in values if text.split("=")[0] not in given]
    device = choose_device(records.gpu(args.device))
    config = load_config(args.config, [*values, *overrides, *args.overrides], device_type=device.type)
    run_dir = open_run(config, "train")
    with (folder / "iterations.csv").open("a", buffering=1, encoding="utf-8") as rows:
        clock = Clock(args.seconds, rows)
        host = Host(stop=clock.over, progress=clock.tick, startup_seconds=process_seconds)
        system = registry.find("system", config.system_type)(config, run_dir, device, host)
        with contextlib.suppress(Interrupted):
            system.train(until)
    return config, run_dir


def by_resolution(config: ExperimentConfig, folder: Path) -> list[dict[str, Any]]:
    """Iterations of every resolution, how many of them were timed, and milliseconds of one."""
    with (folder / "iterations.csv").open(newline="", encoding="utf-8") as file:
        times = {int(step): float(seconds) for step, seconds in csv.reader(file)}
    camera = config.data.random_camera
    size_at = RandomCameraSampler(camera).size_at
    begin = 0
    rows: list[dict[str, Any]] = []
    for end in [*camera.resolution_milestones, config.trainer.max_steps]:
        found = [1e3 * times[step] for step in range(begin + 1, end + 1) if step in times]
        # The first ones at a new size allocate, tune and capture.
        settled = found[len(found) // 5 :]
        height, _, views = size_at(begin)
        rows.append(
            {
                "pixels": height,
                "views": views,
                "iterations": [begin, end],
                "timed": len(found),
                "median_ms": round(median(settled), 2) if settled else None,
                "mean_ms": round(fmean(settled), 2) if settled else None,
            }
        )
        begin = end
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """A sitting of the recipe, or a short run; return its record."""
    if args.short or args.settled:
        with tempfile.TemporaryDirectory() as scratch:
            steps = args.steps
            changes = [
                f"trainer.max_steps={3 * steps}",
                f"data.resolution_milestones=[{steps},{2 * steps}]",
                "system.guidance.warm_start.enabled=false",
                "trainer.num_sanity_val_steps=0",
            ]
            if args.settled:
                changes += SETTLED
            line = record(*run(args, Path(scratch), changes, until="test"), Path(scratch)) | {"short": True}
            return line | settled_minutes(args, line) if args.settled else line
    return record(*run(args, args.folder, []), args.folder) | {"short": False}


def settled_minutes(args: argparse.Namespace, line: dict[str, Any]) -> dict[str, Any]:
    """What the recipe's iterations take together if each takes the median of its resolution."""
    recipe = [] if any(text.startswith("recipe=") for text in args.overrides) else ["recipe=full-gpu"]
    values = [f"data.image_path={args.image}", *recipe, *args.overrides]
    whole = load_config(args.config, values, device_type=args.device.partition(":")[0])
    ends = [*whole.data.random_camera.resolution_milestones, whole.trainer.max_steps]
    counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    medians = [row["median_ms"] for row in line["by_resolution"]]
    known = len(counts) == len(medians) and None not in medians
    seconds = sum(count * median / 1e3 for count, median in zip(counts, medians, strict=True)) if known else None
    return {"settled": True, "settled_minutes": None if seconds is None else round(seconds / 60, 2)}


def record(config: ExperimentConfig, run_dir: Path, folder: Path) -> dict[str, Any]:
    """What is known of a run by now."""
    metrics = json.loads((run_dir / "metrics.json").read_text())
    stages = metrics["stages"]
    seconds = sum(stage["seconds"] for stage in stages.values())
    resolutions = by_resolution(config, folder)
    whole = any((run_dir / "save").glob("*.glb"))
    return {
        "recipe": config.recipe,
        "max_steps": config.trainer.max_steps,
        "complete": whole,
        "minutes": round(seconds / 60, 2),
        "peak_gpu_gb": max(stage["peak_memory_gb"] for stage in stages.values()),
        "by_resolution": resolutions,
        "stages": stages,
        "device": metrics["device"],
        "model": metrics.get("model", "").replace(f"{folder}/", ""),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    args = parse(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.stderr.write("recipe: needs a CUDA device (or --device cpu, with a tiny configuration)\n")
        return 2
    line = {
        "date": records.now(),
        "machine": records.machine(args.device),
        "versions": records.versions(("torch", "diffusers")),
        "weights": args.weights or f"{args.family}, random",
        "overrides": args.overrides,
        **measure(args),
    }
    Console().print_json(json.dumps(line))
    if not args.no_save:
        records.append(args.out, "recipe.jsonl", [line])
    return 0


if __name__ == "__main__":
    sys.exit(main())
