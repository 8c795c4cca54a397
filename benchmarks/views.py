"""Times novel views at full size with random weights: seconds and peak memory. Run it on an idle machine.

    python benchmarks/views.py                                  SD2.1 with the adapter: fp32, fp16 and bf16
    python benchmarks/views.py --family sd15 --dtype fp16 --scheduler unipc --steps 20
    python benchmarks/views.py --dtype fp16 --offload model     the low-memory mode

By default four views of 256 pixels by 50 Euler steps with classifier-free guidance, from the image to the pictures;
weights are made on the device and no file is read. Times are the best of several runs after a short one; memory is what
torch allocated on the GPU, and what the process held on the CPU. Every measurement is added to ``<out>/views.jsonl``.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import records
import torch
from rich.console import Console
from rich.table import Table

from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
from nvsadapter_guidance.full_size import full_size_config, random_model
from nvsadapter_guidance.model import NVSModelConfig
from nvsadapter_guidance.schedulers import SCHEDULERS

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GB = 1e9


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd21", "sd15"), default="sd21")
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="may be repeated (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--scheduler", choices=tuple(SCHEDULERS), default="euler")
    parser.add_argument("--offload", choices=("none", "model", "sequential"), default="none")
    parser.add_argument("--graph", choices=("auto", "off"), default="auto", help="CUDA graphs of the network call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-save", action="store_true", help="only print")
    return parser.parse_args()


def build(config: NVSModelConfig, device: str, dtype: str, scheduler: str, offload: str) -> NVSAdapterPipeline:
    """A pipeline of random weights on the device."""
    model = random_model(config, device).to(DTYPES[dtype])
    pipeline = NVSAdapterPipeline.from_model(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    return pipeline


def measure(pipeline: NVSAdapterPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every run, peak memory, and whether the views are finite."""
    device, views = args.device, args.views
    on_gpu = torch.device(device).type == "cuda"
    image = np.random.default_rng(0).random((256, 256, 3), dtype=np.float32)
    azimuths = [30.0 * (i + 1) for i in range(views)]

    def call(count: int) -> np.ndarray:
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"num_inference_steps": count, "guidance_scale": args.guidance_scale}
        options |= {"generator": generator, "graph": args.graph}
        result = pipeline(image, [0.0] * views, azimuths, output_type="np", **options).images
        if on_gpu:
            torch.cuda.synchronize()
        return result

    call(2)
    weights = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        pictures = call(args.steps)
        seconds.append(time.perf_counter() - start)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": round(min(seconds), 3),
        "seconds_of_runs": [round(value, 3) for value in seconds],
        "gpu_memory_between_calls_gb": round(weights / GB, 3),
        "gpu_memory_peak_gb": round(torch.cuda.max_memory_allocated() / GB, 3) if on_gpu else 0.0,
        "host_memory_peak_gb": round(host / GB, 3),
        "finite": bool(np.isfinite(pictures).all()),
        "spread": round(float(pictures.std()), 4),
    }


def describe(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What a measurement was made of."""
    return {
        "date": records.now(),
        "device": records.machine(args.device),
        "versions": records.versions(("torch", "diffusers")),
        "model": f"{args.family}, random weights",
        "dtype": dtype,
        "views": args.views,
        "image_size": full_size_config(args.family).image_size,
        "scheduler": args.scheduler,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "offload": args.offload,
        "graph": args.graph,
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Seconds and memory, one row a measurement."""
    first = results[0]
    title = f"{first['views']} views, {first['steps']} {first['scheduler']} steps, {first['model']}, {first['device']}"
    shown = Table("dtype", "offload", "seconds", "peak GPU memory, GB", "between calls, GB", "finite", title=title)
    for result in results:
        numbers = (result[key] for key in ("seconds", "gpu_memory_peak_gb", "gpu_memory_between_calls_gb", "finite"))
        shown.add_row(result["dtype"], result["offload"], *map(str, numbers))
    return shown


def main() -> None:
    """Measure every precision that was asked for."""
    args = parse()
    config, results = full_size_config(args.family), []
    for dtype in args.dtype or tuple(DTYPES):
        pipeline = build(config, args.device, dtype, args.scheduler, args.offload)
        numbers = measure(pipeline, args)
        results.append(describe(args, dtype) | numbers)
        del pipeline
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    Console().print(table(results))
    if not args.no_save:
        records.append(args.out, "views.jsonl", results)


if __name__ == "__main__":
    main()
