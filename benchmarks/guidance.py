"""Times guidance at full size with random weights against the hardware's floor. Run it on an idle GPU.

    python benchmarks/guidance.py                       SD2.1 with the adapter, 16 views of 256 pixels, bf16
    python benchmarks/guidance.py --family sd15 --dtype fp16 --no-save
    python benchmarks/guidance.py --profile             also the kernels that take longest

Medians of CUDA events over ``--repeats`` calls: plain; with CUDA graphs; and with graphs and noise of the unconditional
samples that is drawn once (``frozen``). They are of the network call of 16 views with classifier-free guidance, the
encoder forward and backward, the whole step of score distillation, and four views by 50 Euler steps. ``rows`` says how
many rows the network takes: the reference takes 40, of which 8 are support views. The floor of each is its FLOPs,
counted by torch, over the rate measured on a product of bf16 matrices of side 8192. Results are added to
``<out>/guidance.jsonl``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import records
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nvsadapter_guidance.cuda_graphs import convolution_search
from nvsadapter_guidance.full_size import full_size_config, random_model
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.memory import PLANS
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses, guided_prediction, query_rays
from nvsadapter_guidance.ray_patches import positional_features
from nvsadapter_guidance.sampling import SamplingOptions, sample_latents

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SHARES = (0.02, 0.98)
SCALE = 3.0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd21", "sd15"), default="sd21")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--views", type=int, default=16, help="a multiple of 4 (default 16, the released batch)")
    parser.add_argument("--steps", type=int, default=50, help="of sampling")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-search", action="store_true", help="take the convolutions that cuDNN guesses, untimed")
    parser.add_argument("--no-plain", action="store_true", help="leave out the mode without CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take longest")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-save", action="store_true", help="only print")
    return parser.parse_args()


def milliseconds(call: Callable[[], Any], repeats: int, warm_up: int = 3) -> float:
    """Median time of a call on the device."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 3)


def rates(repeats: int) -> dict[str, float]:
    """What the device does at best: bf16 products, and copies."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = milliseconds(lambda: matrix @ matrix, repeats)
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats)
    return {"matmul_tflops": round(2 * 8192**3 / product / 1e9, 1), "copy_tb_s": round(2 * 2**30 / copy / 1e9, 3)}


def flops(call: Callable[[], Any]) -> int:
    """Of products, convolutions and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def cameras(count: int, distance: float) -> Poses:
    """A ring around the object."""
    azimuth = torch.linspace(-180, 180, count + 1, device="cuda")[1:]
    return Poses(azimuth, 20.0 * torch.sin(azimuth.deg2rad()), torch.full_like(azimuth, distance))


class Guidance:
    """One model with everything that is measured on it."""

    def __init__(self, model: NVSModel, args: argparse.Namespace, graphs: bool, frozen: bool = False) -> None:
        size, distance = model.config.image_size, model.config.distance
        self.model, self.steps, views = model, args.steps, args.views
        model.graphs.clear()
        self.distillation = ScoreDistillation(
            model, SCALE, memory=PLANS["normal"], graphs=graphs, encoder_dtype=torch.bfloat16,
            frozen_unconditional=frozen,
        )  # fmt: skip
        model.graphs.search = not args.no_search
        if self.distillation.encoder is not None:
            self.distillation.encoder.search = not args.no_search
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.images = torch.rand(views, 3, size, size, device="cuda", generator=self.generator) * 2 - 1
        # No leaf, which torch's counter of FLOPs cannot follow.
        self.images = self.images.requires_grad_() * 1.0
        self.poses, self.ring = cameras(views, distance), cameras(4, distance)
        self.front = Poses(*(torch.full((1,), value, device="cuda") for value in (0.0, 0.0, distance)))
        self.distillation.prepare(self.images[:1].detach(), self.front, self.generator)
        self.grouped = self.poses.groups(model.num_query)
        latent = size // model.latent_stride
        shape = (len(self.grouped), model.num_query, model.config.unet["in_channels"], latent, latent)
        self.noisy = torch.randn(shape, device="cuda", generator=self.generator)
        self.timesteps = torch.randint(20, 980, (len(self.grouped),), device="cuda", generator=self.generator)

    def conditioning(self) -> None:
        """What a step pays for conditions: rays and their features, in a graph of their own where there are graphs."""

        def features(inputs: Mapping[str, Tensor]) -> Tensor:
            query = Poses(inputs["azimuth"], inputs["elevation"], inputs["distance"])
            rays = query_rays(self.model, self.front, query)
            found = positional_features(adapter, rays.flatten(0, 1), self.model.network.unet.conv_in.weight.dtype)
            return torch.cat([f.flatten() for f in found.values()])

        adapter = self.model.network.adapter
        self.model.graphs("conditioning", features, vars(self.grouped), {}, (adapter,))

    def network(self) -> Tensor:
        """One guided prediction of all views."""
        with torch.no_grad():
            conditions = self.distillation._prepared()
            args = (self.noisy, self.timesteps, self.grouped, SCALE, self.generator)
            return guided_prediction(self.model, conditions, *args)

    def encoder(self) -> None:
        """Latents of all views, and the gradient of their sum on the views."""
        encoder = self.distillation.encoder
        if encoder is not None:
            moments = encoder(self.images)
            torch.autograd.grad(moments, self.images, moments.detach())

    def step(self) -> None:
        """Score distillation, to the gradient on the views."""
        result = self.distillation(self.images, self.poses, SHARES, self.generator)
        torch.autograd.grad(result.loss, self.images)

    def sample(self) -> None:
        """Latents of four views."""
        options = SamplingOptions(self.steps, SCALE, rotating_groups=False)
        sample_latents(self.model, self.distillation._prepared(), self.ring, self.generator, options)

    def rows(self) -> int:
        """Of the network's batch."""
        found: list[int] = []
        handle = self.model.network.unet.time_embedding.register_forward_pre_hook(
            lambda _, inputs: found.append(len(inputs[0]))
        )
        enabled, self.model.graphs.enabled = self.model.graphs.enabled, False  # modules are not called in a replay
        self.network()
        self.model.graphs.enabled = enabled
        handle.remove()
        return found[0]


def profile(model: NVSModel, args: argparse.Namespace) -> None:
    """Print the kernels of the network call and of the encoder."""
    guidance = Guidance(model, args, graphs=False)
    for name, call in (("network call", guidance.network), ("encoder forward and backward", guidance.encoder)):
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
        kernels = recorded.key_averages().table(
            sort_by="self_device_time_total", row_limit=25, max_name_column_width=90
        )
        Console().print(f"{name}\n{kernels}", markup=False, soft_wrap=True)


def first_steps(model: NVSModel, args: argparse.Namespace) -> list[float]:
    """Seconds of three steps: as it is, with libraries still to be loaded and tuned; with capture; a usual one."""
    guidance, seconds = Guidance(model, args, graphs=True), []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        guidance.step()
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 3))
    return seconds


def measure(model: NVSModel, args: argparse.Namespace, graphs: bool, frozen: bool) -> dict[str, Any]:
    """All medians in one mode."""
    guidance = Guidance(model, args, graphs, frozen)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return {
        "graphs": graphs,
        "unconditional": "frozen" if frozen else "fresh",
        "rows": guidance.rows(),
        "conditioning_ms": milliseconds(guidance.conditioning, args.repeats),
        "unet_ms": milliseconds(guidance.network, args.repeats),
        "vae_ms": milliseconds(guidance.encoder, args.repeats),
        "guidance_step_ms": milliseconds(guidance.step, args.repeats),
        "sampling_ms": milliseconds(guidance.sample, 2, warm_up=1),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "graphs_captured": len(model.graphs),
    }


def floors(model: NVSModel, args: argparse.Namespace, tflops: float) -> dict[str, Any]:
    """FLOPs over the measured rate, in milliseconds."""
    guidance = Guidance(model, args, graphs=False)
    counted = {"unet": flops(guidance.network), "vae": flops(guidance.encoder), "guidance_step": flops(guidance.step)}
    return {f"{name}_floor_ms": round(n / tflops / 1e9, 2) for name, n in counted.items()}


def main() -> int:
    """Measure, print and keep."""
    args = parse()
    if not torch.cuda.is_available():
        sys.stderr.write("guidance: needs a CUDA device\n")
        return 2
    about = {
        "date": records.now(),
        "machine": records.machine("cuda"),
        "versions": records.versions(("torch", "diffusers")),
        "benchmark": "guidance",
        "weights": f"{args.family}, random",
        "dtype": args.dtype,
        "views": args.views,
        "steps": args.steps,
        **(rate := rates(args.repeats)),
    }
    model = random_model(full_size_config(args.family), "cuda").to(DTYPES[args.dtype])
    lines = []
    with convolution_search(not args.no_search):
        about |= {"convolution_search": not args.no_search, "seconds_of_first_steps": first_steps(model, args)}
        about |= floors(model, args, rate["matmul_tflops"])
        for graphs, frozen in ((False, False), (True, False), (True, True))[int(args.no_plain) :]:
            lines.append(about | measure(model, args, graphs, frozen))
            Console().print_json(json.dumps(lines[-1]))
        if args.profile:
            profile(model, args)
    if not args.no_save:
        records.append(args.out, "guidance.jsonl", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
