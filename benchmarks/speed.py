"""All figures of speed in one file: measures what this machine can, keeps what it cannot.

    python benchmarks/speed.py                           everything a GPU can tell (about 6 minutes on one H200)
    python benchmarks/speed.py --recipe-seconds 540      also a sitting of the released recipe; again, until it is done
    python benchmarks/speed.py --device cpu              the reconstruction on the CPU
    python benchmarks/speed.py --only hashgrid --only mini
    python benchmarks/speed.py --collect                 measure nothing: the newest records again

Every part is a benchmark of this folder in a process of its own, which adds its records to ``<out>/*.jsonl``; then
``<out>/speed.json`` is made from the newest record of each. Its top-level keys are numbers, or null where there is no
measurement; ``about`` says of each which record it comes from, when, on what and with which versions, and of the hash
encoding which order of points, precision and kind of sums. ``recipe_minutes`` is a number only when all iterations have
been run; until then ``recipe_progress`` has what is known. Figures that begin with ``settled`` are those of a solid
ball, whose number of samples is an object's (`recipe.py`). A part that fails is named, the exit code is 1, and its
figures stay as they were.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from threedrec.files import write_json

FOLDER = Path(__file__).resolve().parent
Record = dict[str, Any]
PARTS = ("guidance", "hashgrid", "nerf_step", "steps", "settled", "mini", "recipe")
TARGETS = {
    "guidance_step_ms": 50.0,
    "unet_ms": 18.0,
    "vae_ms": 30.0,
    "hash_forward_ms": 0.5,
    "hash_forward_backward_ms": 2.2,
    "stage1_iteration_ms": 70.0,
    "stage3_iteration_ms": 180.0,
    "recipe_minutes": 15.0,
    "settled_stage1_iteration_ms": 70.0,
    "settled_stage3_iteration_ms": 180.0,
    "settled_recipe_minutes": 15.0,
    "peak_gpu_gb": 12.0,
    "mini_gpu_s": 20.0,
    "mini_cpu_s": 180.0,
}
"""Of one H200, and of two CPU cores for the last; the keys of the file, in order."""
FEWEST_TIMED = 10
"""Iterations from which on a median counts."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="cuda:N or cpu")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated (default: all but the recipe)")
    parser.add_argument("--recipe-seconds", type=float, metavar="N", help="a sitting of the recipe, about this long")
    parser.add_argument("--recipe-folder", type=Path, default=FOLDER.parent / "outputs" / "recipe")
    parser.add_argument("--collect", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    return parser.parse_args(arguments)


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of every part that this device can do and that is asked for."""
    if args.collect:
        return {}
    known = {"mini": ["reconstruct.py", "--device", args.device]}
    if args.device != "cpu":
        known = {
            "guidance": ["guidance.py"],
            "hashgrid": ["hashgrid.py", "--device", args.device],
            "nerf_step": ["nerf_step.py", "--device", args.device],
            "steps": ["recipe.py", "--short", "--device", args.device],
            "settled": ["recipe.py", "--settled", "--device", args.device],
            **known,
        }
        if args.recipe_seconds is not None:
            folder = str(args.recipe_folder)
            known["recipe"] = [
                "recipe.py", "--seconds", str(args.recipe_seconds), "--folder", folder, "--device", args.device
            ]  # fmt: skip
    return {name: words for name, words in known.items() if args.only is None or name in args.only}


def read(path: Path) -> list[Record]:
    """All records of a file, the oldest first."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) | {"record": f"{path.name}, line {at}"} for at, line in enumerate(lines, 1) if line]


def newest(records: list[Record], wanted: Callable[[Record], bool]) -> Record | None:
    """The last record that is wanted; files grow at their end."""
    return next((record for record in reversed(records) if wanted(record)), None)


def on_gpu(record: Record) -> bool:
    """Whether a record is of a GPU."""
    return not str(record.get("device", record["machine"])).startswith(("cpu", "x86_64", "aarch64", "arm64"))


def figure(record: Record | None, value: Any, **more: Any) -> tuple[float | None, Record]:
    """A value with its origin."""
    if record is None or value is None:
        return None, {}
    origin = {
        "date": record["date"],
        "machine": record.get("device", record["machine"]),
        "versions": record["versions"],
        "record": record["record"],
    }
    return round(float(value), 3), origin | more


def guidance_figures(out: Path) -> dict[str, tuple[float | None, Record]]:
    """Of 16 views with graphs and fresh noise, as reconstructions run it."""
    records = read(out / "guidance.jsonl")
    found = newest(
        records, lambda r: on_gpu(r) and r.get("graphs") and r.get("unconditional") == "fresh" and r.get("views") == 16
    )
    keys = ("guidance_step_ms", "unet_ms", "vae_ms")
    more = {} if found is None else {"views": found["views"], "precision": found["dtype"], "rows": found["rows"]}
    return {key: figure(found, found and found[key], **more) for key in keys}


def hash_figures(out: Path) -> dict[str, tuple[float | None, Record]]:
    """2^20 points in random order, float32 tables, gradients summed in float; the variants of that date beside them."""
    rows = [row for row in read(out / "hashgrid.jsonl") if on_gpu(row) and row["points"] == 2**20]
    rows = [row for row in rows if row["backend"] == "triton"]
    figures = {}
    for key, work in (("hash_forward_ms", "forward"), ("hash_forward_backward_ms", "forward, backward")):
        these = [row for row in rows if row["work"] == work]
        main = newest(these, lambda r: (r["order"], r["precision"], r["fixed_sums"]) == ("random", "fp32", False))
        more: Record = {"point_order": "random", "precision": "fp32"}
        if main is not None:
            if "backward" in work:
                more["sums"] = "float"
            more["variants"] = [
                {
                    "point_order": row["order"],
                    "precision": row["precision"],
                    **({"sums": "fixed" if row["fixed_sums"] else "float"} if "backward" in work else {}),
                    "milliseconds": row["milliseconds"],
                }
                for row in these
                if row["date"] == main["date"]
            ]
        figures[key] = figure(main, main and main["milliseconds"], **more)
    return figures


def timed(record: Record, index: int) -> bool:
    """Whether enough iterations of a resolution were timed."""
    resolutions = record["by_resolution"]
    return len(resolutions) > index and resolutions[index]["timed"] >= FEWEST_TIMED


def recipe_figures(out: Path) -> tuple[dict[str, tuple[float | None, Record]], Record | None]:
    """Iterations and memory of the released recipe, of a short run where the whole one has not come that far."""
    records = [r for r in read(out / "recipe.jsonl") if on_gpu(r) and r["recipe"] == "full-gpu" and not r["overrides"]]
    settled = newest(records, lambda r: r.get("settled"))
    records = [record for record in records if not record.get("settled")]
    sitting = newest(records, lambda r: not r["short"])
    figures = {}
    for key, index in (("stage1_iteration_ms", 0), ("stage3_iteration_ms", 2)):
        # The whole run's before a short one's: its field is no longer fog.
        enough = [record for record in records if timed(record, index)]
        found = newest(enough, lambda r: not r["short"]) or newest(enough, lambda r: True)
        row = found["by_resolution"][index] if found else {}
        what = {} if found is None else {"run": "short, from the first fog on" if found["short"] else "the recipe"}
        figures[key] = figure(found, row.get("median_ms"), **what, **row)
        row = settled["by_resolution"][index] if settled else {}
        figures[f"settled_{key}"] = figure(settled, row.get("median_ms"), **row)
    figures["settled_recipe_minutes"] = figure(settled, settled and settled["settled_minutes"])
    whole = newest(records, lambda r: not r["short"] and r["complete"])
    figures["recipe_minutes"] = figure(whole, whole and whole["minutes"], iterations=whole and whole["max_steps"])
    peak = whole or newest(records, lambda r: timed(r, 2))
    run = "" if peak is None else "the recipe" if peak is whole else "short, all three resolutions"
    figures["peak_gpu_gb"] = figure(peak, peak and peak["peak_gpu_gb"], run=run)
    keep = ("date", "machine", "versions", "record", "minutes", "by_resolution", "max_steps", "complete")
    return figures, None if sitting is None else {key: sitting[key] for key in keep}


def mini_figures(out: Path) -> dict[str, tuple[float | None, Record]]:
    """A whole reconstruction with the embedded model, from the start of its process to the end."""
    records = read(out / "reconstruct.jsonl")
    figures = {}
    for key, recipe, gpu in (("mini_gpu_s", "mini-gpu", True), ("mini_cpu_s", "mini-cpu", False)):
        found = newest(records, lambda r: (r["recipe"], on_gpu(r), r["overrides"]) == (recipe, gpu, []))  # noqa: B023
        stages = {} if found is None else {name: stage["seconds"] for name, stage in found["stages"].items()}
        # Records from before whole processes were timed left much of the start out of their total.
        seconds = found and max(found["total_seconds"], sum(stages.values()))
        figures[key] = figure(found, seconds, threads=found and found["machine"], stages=stages)
    return figures


def collect(out: Path) -> Record:
    """Everything for ``speed.json``; figures without a record stay as an earlier file has them."""
    path = out / "speed.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    recipe, progress = recipe_figures(out)
    figures = guidance_figures(out) | hash_figures(out) | recipe | mini_figures(out)
    values: Record = {}
    about: Record = {}
    for key, target in TARGETS.items():
        value, origin = figures[key]
        if value is None and before.get(key) is not None:
            value, origin = before[key], before["about"][key]
        values[key] = value
        about[key] = origin | {"target": target}
    return values | {"recipe_progress": progress or before.get("recipe_progress"), "about": about}


def show(figures: Record) -> Table:
    """A row a figure, beside its target."""
    table = Table("figure", "value", "target", "measured", "on")
    for key, target in TARGETS.items():
        origin = figures["about"][key]
        value = "not measured" if figures[key] is None else f"{figures[key]:g}"
        table.add_row(key, value, f"{target:g}", origin.get("date", ""), origin.get("machine", ""))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, collect, print and keep."""
    args = parse(arguments)
    if args.device != "cpu" and not args.collect and not torch.cuda.is_available():
        sys.stderr.write("speed: no CUDA device here; use --device cpu or --collect\n")
        return 2
    console, failed = Console(), []
    for name, words in commands(args).items():
        console.rule(name)
        command = [sys.executable, str(FOLDER / words[0]), *words[1:], "--out", str(args.out)]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
        # After every part, so that a machine that goes away leaves what was measured.
        write_json(args.out / "speed.json", collect(args.out))
    figures = collect(args.out)
    write_json(args.out / "speed.json", figures)
    console.print(show(figures))
    if failed:
        sys.stderr.write(f"speed: failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
