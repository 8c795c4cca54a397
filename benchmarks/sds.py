"""Score distillation at full size with random weights: does half precision keep the gradient, what does a run cost.

    python benchmarks/sds.py gradient                         cosine of the bf16 and fp16 gradients with the fp32 one
    python benchmarks/sds.py gradient --width 32 --device cpu --views 4      a model of a tenth of the width
    python benchmarks/sds.py run                              200 steps of the full-gpu recipe through launch.py
    python benchmarks/sds.py run --memory low                 the same in the low-memory mode
    python benchmarks/sds.py run --fine                       its last half at 256 pixels, the reference at 512
    python benchmarks/sds.py run --weights FILE key=value …   weights and config values of your own

``gradient`` makes its weights on the device. ``run`` writes a released checkpoint of random weights (5 GB, in float16)
into a temporary folder unless FILE is given, and trains in a process of its own, whose ``metrics.json`` holds seconds
and peak GPU memory per stage. Both exit with 1 when a limit is not kept (cosine 0.999; finite values and a gradient
at every step; 12 GB, in the low-memory mode 8). Every measurement is added to ``<out>/sds.jsonl``.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import records
import torch
from released_parity import released_tensors
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from nvsadapter_guidance.full_size import full_size_config, random_model
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.memory import PLANS
from nvsadapter_guidance.model import NVSModelConfig
from nvsadapter_guidance.pipeline import Poses

REPOSITORY = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARES = (0.02, 0.25, 0.5, 0.75, 0.98)
"""Of the noise schedule; the range of score distillation."""
FULL_WIDTH = 320
COSINE = 0.999
LIMITS_GB = {"auto": 12.0, "normal": 12.0, "low": 8.0}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gradient = commands.add_parser("gradient", help="half precision against float32")
    gradient.add_argument("--dtype", choices=("bf16", "fp16"), action="append", help="may be repeated (default: both)")
    gradient.add_argument("--views", type=int, default=16, help="a multiple of 4 (default 16, the released batch)")
    gradient.add_argument("--width", type=int, default=FULL_WIDTH, help="channels of the UNet's first level")
    run = commands.add_parser("run", help="a whole run through launch.py")
    run.add_argument("--weights", type=Path, help="a released checkpoint (default: a random one is written)")
    run.add_argument("--config", default=str(REPOSITORY / "configs" / "nvsadapter.yaml"))
    run.add_argument("--image", type=Path, default=REPOSITORY / "load" / "images" / "robot.png")
    run.add_argument("--steps", type=int, default=200)
    run.add_argument("--memory", choices=tuple(LIMITS_GB), default="auto")
    run.add_argument("--precision", default="auto", help="auto, float32, bfloat16 or float16")
    run.add_argument("--fine", action="store_true", help="go to the last resolution at half of the steps")
    run.add_argument("overrides", nargs="*", help="key=value, as for launch.py")
    for command in (gradient, run):
        command.add_argument("--family", choices=("sd21", "sd15"), default="sd21")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
        command.add_argument("--no-save", action="store_true", help="only print")
    return parser.parse_args()


def narrow(config: NVSModelConfig, width: int) -> NVSModelConfig:
    """The same depth with ``width`` channels instead of 320, small towers and a small autoencoder."""
    channels = [width, 2 * width, 4 * width, 4 * width]
    config.unet |= {"block_out_channels": channels, "attention_head_dim": [1, 2, 4, 4], "norm_num_groups": 16}
    config.vae |= {"block_out_channels": [32] * 4}
    config.image_encoder |= {"hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 4}
    return config


def distil(config: NVSModelConfig, device: str, dtype: str, views: int) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients on latents and on images at every noise level, one after another; and what they cost."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    model = random_model(config, device).to(DTYPES[dtype])
    half = on_gpu and dtype != "fp32"  # as a reconstruction runs it
    encoder = torch.bfloat16 if half else torch.float32
    guidance = ScoreDistillation(model, memory=PLANS["normal"], graphs=half, encoder_dtype=encoder)
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(views, 3, 16, 16, generator=draw).to(device) * 2 - 1
    images = functional.interpolate(coarse, (config.image_size,) * 2, mode="bicubic").clamp(-1, 1).requires_grad_()
    azimuth = torch.linspace(-180, 180, views + 1, device=device)[1:]
    poses = Poses(azimuth, 20.0 * torch.sin(azimuth.deg2rad()), torch.full_like(azimuth, config.distance))
    front = Poses(*(torch.tensor([value], device=device) for value in (0.0, 0.0, config.distance)))
    guidance.prepare(images[:1].detach(), front, torch.Generator(device).manual_seed(0))
    found, seconds = [], []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for share in SHARES:
        start = time.perf_counter()
        result = guidance(images, poses, (share, share), torch.Generator(device).manual_seed(1))
        (on_images,) = torch.autograd.grad(result.loss, images)
        found += [result.gradient.cpu(), on_images.cpu()]
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return found, {"seconds_per_call": round(min(seconds), 3), "gpu_memory_peak_gb": round(peak, 3)}


def cosine(first: Tensor, second: Tensor) -> float:
    """Of two gradients as vectors, in float64."""
    return float(functional.cosine_similarity(first.double().flatten(), second.double().flatten(), dim=0))


def measure_gradient(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every precision against float32 without TF32; halves run as a reconstruction runs them."""
    config = full_size_config(args.family)
    if args.width != FULL_WIDTH:
        config = narrow(config, args.width)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    usual = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    exact, cost = distil(config, args.device, "fp32", args.views)
    results = [{"dtype": "fp32", **cost, "passed": True}]
    for backend, allowed in zip(backends, usual, strict=True):
        backend.allow_tf32 = allowed
    for dtype in args.dtype or ("bf16", "fp16"):
        found, cost = distil(config, args.device, dtype, args.views)
        cosines = [cosine(a, b) for a, b in zip(exact, found, strict=True)]
        results.append(
            {
                "dtype": dtype,
                "noise_levels": SHARES,
                "cosine_on_latents": [round(value, 7) for value in cosines[::2]],
                "cosine_on_images": [round(value, 7) for value in cosines[1::2]],
                **cost,
                "passed": all(math.isfinite(value) and value >= COSINE for value in cosines),
            }
        )
    return [{"width": args.width, "views": args.views, **result} for result in results]


def write_weights(args: argparse.Namespace, folder: Path) -> Path:
    """A released checkpoint of random weights, in float16."""
    tensors = released_tensors(args.family, args.device)
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    path = folder / "random_step_1.ckpt"
    torch.save({"state_dict": tensors, "global_step": 1}, path)
    return path


def command_line(args: argparse.Namespace, weights: Path, run_dir: Path) -> list[str]:
    """The line of launch.py."""
    overrides = {
        "data.image_path": args.image,
        "recipe": "full-gpu",
        "system.guidance.pretrained": weights,
        "system.guidance.memory": args.memory,
        "system.guidance.precision": args.precision,
        "trainer.max_steps": args.steps,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trial_dir": run_dir,
    }
    if args.fine:
        overrides["data.resolution_milestones"] = f"[{args.steps // 4},{args.steps // 2}]"
    gpu = records.gpu(args.device)
    values = [f"{key}={value}" for key, value in overrides.items()]
    return ["launch.py", "--config", args.config, "--train", "--gpu", gpu, *values, *args.overrides]


def logged(run_dir: Path, name: str) -> list[float]:
    """Every value of a column of the run's CSV logs."""
    values = []
    for path in sorted(run_dir.glob("csv_logs/**/*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values += [float(cell) for key, cell in row.items() if key.endswith(f"/{name}") and cell]
    return values


def measure_run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One run in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        weights = args.weights or write_weights(args, Path(scratch))
        run_dir = Path(scratch) / "run"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        start = time.perf_counter()
        subprocess.run([sys.executable, *command_line(args, weights, run_dir)], cwd=REPOSITORY, check=True)
        seconds = time.perf_counter() - start
        metrics = json.loads((run_dir / "metrics.json").read_text())
        losses, norms = logged(run_dir, "sds_sds"), logged(run_dir, "sds_grad_norm")
        has_mesh = any(run_dir.glob("save/**/*.glb"))
    steps = {name: stage["seconds"] for name, stage in metrics["stages"].items() if name in ("coarse", "fine")}
    peak = max(stage["peak_memory_gb"] for stage in metrics["stages"].values())
    finite = all(map(math.isfinite, losses + norms))
    on_gpu = args.device != "cpu"
    return [
        {
            "memory": args.memory,
            "precision": args.precision,
            "fine": args.fine,
            "steps": args.steps,
            "overrides": args.overrides,
            "total_seconds": round(seconds, 1),
            "seconds_per_step": round(sum(steps.values()) / args.steps, 3),
            "peak_memory_gb": peak,
            "limit_gb": LIMITS_GB[args.memory],
            "sds_steps_logged": len(norms),
            "finite": finite,
            "smallest_gradient_norm": min(norms, default=0.0),
            "has_mesh": has_mesh,
            **{key: metrics[key] for key in ("device", "recipe", "stages")},
            "model": metrics["model"].replace(f"{scratch}/", ""),
            "passed": finite
            and has_mesh
            and len(norms) >= args.steps
            and min(norms) > 0.0
            and (not on_gpu or peak <= LIMITS_GB[args.memory]),
        }
    ]


def main() -> int:
    """Measure, print and keep."""
    args = parse()
    about = {
        "date": records.now(),
        "machine": records.machine(args.device),
        "versions": records.versions(("torch", "diffusers")),
        "benchmark": args.command,
        "weights": str(args.weights) if getattr(args, "weights", None) else f"{args.family}, random",
    }
    results = measure_gradient(args) if args.command == "gradient" else measure_run(args)
    lines = [about | result for result in results]
    for line in lines:
        Console().print_json(json.dumps(line))
    if not args.no_save:
        records.append(args.out, "sds.jsonl", lines)
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
