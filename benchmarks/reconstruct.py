"""Times whole reconstructions, stage by stage, and keeps the numbers. Run it on an idle machine.

    python benchmarks/reconstruct.py                 a sample image, on the CPU and, if there is one, the GPU
    python benchmarks/reconstruct.py --device cpu --image PHOTO.png trainer.max_steps=320
    python benchmarks/reconstruct.py --device cuda:0 --out benchmarks/results

Each runs in a process of its own, as people start it. Seconds are wall-clock times: of the stages as ``metrics.json``
has them ("startup": from the start of the process to the first stage, imports and the choice of threads included), and
of the whole process. Every measurement is added to ``<out>/reconstruct.jsonl``, one JSON object a line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import records
import torch
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "lightning")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=REPOSITORY / "load" / "images" / "robot.png")
    parser.add_argument("--config", default="configs/nvsadapter.yaml")
    parser.add_argument("--device", action="append", help="cpu or cuda:N; may be repeated (default: cpu and cuda:0)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("overrides", nargs="*", help="key=value, as for launch.py")
    return parser.parse_args()


def measure(device: str, image: Path, config: str, overrides: list[str]) -> dict[str, Any]:
    """Run one reconstruction in a folder that is thrown away; return its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        values = [f"data.image_path={image.resolve()}", *overrides, f"trial_dir={run_dir}"]
        command = [sys.executable, "launch.py", "--config", config, "--train", "--gpu", records.gpu(device), *values]
        start = time.perf_counter()
        subprocess.run(command, cwd=REPOSITORY, check=True)
        seconds = time.perf_counter() - start
        metrics = json.loads((run_dir / "metrics.json").read_text())
    return {
        "date": records.now(),
        "machine": records.cpu(),
        "versions": records.versions(PACKAGES),
        "image": image.name,
        "overrides": overrides,
        "total_seconds": round(seconds, 1),
        **{key: metrics[key] for key in ("device", "recipe", "model", "stages", "reference", "mesh")},
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Seconds and peak memory per stage, one column a device."""
    shown = Table(title="seconds (peak memory, GB)")
    shown.add_column("stage")
    for result in results:
        shown.add_column(f"{result['device']}\n{result['recipe']}", justify="right")
    names = list(dict.fromkeys(name for result in results for name in result["stages"]))
    for name in names:
        stages = [result["stages"].get(name) for result in results]
        shown.add_row(name, *(f"{s['seconds']:.1f} ({s['peak_memory_gb']:.2f})" if s else "" for s in stages))
    shown.add_row("whole process", *(f"{result['total_seconds']:.1f}" for result in results), style="bold")
    return shown


def main() -> None:
    """Measure every device that was asked for."""
    args = parse()
    devices = args.device or (["cpu", "cuda:0"] if torch.cuda.is_available() else ["cpu"])
    results = [measure(device, args.image, args.config, args.overrides) for device in devices]
    Console().print(table(results))
    if not args.no_save:
        records.append(args.out, "reconstruct.jsonl", results)


if __name__ == "__main__":
    main()
