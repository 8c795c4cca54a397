"""Times the hash encoding and the field on a GPU: Triton kernels, their PyTorch twin, and the targets beside them.

    python benchmarks/hashgrid.py                 all rows, added to benchmarks/results/hashgrid.jsonl
    python benchmarks/hashgrid.py --no-save       only print
    python benchmarks/hashgrid.py --sweep         launch settings of each kernel, best first; nothing is kept
    python benchmarks/hashgrid.py --device cpu --points 4096 --repeats 2         the twin alone, to try the script

2^20 points, 16 levels of 2 features, up to 2^19 rows a level, 4096 cells a side at the finest. Milliseconds are medians
of CUDA events over calls that follow each other without a pause. "random": points anywhere in the box; "ray": 256
points along each of neighbouring parallel rays. "fixed": sums that do not depend on the order of addition, as every
reconstruction uses them.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import records
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig, VanillaMLP
from threedrec.field.encoding import Encoding, build_encoding

RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES = 256
"""Points of a ray."""
TARGETS = {
    ("forward", "random"): 0.5,
    ("forward", "ray"): 0.4,
    ("forward, backward", "random"): 2.2,
    ("forward, backward", "ray"): 2.5,
    ("with MLP 32-64-64-1, forward, backward", "random"): 2.5,
    ("with MLP 32-64-64-1, forward, backward", "ray"): 2.5,
}
"""Milliseconds on one H200 for 2^20 points."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=2**20)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sweep", action="store_true", help="try launch settings instead")
    parser.add_argument("--only", default="", help="with --sweep: this kernel alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-save", action="store_true", help="only print")
    return parser.parse_args()


def milliseconds(function: Callable[[], object], args: argparse.Namespace, few: bool = False) -> float:
    """Return the median time of a call; of a few calls where one takes long."""
    repeats = min(args.repeats, 3) if few else args.repeats
    return records.milliseconds(function, args.device, repeats, warm_up=1 if few else 3)


def both_orders(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return points in [0, 1] in random order and along rays, (N, 3) each."""
    torch.manual_seed(0)
    rays = -(-args.points // SAMPLES)
    side = max(1, int(rays**0.5))
    pixel = torch.arange(rays)
    plane = torch.stack([pixel % side, pixel // side], dim=1) / side
    along = torch.linspace(0.0, 1.0, SAMPLES).expand(rays, -1)
    local = torch.cat([plane[:, None].expand(-1, SAMPLES, -1), along[..., None]], dim=2).reshape(-1, 3)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    on_rays = 0.5 + (local - 0.5) @ turn / 3**0.5
    return {"random": torch.rand(args.points, 3).to(args.device), "ray": on_rays[: args.points].to(args.device)}


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Ask PyTorch for the same result in every run, as reconstructions do."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def encoding(backend: str, half: bool = False) -> Encoding:
    """Return the grid with features of size 1, as after a training."""
    grid = build_encoding(EncodingConfig(backend=backend, half_precision=half))
    torch.nn.init.normal_(grid.table)
    return grid


def cases(backend: str, args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[Tensor], object], bool]]:
    """Yield (work, precision of the lookup, function of points, whether gradients flow)."""
    precisions = ("fp32", "fp16") if backend == "triton" else ("fp32",)
    for precision in precisions:
        grid = encoding(backend, precision == "fp16").to(args.device)
        network = VanillaMLP(32, 1, MLPConfig(n_hidden_layers=2, backend=backend)).to(args.device)
        pull = torch.randn(args.points, 32, device=args.device)

        def backward(x: Tensor, grid: Encoding = grid, pull: Tensor = pull) -> None:
            grid.zero_grad(set_to_none=True)
            grid(x).backward(pull[: len(x)])

        def with_network(x: Tensor, grid: Encoding = grid, network: VanillaMLP = network) -> None:
            grid.zero_grad(set_to_none=True)
            network.zero_grad(set_to_none=True)
            network(grid(x)).sum().backward()

        volume = _volume(backend, precision == "fp16").to(args.device)

        def with_normals(x: Tensor, volume: ImplicitVolume = volume) -> None:
            volume.zero_grad(set_to_none=True)
            density, features, normal = volume(2.0 * x - 1.0, normals=True)
            (density.sum() + features.sum() + normal[:, 0].sum()).backward()

        yield "forward", precision, grid, False
        yield "forward, backward", precision, backward, True
        yield "with MLP 32-64-64-1, forward, backward", precision, with_network, True
        yield "with MLP 32-64-1, density alone", precision, lambda x, v=volume: v.density(2.0 * x - 1.0), False
        yield "field with analytic normals, forward, backward", precision, with_normals, True


def _volume(backend: str, half: bool) -> ImplicitVolume:
    config = EncodingConfig(backend=backend, half_precision=half)
    network = MLPConfig(backend=backend)
    volume = ImplicitVolume(
        ImplicitVolume.Config(normal_type="analytic", pos_encoding_config=config, mlp_network_config=network)
    )
    torch.nn.init.normal_(volume.encoding.table)
    return volume


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per backend, work, precision, kind of sums and order of points."""
    orders, rows = both_orders(args), []
    backends = ("torch",) if args.device == "cpu" else ("triton", "torch")
    console = Console(stderr=True)
    with console.status("measuring"):
        for backend in backends:
            for work, precision, function, trains in cases(backend, args):
                # The twin knows only fixed sums.
                for fixed in (False, True) if trains and backend == "triton" else (backend == "torch",):
                    for order, points in orders.items():
                        with repeatable(fixed), torch.set_grad_enabled(trains):
                            taken = milliseconds(lambda f=function, x=points: f(x), args, few=backend == "torch")
                        row = {"backend": backend, "work": work, "precision": precision, "order": order}
                        rows.append(row | {"fixed_sums": fixed, "milliseconds": round(taken, 3)})
                        console.log(f"{backend} {work} {precision} {order} fixed={fixed}: {taken:.3f} ms")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, both orders side by side, next to the targets."""
    table = Table("backend", "work", "lookup", "sums", "random ms", "ray ms", "target random / ray")
    key = ("backend", "work", "precision", "fixed_sums")
    for (backend, work, precision, fixed), group in itertools.groupby(rows, lambda row: tuple(row[k] for k in key)):
        taken = {row["order"]: f"{row['milliseconds']:.3f}" for row in group}
        target = TARGETS.get((work, "random"))
        goal = "" if target is None else f"{target} / {TARGETS[work, 'ray']}"
        sums = ("fixed" if fixed else "float") if "backward" in work else ""
        table.add_row(backend, work, precision, sums, taken["random"], taken["ray"], goal)
    Console(width=140).print(table)


def sweep(args: argparse.Namespace) -> None:
    """Print the times of each kernel over its launch settings, best first."""
    from triton.runtime.errors import OutOfResources

    orders = both_orders(args)
    works = kernels(orders["random"], args)
    for name, (settings, per_processor, function) in works.items():
        if args.only not in ("", name):
            continue
        before, programs_before, lines = dict(settings), dict(per_processor), []
        for chosen, programs in choices(name, settings):
            settings.update(chosen)
            if programs is not None:
                per_processor[name] = programs
            try:
                # Outside of any graph: the kernel alone.
                with torch.no_grad():
                    taken = [milliseconds(lambda f=function, x=x: f(x), args) for x in orders.values()]
            except OutOfResources:
                continue
            extra = {} if programs is None else {"programs": programs}
            lines.append((sum(taken), dict(settings) | extra, taken))
        settings.update(before)
        per_processor.update(programs_before)
        for _, chosen, taken in sorted(lines, key=lambda line: line[0])[:3]:
            print(f"{name:<22} random {taken[0]:7.3f}   ray {taken[1]:7.3f}   {chosen}")


def choices(name: str, settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Yield launch settings to try, and programs per processor where a program takes many blocks."""
    if name.startswith(("value", "slope")):
        for (block, warps), programs in itertools.product(((64, 4), (64, 8), (128, 4), (128, 8)), (1, 2, 4, 8)):
            yield {"BLOCK": block, "num_warps": warps}, programs
        return
    groups: list[dict[str, Any]] = [{}]
    if "GROUP" in settings:
        groups = [{"GROUP": group} for group in (1, 2, 4, 8, 16)]
    if "RUN" in settings:
        groups = [group | {"RUN": run} for group in groups for run in (1, 2, 4)]
    # Two lanes work for a point: each thread has one, two or four of them.
    shapes = ((64, 2), (64, 4), (128, 4), (128, 8), (256, 8))
    for (block, warps), group in itertools.product(shapes, groups):
        yield {"BLOCK": block, "num_warps": warps} | group, None


Launched = tuple[dict[str, Any], dict[str, int], Callable[[Tensor], object]]


def kernels(points: Tensor, args: argparse.Namespace) -> dict[str, Launched]:
    """Return (launch settings, programs per processor, function of points) of every kernel."""
    from threedrec.field import mlp_triton
    from threedrec.field.hashgrid_kernels import pull_kernel, tangent_kernel
    from threedrec.field.hashgrid_triton import LAUNCH, encode_triton, scatter

    grid = encoding("triton").to(args.device)
    lookup = grid._grid(points)
    pull, tangent = torch.randn(args.points, 32, device=args.device), torch.randn(args.points, 3, device=args.device)

    def tangent_of(x: Tensor) -> None:
        lookup.launch("tangent", tangent_kernel, x, lookup.read, tangent, torch.empty_like(pull))

    def pulled(x: Tensor) -> None:
        lookup.launch("pull", pull_kernel, x, lookup.read, pull, torch.empty_like(x))

    def scattered(slopes: bool, fixed: bool) -> Callable[[Tensor], object]:
        others = (pull, tangent) if slopes else (None, None)

        def add(x: Tensor) -> None:
            with repeatable(fixed):
                scatter(x, pull, *others, lookup, grid.table.shape)

        return add

    works: dict[str, Launched] = {
        "features": (LAUNCH["features"], {}, lambda x: encode_triton(x, grid.table, lookup)),
        "tangent": (LAUNCH["tangent"], {}, tangent_of),
        "pull": (LAUNCH["pull"], {}, pulled),
        "scatter": (LAUNCH["scatter"], {}, scattered(slopes=False, fixed=False)),
        "scatter fixed": (LAUNCH["scatter"], {}, scattered(slopes=False, fixed=True)),
        "scatter fixed, both": (LAUNCH["scatter"], {}, scattered(slopes=True, fixed=True)),
    }
    for name, function in network_passes(pull, args).items():
        works[name] = (mlp_triton.LAUNCH[name], mlp_triton.PROGRAMS_PER_PROCESSOR, lambda _, f=function: f())
    return works


def network_passes(x: Tensor, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return both ways through a network 32-64-64-3, and through one with one output and its slope."""
    density, colour = (
        VanillaMLP(32, outputs, MLPConfig(n_hidden_layers=2, backend="triton")).to(args.device) for outputs in (1, 3)
    )
    leaf = x.clone().requires_grad_(True)
    with torch.enable_grad():
        value, slope = colour(leaf), density.with_gradient(leaf)
    pulls = [torch.randn_like(part) for part in slope]

    def back(outputs: list[Tensor], grads: list[Tensor], network: VanillaMLP) -> None:
        torch.autograd.grad(outputs, [leaf, *network.weights], grads, retain_graph=True)

    return {
        "value": lambda: colour(x),
        "value backward": lambda: back([value], [x[:, :3].contiguous()], colour),
        "slope": lambda: density.with_gradient(x),
        "slope backward": lambda: back(list(slope), pulls, density),
    }


def main() -> None:
    """Print all timings and keep them."""
    args = parse()
    if args.sweep:
        sweep(args)
        return
    rows = measure(args)
    show(rows)
    if not args.no_save:
        origin = {"date": records.now(), "machine": records.machine(args.device), "points": args.points}
        origin["versions"] = records.versions(("torch",))
        records.append(args.out, "hashgrid.jsonl", (origin | row for row in rows))


if __name__ == "__main__":
    main()
