"""What a batch of a given size costs: measured numbers, and a replay of measured task times on N workers that fail.

    python scripts/simulate_scaling.py                                      tables of what was measured
    python scripts/simulate_scaling.py --manifest objects/manifest.jsonl --images 100000 --workers 8 64 512
    python scripts/simulate_scaling.py --spot-hours 4 --checkpoint 30       machines that vanish every 4 hours
    python scripts/simulate_scaling.py --measure objects                    measure sizes and overheads on this machine
    python scripts/simulate_scaling.py --write docs/scaling.md              put the tables into the page

Seconds and memory come from benchmarks/results/reconstruct.jsonl (benchmarks/reconstruct.py) or, with --manifest, from
a batch; sizes and overheads from benchmarks/results/batch.jsonl (--measure); images an hour on several GPUs from
benchmarks/results/throughput.jsonl (benchmarks/batch.py). Nothing is assumed for hardware that has no record: it is
left out and said to be missing.
"""

import argparse
import heapq
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
MODEL_STAGES = ("prepare", "views", "fit", "coarse", "fine")
"""Stages of the worker with the diffusion model; the others can be done beside it."""
SCALES = (10**3, 10**6, 10**9)
KINDS = ("cpu", "gpu")
DAY = 86400.0


@dataclass(frozen=True)
class Cost:
    """What one image takes on one kind of device."""

    device: str
    recipe: str
    seconds: float
    """Of all stages."""
    model_seconds: float
    """Of those that need the diffusion model."""
    memory_gb: float
    """Largest peak of any stage: of tensors on a GPU, of the process on a CPU."""
    runs: int
    """How many records this is the mean of."""
    outside: float = 0.0
    """Seconds of a run in a new process that are in no stage: a warm worker spends them once."""

    @property
    def kind(self) -> str:
        """``cpu`` or ``gpu``."""
        return "cpu" if self.device.startswith("cpu") else "gpu"


@dataclass(frozen=True)
class Failures:
    """What goes wrong; all of it by chance."""

    spot_hours: float = 0.0
    """Mean time until a worker's machine vanishes; 0 for machines that stay."""
    replace_seconds: float = 120.0
    """Until another machine takes its place."""
    crash_rate: float = 0.0
    """Share of attempts that crash, at a random moment."""
    checkpoint_seconds: float = 30.0
    """Work since the last checkpoint is lost; this long at most."""
    start_seconds: float = 0.0
    """From the start of a worker to its first task."""
    max_retries: int = 2


@dataclass
class Replay:
    """One simulated batch."""

    workers: int
    seconds: float = 0.0
    """Until the last image is settled."""
    useful: float = 0.0
    """Worker seconds that became results."""
    lost: float = 0.0
    """Worker seconds done again, or spent on images that failed."""
    failed: int = 0

    @property
    def efficiency(self) -> float:
        """Share of all worker seconds that became results."""
        return self.useful / (self.workers * self.seconds) if self.seconds else 1.0


def replay(durations: Sequence[float], workers: int, failures: Failures, seed: int = 0) -> Replay:
    """Replay tasks of ``durations`` (seconds) on ``workers`` workers: whoever is free takes the next one."""
    rng, result = random.Random(seed), Replay(workers)
    # (free at, number, its machine vanishes at)
    free = [(failures.start_seconds, number, _vanishing(rng, 0.0, failures)) for number in range(workers)]
    # (can be taken from, order, seconds left, crashes so far, seconds of useful work so far)
    tasks = [(0.0, order, seconds, 0, 0.0) for order, seconds in enumerate(durations)]
    heapq.heapify(free)
    heapq.heapify(tasks)
    while tasks:
        free_at, number, vanishes = heapq.heappop(free)
        waiting, order, left, crashes, useful = heapq.heappop(tasks)
        start = max(free_at, waiting)
        crash = start + rng.random() * left if rng.random() < failures.crash_rate else float("inf")
        end = min(start + left, crash, max(vanishes, start))
        worked = end - start
        if end == start + left:
            result.useful += useful + left
            result.seconds = max(result.seconds, end)
            heapq.heappush(free, (end, number, vanishes))
            continue
        kept = worked - min(worked % failures.checkpoint_seconds, worked) if failures.checkpoint_seconds else 0.0
        result.lost += worked - kept
        crashed = end == crash
        if crashed and crashes >= failures.max_retries:
            result.failed += 1
            result.lost += useful + kept
            result.seconds = max(result.seconds, end)
        else:
            heapq.heappush(tasks, (end, order, left - kept, crashes + crashed, useful + kept))
        back = end + failures.start_seconds + (0.0 if crashed else failures.replace_seconds)
        heapq.heappush(free, (back, number, vanishes if crashed else _vanishing(rng, back, failures)))
    return result


def _vanishing(rng: random.Random, now: float, failures: Failures) -> float:
    return now + rng.expovariate(1.0 / (failures.spot_hours * 3600.0)) if failures.spot_hours else float("inf")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; none of a missing one."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def read_costs(path: Path) -> list[Cost]:
    """Return the mean costs of whole runs (without overrides), by device and recipe."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in read_lines(path):
        if not record.get("overrides"):
            groups.setdefault((record["device"], record["recipe"]), []).append(record)
    return [_mean_cost(device, recipe, runs) for (device, recipe), runs in groups.items()]


def _mean_cost(device: str, recipe: str, runs: Sequence[dict[str, Any]]) -> Cost:
    # A worker starts once for many images, and that is counted elsewhere.
    stages = [{name: stage for name, stage in run["stages"].items() if name != "startup"} for run in runs]
    seconds = [sum(stage["seconds"] for stage in run.values()) for run in stages]
    totals = [run.get("total_seconds", whole) for run, whole in zip(runs, seconds, strict=True)]
    return Cost(
        device,
        recipe,
        statistics.mean(seconds),
        statistics.mean(sum(run[name]["seconds"] for name in MODEL_STAGES if name in run) for run in stages),
        max(stage["peak_memory_gb"] for run in stages for stage in run.values()),
        len(runs),
        max(statistics.mean(totals) - statistics.mean(seconds), 0.0),
    )


def manifest_durations(path: Path) -> list[float]:
    """Return the seconds of all images that a batch has finished."""
    lines = [line for line in read_lines(path) if line["status"] == "done" and not line.get("copy_of")]
    if not lines:
        sys.exit(f"error: {path}: no finished image in it")
    return [float(line["seconds"]) for line in lines]


def measure(folder: Path) -> dict[str, Any]:
    """Measure sizes of the results in ``folder`` (runs, or a batch), and what a batch adds to each image."""
    runs = sorted({path.parent for path in folder.rglob("metrics.json")})
    if not runs:
        sys.exit(f"error: {folder}: holds no result (metrics.json)")
    sizes = {"bytes": [run.rglob("*") for run in runs], "result_bytes": [(run / "save").rglob("*") for run in runs]}
    record: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "results": len(runs)}
    for name, parts in sizes.items():
        record[name] = round(sum(path.stat().st_size for part in parts for path in part if path.is_file()) / len(runs))
    record["files"] = round(sum(path.is_file() for run in runs for path in run.rglob("*")) / len(runs))
    return {**record, **_overheads()}


def _overheads() -> dict[str, float]:
    """Seconds of a batch's own process for each image, and of starting a worker."""
    from threedrec.batch.inputs import hash_file
    from threedrec.batch.manifest import Line, Manifest
    from threedrec.batch.options import RECONSTRUCT
    from threedrec.batch.process import Process

    with tempfile.TemporaryDirectory(dir=REPOSITORY / "outputs") as place:
        manifest = Manifest(Path(place) / "manifest.jsonl")
        start = time.perf_counter()
        for number in range(200):
            manifest.append(Line(f"{number}.png", "0" * 64, "done", 1.0, 1, {"psnr": 20.0}))
        append = (time.perf_counter() - start) / 200
        (Path(place) / "image").write_bytes(bytes(10**6))
        start = time.perf_counter()
        for _ in range(50):
            hash_file(f"{place}/image")
        hashing = (time.perf_counter() - start) / 50
        start = time.perf_counter()
        worker = Process(RECONSTRUCT, Path(place) / "log")
        worker.connection.poll(120)
        ready = time.perf_counter() - start
        worker.kill()
    return {
        "manifest_seconds": round(append, 6),
        "hash_seconds_per_mb": round(hashing, 6),
        "start_seconds": round(ready, 2),
    }


def cost_table(costs: Sequence[Cost], sizes: dict[str, Any] | None) -> str:
    """Markdown: what one image takes, on every device with a record."""
    rows = [
        f"| {cost.device} | {cost.recipe} | {cost.seconds:.0f} | {cost.model_seconds:.0f} | {cost.memory_gb:.2f} |"
        f" {cost.runs} |"
        for cost in costs
    ]
    missing = [kind for kind in KINDS if kind not in {cost.kind for cost in costs}]
    rows += [f"| {kind.upper()} | | not measured yet | | | 0 |" for kind in missing]
    head = ["| device | recipe | seconds an image | of them with the diffusion model | peak GB | runs |"]
    head.append("|---|---|---|---|---|---|")
    return "\n".join([*head, *rows, "", _size_words(sizes) if sizes else "Sizes: not measured yet.", ""])


def _size_words(sizes: dict[str, Any]) -> str:
    megabytes, result = sizes["bytes"] / 1e6, sizes["result_bytes"] / 1e6
    line, hashing = sizes["manifest_seconds"] * 1e3, sizes["hash_seconds_per_mb"] * 1e3
    return (
        f"An image's folder holds {sizes['files']} files and {megabytes:.1f} MB; the result, and all there is to send"
        f" on (egress), are the {result:.1f} MB in `save/`, the rest checkpoints and logs"
        f" (mean of {sizes['results']} results)."
        f" The batch's own process spends {line:.1f} ms on each line of the manifest and {hashing:.1f} ms on each MB of"
        f" images; a worker process is up after {sizes['start_seconds']:.1f} s, before it loads a model"
        f" (measured on {sizes['date'][:10]})."
    )


def scale_table(costs: Sequence[Cost], sizes: dict[str, Any] | None) -> str:
    """Markdown: what 10³, 10⁶ and 10⁹ images take, from the measured cost of one."""
    rows = ["| images | device | worker days | workers for a week | results, TB | files | manifest lines a second |"]
    rows.append("|---|---|---|---|---|---|---|")
    for count in SCALES:
        for cost in costs:
            days = count * cost.seconds / DAY
            size = f"{count * sizes['result_bytes'] / 1e12:,.2f} | {count * sizes['files']:,}" if sizes else "? | ?"
            needed = math.ceil(days / 7)
            rate = count / (7 * DAY)
            rows.append(f"| {count:,} | {cost.device} | {days:,.1f} | {needed:,} | {size} | {rate:,.3f} |")
    return "\n".join(rows) + "\n"


def replay_table(durations: Sequence[float], images: int, workers: Sequence[int], failures: Failures) -> str:
    """Markdown: a batch of ``images`` replayed on each number of workers."""
    rng = random.Random(0)
    drawn = [rng.choice(durations) for _ in range(images)]
    rows = ["| workers | hours | images an hour | efficiency | lost | failed |", "|---|---|---|---|---|---|"]
    for count in workers:
        found = replay(drawn, count, failures)
        rate = (images - found.failed) / found.seconds * 3600
        share = found.lost / (found.useful + found.lost)
        rows.append(
            f"| {count:,} | {found.seconds / 3600:,.2f} | {rate:,.0f} | {found.efficiency:.1%} | {share:.1%} |"
            f" {found.failed} |"
        )
    return "\n".join(rows) + "\n"


def throughput_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: images an hour by numbers of GPUs and of images on each, the newest record of every setting."""
    settings = {
        tuple(record[key] for key in ("device", "gpus", "per_gpu", "finisher")): record
        for record in records
        if not record["overrides"]
    }
    if not settings:
        return "Images an hour on 1, 2 and 4 GPUs have **not been measured yet** (`benchmarks/batch.py`).\n"
    rows = ["| GPUs | images at a time on each | images measured | images an hour | for each GPU | efficiency |"]
    rows.append("|---|---|---|---|---|---|")
    for (device, gpus, per_gpu, finisher), record in sorted(settings.items()):
        rate, alone = record["images_per_hour"], settings.get((device, 1, per_gpu, finisher))
        share = f"{rate / gpus / alone['images_per_hour']:.1%}" if alone else ""
        ways = f"{per_gpu}, and a process that finishes" if finisher else f"{per_gpu}"
        rows.append(f"| {gpus} × {device} | {ways} | {record['images']} | {rate:,.0f} | {rate / gpus:,.0f} | {share} |")
    newest = max(record["date"] for record in settings.values())
    recipes = ", ".join(sorted({record["recipe"] for record in settings.values()}))
    cores = " or ".join(sorted({str(record["cores"]) for record in settings.values()}))
    rows.append(f"\nWarm workers, recipe {recipes}, {cores} CPU cores; {newest[:10]}.")
    return "\n".join(rows) + "\n"


def whole_runs(costs: Sequence[Cost]) -> Cost:
    """Return the cost that is replayed: of a GPU where one has a record."""
    return next((cost for cost in costs if cost.kind == "gpu"), costs[0])


def start_seconds(cost: Cost | None, sizes: dict[str, Any] | None) -> float:
    """Return the seconds from the start of a worker to its first task's first stage, as far as they were measured."""
    return (cost.outside if cost else 0.0) + (sizes["start_seconds"] if sizes else 0.0)


def page_tables(results: Path = RESULTS) -> dict[str, str]:
    """Return the tables of docs/scaling.md by the names of their places."""
    costs = read_costs(results / "reconstruct.jsonl")
    records = read_lines(results / "batch.jsonl")
    sizes = records[-1] if records else None
    tables = {"cost": cost_table(costs, sizes), "scales": scale_table(costs, sizes)}
    tables["throughput"] = throughput_table(read_lines(results / "throughput.jsonl"))
    if costs:
        cost = whole_runs(costs)
        durations, start = [cost.seconds], start_seconds(cost, sizes)
        stays = replay_table(durations, 1000, (1, 2, 4, 8, 64, 512), Failures(start_seconds=start))
        spot = replay_table(durations, 1000, (1, 2, 4, 8, 64, 512), Failures(1.0, crash_rate=0.01, start_seconds=start))
        tables["replay"] = (
            f"1,000 images of {cost.seconds:.0f} s ({cost.device}), {start:.0f} s for a worker to start, machines that"
            f" stay:\n\n{stays}\n"
            "The same on machines that vanish once an hour and are replaced after two minutes, 1% of attempts crashing:"
            f"\n\n{spot}"
        )
    return tables


def with_tables(page: str, tables: dict[str, str]) -> str:
    """Return ``page`` with what stands between ``<!-- name -->`` and ``<!-- end -->`` replaced by the tables."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = place.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", page)
    return page


def parse() -> argparse.Namespace:
    """Read the command line."""
    text = __doc__ or ""
    parser = argparse.ArgumentParser(
        description=text.splitlines()[0], epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--manifest", type=Path, help="replay the times of a batch (default: of recorded runs, on a GPU if any were)")
    add("--images", type=int, default=1000, help="how many images (default 1000)")
    add("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 64, 512], help="numbers of workers to replay")
    add("--spot-hours", type=float, default=0.0, help="mean hours until a machine vanishes (default: never)")
    add("--replace", type=float, default=120.0, help="seconds until it is replaced (default 120)")
    add("--crash-rate", type=float, default=0.0, help="share of attempts that crash (default 0)")
    add("--checkpoint", type=float, default=30.0, help="seconds between checkpoints (default 30, as in runs)")
    add("--start", type=float, default=None, help="seconds of starting a worker (default: as measured)")
    add("--max-retries", type=int, default=2, help="as of the batch (default 2)")
    add("--measure", type=Path, metavar="DIR", help="measure sizes of results in DIR and overheads; add a record")
    add("--write", type=Path, metavar="PAGE", help="put the tables into a page")
    return parser.parse_args()


def main() -> None:
    """Measure, write, or show."""
    args = parse()
    if args.measure:
        record = measure(args.measure)
        with (RESULTS / "batch.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        sys.stdout.write(json.dumps(record) + "\n")
        return
    tables = page_tables()
    if args.write:
        args.write.write_text(with_tables(args.write.read_text(encoding="utf-8"), tables), encoding="utf-8")
        return
    costs, records = read_costs(RESULTS / "reconstruct.jsonl"), read_lines(RESULTS / "batch.jsonl")
    if not args.manifest and not costs:
        sys.exit("error: no measured times; run benchmarks/reconstruct.py, or give --manifest")
    durations = manifest_durations(args.manifest) if args.manifest else [whole_runs(costs).seconds]
    start = args.start
    if start is None:
        start = start_seconds(
            whole_runs(costs) if costs and not args.manifest else None, records[-1] if records else None
        )
    failures = Failures(args.spot_hours, args.replace, args.crash_rate, args.checkpoint, start, args.max_retries)
    replayed = replay_table(durations, args.images, args.workers, failures)
    sys.stdout.write(f"{tables['cost']}\n{tables['scales']}\n{args.images} images, {failures}\n\n{replayed}")


if __name__ == "__main__":
    main()
