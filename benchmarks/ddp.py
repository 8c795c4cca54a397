r"""Trains the adapter on one device and on several, and compares: the loss curves at equal global batch, and the speed.

    python benchmarks/ddp.py --devices 2
    python benchmarks/ddp.py --devices 4 --base sd21 --batch 16 --precision bf16-mixed --steps 40

Three runs of main.py, the last two under torchrun: one device with the whole batch; N devices that share it, whose
losses must be the same but for rounding; N devices with a whole batch each. Weights of sd21 are random, data are drawn
on the fly: time and arithmetic count here. On a machine without a GPU the devices are processes (gloo), which share its
cores, so only the curves say something there. A record is added to benchmarks/results/ddp.jsonl.

Exit codes: 0, 1 the curves differ by more than --tolerance, 2 a run failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from records import append, machine, now, versions

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "adapter"
LOG_EVERY = 5


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", type=int, default=2, help="how many are compared with one (default 2)")
    add("--base", default="mini", help="mini (default), sd21, sd15, or a model folder")
    add("--batch", type=int, default=32, help="objects per step on one device (default 32)")
    add("--steps", type=int, default=60, help=f"of each run, a multiple of {LOG_EVERY} (default 60)")
    add("--precision", default="32-true", help="32-true (default), bf16-mixed or 16-mixed")
    add("--workers", type=int, default=8, help="processes per device that draw data (default 8)")
    add("--tolerance", type=float, default=1e-3, help="largest difference of losses (default 1e-3)")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of the configs")
    add("--results", type=Path, default=ROOT / "benchmarks/results", help="folder for the record")
    return parser.parse_args()


def command(arguments: argparse.Namespace, folder: Path, name: str, devices: int, batch: int) -> list[str]:
    """The command of one run; ``batch`` is that of a device."""
    launcher = [sys.executable]
    if devices > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(devices)]
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    random = arguments.base != "mini"
    words = {
        "model.base": arguments.base, "model.random_weights": str(random).lower(), "data.kind": "synthetic",
        "data.batch_size": batch, "data.num_workers": arguments.workers, "data.objects": 1024,
        # So that the loss moves at all in so few steps.
        "optim.warmup_steps": 10,
        # A device draws again while all its samples are unconditional, which happens more often to fewer of them.
        "optim.condition_dropout": 0,
        "trainer.accelerator": accelerator, "trainer.devices": devices, "trainer.precision": arguments.precision,
        "trainer.max_steps": arguments.steps, "trainer.log_every_steps": LOG_EVERY, "trainer.val_every_steps": 0,
        "trainer.images_every_steps": 0,
    }  # fmt: skip
    given = [*(f"{key}={value}" for key, value in words.items()), *arguments.set]
    configs = ["-b", str(CONFIGS / "base.yaml"), str(CONFIGS / "mini.yaml"), "-n", name, "-l", str(folder)]
    return [*launcher, str(ROOT / "main.py"), *configs, "--", *given]


def run(arguments: argparse.Namespace, folder: Path, name: str, devices: int, batch: int) -> list[dict[str, Any]]:
    """Train, and return what the run logged.

    Raises:
        RuntimeError: it failed; holds what it said last.
    """
    words = command(arguments, folder, name, devices, batch)
    done = subprocess.run(words, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        raise RuntimeError(f"{name} run ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def speed(log: Sequence[dict[str, Any]]) -> float:
    """Samples a second in the median interval of those after the first, which starts everything up."""
    values = sorted(line["samples_per_second"] for line in log[1:] or log)
    return float(values[len(values) // 2])


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs, and what they say together."""
    devices, batch = arguments.devices, arguments.batch
    one = run(arguments, folder, "one", 1, batch)
    shared = run(arguments, folder, "shared", devices, batch // devices)
    each = run(arguments, folder, "each", devices, batch)
    curves = [[line["train/loss"] for line in log] for log in (one, shared)]
    alone = speed(one)
    return {
        "devices": devices,
        "base": arguments.base,
        "precision": arguments.precision,
        "global_batch": batch,
        "steps": arguments.steps,
        "loss_one_device": curves[0],
        "loss_shared_batch": curves[1],
        "max_loss_difference": max(abs(a - b) for a, b in zip(*curves, strict=True)),
        "samples_per_second": {"one": alone, "shared": speed(shared), "each": speed(each)},
        "efficiency_shared_batch": round(speed(shared) / alone / devices, 3),
        "efficiency_batch_each": round(speed(each) / alone / devices, 3),
    }


def main() -> int:
    """Measure, print and record; see the module for exit codes."""
    arguments = parse_arguments()
    if arguments.batch % arguments.devices or arguments.devices < 2 or arguments.steps % LOG_EVERY:
        sys.stderr.write(f"error: --devices must be 2 or more and divide --batch; --steps, a multiple of {LOG_EVERY}\n")
        return 2
    if torch.cuda.is_available() and torch.cuda.device_count() < arguments.devices:
        sys.stderr.write(f"error: --devices {arguments.devices}: this machine has {torch.cuda.device_count()} GPUs\n")
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(arguments, Path(folder))
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = {"date": now(), "device": machine(device), "versions": versions(["torch", "lightning"]), **found}
    append(arguments.results, "ddp.jsonl", [record])
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return 0 if found["max_loss_difference"] <= arguments.tolerance else 1


if __name__ == "__main__":
    raise SystemExit(main())
