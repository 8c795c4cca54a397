"""Times what a step of score distillation costs beside the guidance: rendering, losses, gradients, optimiser, grid.

    python benchmarks/nerf_step.py                 all rows, added to benchmarks/results/nerf_step.jsonl
    python benchmarks/nerf_step.py --no-save       only print
    python benchmarks/nerf_step.py system.geometry.mlp_network_config.precision=tf32
    python benchmarks/nerf_step.py --no-save --profile      and the kernels of a step, longest first
    python benchmarks/nerf_step.py --device cpu --rays 64 --samples 32 --repeats 1        tiny, to try the script

The recipe full-gpu at its first and its last resolution, with normals and all of its losses, on the field as it is
initialised (fog) and on a solid ball, which has as many visible samples as a settled object; and a step of the warm
start's fit in the recipe mini-gpu. Milliseconds are medians of CUDA events around one step each, so they include
waiting for the host. Peak memory is of tensors, in GB (1e9 bytes).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import records
import torch
from rich.console import Console
from rich.table import Table

from threedrec.beside import Beside
from threedrec.cameras import Cameras, RandomCameraSampler
from threedrec.checkpoint import step_generator
from threedrec.confidence import Confidence
from threedrec.config import load_config
from threedrec.config_schema import ExperimentConfig
from threedrec.image import SupportView, load_support_view
from threedrec.optimizer import build_optimizer
from threedrec.scene import Scene
from threedrec.steps import Supervision, ViewFit
from threedrec.warm_start import build_view_set, view_ring

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = {
    ("16 x 64^2, solid", "render, losses, backward"): 15.0,
    ("8 x 256^2, solid", "render, losses, backward"): 120.0,
}
REFERENCE_TARGET = 5.0
"""Milliseconds on one H200."""
SLEEP = 60_000_000
"""Cycles of the device, about 30 ms."""
SOLID = 200.0
"""Density of the ball's centre before the activation, instead of the recipe's 10."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rays", type=int, default=0, help="rays of a view; 0 for the recipe's")
    parser.add_argument("--samples", type=int, default=0, help="samples along the box's diagonal; 0 for the recipe's")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels of a step")
    parser.add_argument("overrides", nargs="*", help="key=value for all recipes, as for launch.py")
    return parser.parse_args()


def load(recipe: str, args: argparse.Namespace) -> ExperimentConfig:
    """Return the configuration of a recipe."""
    changes = [f"data.image_path={ROOT / 'load/images/robot.png'}", f"recipe={recipe}"]
    if args.samples:
        changes += [f"system.renderer.num_samples_per_ray={args.samples}", "system.renderer.occupancy_resolution=32"]
        changes += ["system.geometry.pos_encoding_config.log2_hashmap_size=14"]
    changes += args.overrides
    return load_config(str(ROOT / "configs" / "nvsadapter.yaml"), changes, device_type=torch.device(args.device).type)


def milliseconds(function: Callable[[], object], args: argparse.Namespace, warm: int = 2) -> float:
    """Return the median time of a call."""
    return records.milliseconds(function, args.device, args.repeats, warm)


def peak(function: Callable[[], object], device: str) -> float | None:
    """Return the peak memory of a call in GB, None on the CPU."""
    if torch.device(device).type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def judge(rgb: torch.Tensor, cameras: Cameras, step: int, generator: torch.Generator) -> Any:
    """Stand in for the guidance: a gradient on every pixel, and nothing else."""
    return SimpleNamespace(loss=rgb.square().mean(), diagnostics={})


def profile(function: Callable[[], object], device: str) -> None:
    """Print where the time of a call goes: on a GPU its kernels, on the CPU the operations; 25 of them."""
    on_gpu = torch.device(device).type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as record:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda event: -getattr(event, spent))
    for event in events[:25]:
        print(f"{1e-3 * getattr(event, spent):9.3f} ms {event.count:5d} x  {event.key[:90]}")
    print(f"{sum(1e-3 * getattr(event, spent) for event in events):9.3f} ms in all")


def behind_the_guidance(
    supervision: Supervision, seen: SupportView, step: int, generator: torch.Generator, repeats: int
) -> float:
    """Return what the reference adds to a step, in milliseconds.

    Its samples are counted and the host prepares the rest while the guidance is at work, for which the device sleeps
    here: what the count takes from the guidance's own time is not seen.
    """
    beside, times = Beside(seen.rgb.device), []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        beside.mark()
        torch.cuda._sleep(SLEEP)
        start.record()
        with beside():
            sight = supervision.sight(seen, generator)
        supervision.reference(seen, step, generator, sight).loss.backward()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[2:])


def distillation(args: argparse.Namespace, solid: bool) -> list[dict[str, Any]]:
    """Return the rows of the recipe full-gpu, on fog or on a solid ball."""
    config = load("full-gpu", args)
    if solid:
        config.system.geometry.density_blob_scale = SOLID
    scene = Scene(config.system, config.seed).to(args.device)
    supervision = Supervision(scene, config.system.loss, ref_rays=config.system.ref_rays)
    support = load_support_view(config.data, 512).to(args.device)
    optimizer = build_optimizer(scene.renderer, config.system.optimizer)
    generator = step_generator(0, "benchmark", 0, args.device)
    scene.renderer.update(0, generator)
    rows: list[dict[str, Any]] = []
    last = config.data.random_camera.resolution_milestones[-1]
    for step in (0, last):
        cameras = RandomCameraSampler(config.data.random_camera)(step, generator)
        if args.rays:
            cameras = cameras.resized(*[round(args.rays**0.5)] * 2)
        name = f"{len(cameras)} x {cameras.height}^2, {'solid' if solid else 'fog'}"

        def guided(cameras: Cameras = cameras, step: int = step) -> None:
            optimizer.zero_grad(set_to_none=True)
            supervision.guidance(judge, cameras, step, generator)[0].loss.backward()  # type: ignore[arg-type]

        rays_o, rays_d = (rays.reshape(-1, 3) for rays in cameras.rays())
        samples = len(scene.renderer.sample(rays_o, rays_d, generator).starts)
        row = {"setting": name, "samples": samples}
        rows.append(row | {"work": "render, losses, backward", "milliseconds": milliseconds(guided, args)})
        rows[-1]["peak_gb"] = peak(guided, args.device)
        if args.profile:
            profile(guided, args.device)

        def sampled(rays: tuple[torch.Tensor, ...] = (rays_o, rays_d)) -> None:
            scene.renderer.sample(rays[0], rays[1], generator)

        rows.append(row | {"work": "samples alone", "milliseconds": milliseconds(sampled, args)})
        seen = support.resized(*config.data.size_at(step))
        if args.rays:
            seen = support.resized(*[round(args.rays**0.5)] * 2)

        def reference(seen: SupportView = seen, step: int = step) -> None:
            optimizer.zero_grad(set_to_none=True)
            supervision.reference(seen, step, generator).loss.backward()

        work = f"reference {seen.camera.height}^2, {config.system.ref_rays or 'all'} rays"
        rows.append({"setting": name, "work": f"{work}, alone", "milliseconds": milliseconds(reference, args)})
        if torch.device(args.device).type == "cuda":
            spent = behind_the_guidance(supervision, seen, step, generator, args.repeats)
            rows.append({"setting": name, "work": f"{work}, in its place", "milliseconds": spent})
    renderer = scene.renderer
    for work, step in (("occupancy update, all cells", 0), ("occupancy update, later", 4096)):
        rows.append({"work": work, "milliseconds": milliseconds(lambda at=step: renderer.update(at, generator), args)})
    # Last, since it changes the field.
    rows.append({"work": "optimiser", "milliseconds": milliseconds(optimizer.step, args)})
    return [{"recipe": "full-gpu"} | row for row in rows]


def fit(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the row of a step of the warm start's fit, on views that all show the same square."""
    config = load("mini-gpu", args)
    warm_start = config.system.guidance.warm_start
    scene = Scene(config.system, config.seed).to(args.device)
    support = load_support_view(config.data, 512)
    if args.rays:
        warm_start.rays_per_step = args.rays
    cameras = view_ring(warm_start, support.camera, 128)
    rgb = torch.ones(len(cameras), 128, 128, 3)
    rgb[:, 32:96, 32:96] = torch.tensor([0.8, 0.3, 0.2])
    views = build_view_set(rgb, cameras, support.camera, warm_start.back_weight).to(args.device)
    losses = ViewFit(
        scene, support.resized(256, 256).to(args.device), views, Confidence(views, warm_start.tolerance), warm_start
    )
    optimizer = torch.optim.Adam(scene.parameters(), lr=warm_start.lr, eps=1e-15, fused=args.device != "cpu" or None)
    count = iter(range(10**6))

    def step() -> None:
        index = next(count)
        generator = step_generator(0, "fit", index, args.device)
        scene.renderer.update(index, generator)
        # As in the second half of the fit, when all of its losses are in force.
        loss = losses(0.6, generator).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    spent = {"milliseconds": milliseconds(step, args, warm=4), "peak_gb": peak(step, args.device)}
    return [{"recipe": "mini-gpu", "setting": f"{warm_start.rays_per_step} rays", "work": "step of the fit"} | spent]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows next to the targets."""
    table = Table("recipe", "setting", "work", "ms", "target ms", "samples", "peak GB")
    for row in rows:
        target = TARGETS.get((row.get("setting", ""), row["work"]))
        if row["work"].endswith("in its place"):
            target = REFERENCE_TARGET
        cells = (row["recipe"], row.get("setting"), row["work"], round(row["milliseconds"], 2), target)
        table.add_row(*("" if cell is None else str(cell) for cell in (*cells, row.get("samples"), row.get("peak_gb"))))
    Console(width=140).print(table)


def main() -> None:
    """Print all timings and keep them."""
    args = parse()
    # As every reconstruction asks for.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with Console(stderr=True).status("measuring"):
        rows = [*distillation(args, solid=True), *distillation(args, solid=False), *fit(args)]
    show(rows)
    if not args.no_save:
        origin = {"date": records.now(), "machine": records.machine(args.device)}
        origin |= {"versions": records.versions(("torch",)), "rays": args.rays, "samples_per_ray": args.samples}
        origin |= {"overrides": args.overrides}
        records.append(args.out, "nerf_step.jsonl", (origin | row for row in rows))


if __name__ == "__main__":
    main()
