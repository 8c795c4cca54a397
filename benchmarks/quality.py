"""Do the fast paths cost quality? The same reconstructions with and without them, over seeds, scored against the truth.

    python benchmarks/quality.py --objects MESHES                       three objects, five seeds, both paths, on a GPU
    python benchmarks/quality.py --objects MESHES --seconds 500         begin no run that would end later; call it again
    python benchmarks/quality.py --objects MESHES --object vase --seeds 2
    python benchmarks/quality.py --objects MESHES --device cpu --steps tiny      tiny, to try the script

MESHES is a folder of true meshes (glTF axes: y up, front +z). Each is rendered from the front, reconstructed from that
picture, and compared with what comes out: Chamfer distance, volume IoU and F-score at 0.02, both meshes centred and of
longest side 1. "fast" is what runs do by default; "plain" switches everything off that is there for speed: PyTorch in
place of kernels, no CUDA graphs, float32 without TF32.

Every run leaves a file of its row in ``--folder``, and is not done again. When all are there, the table goes to
``<out>/quality.md`` and one JSON line to ``<out>/quality.jsonl``. A difference counts as noise unless Welch's test
finds it with a probability of error below 5% for all rows of the table together. Exits with 1 if one is more than
noise, with 3 if runs are left to do.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import records
import torch
from PIL import Image
from rich.console import Console
from scipy import stats

from nvsadapter_guidance.evaluation.mesh_scores import MeshEvaluation, find_truth, score_files
from nvsadapter_guidance.training.mesh_files import load_parts
from nvsadapter_guidance.training.render_torch import TorchMeshRenderer
from threedrec import registry
from threedrec.config import load_config
from threedrec.errors import InputError
from threedrec.files import write_json, write_text
from threedrec.host import GuidancePool, Host
from threedrec.launch import choose_device, open_run

REPOSITORY = Path(__file__).resolve().parent.parent
PATHS: dict[str, list[str]] = {
    "fast": [],
    "plain": [
        "system.geometry.pos_encoding_config.backend=torch",
        "system.geometry.mlp_network_config.backend=torch",
        "system.geometry.mlp_network_config.precision=float32",
        "system.renderer.backend=torch",
        "system.renderer.normal_perturb_stride=1",
        "system.guidance.graph=off",
        "system.guidance.precision=float32",
        "system.guidance.encoder_precision=float32",
    ],
}
METRICS = ("chamfer", "volume_iou", "f_score")
F_DISTANCE = "0.02"
"""Within which a point counts as found, of the longest side."""
LEAST = [
    "trainer.enable_progress_bar=false",
    "system.exporter.fmt=glb",
    "data.random_camera.n_val_views=1",
    "data.random_camera.n_test_views=2",
]
"""Pictures are not what is measured."""
TINY = [
    "trainer.max_steps=6",
    "system.guidance.warm_start.fit_steps=5",
    "system.guidance.warm_start.num_views=4",
    "system.guidance.warm_start.elevations=[0.0]",
    "system.guidance.warm_start.num_inference_steps=1",
    "system.guidance.warm_start.rays_per_step=128",
    "system.renderer.num_samples_per_ray=24",
    "system.renderer.occupancy_resolution=16",
    "data.random_camera.eval_height=24",
    "data.random_camera.eval_width=24",
    "trainer.num_sanity_val_steps=0",
    "system.exporter.isosurface_resolution=24",
    "system.exporter.face_budget=400",
    "system.exporter.texture_size=64",
]
ERROR = 0.05
"""Probability that a table of equals has a difference that is called more than noise."""
SIZE, SUPERSAMPLE = 512, 2
FRONT = (0.0, 0.0, 1.5)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, required=True, help="folder of true meshes")
    parser.add_argument("--object", action="append", help="a mesh by its name; may be repeated (default: the first 3)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each object and path (default 5)")
    parser.add_argument("--steps", choices=("recipe", "tiny"), default="recipe", help="tiny only tries the script")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run that would end after this")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "outputs" / "quality", help="rows, one file a run")
    parser.add_argument("--config", default=str(REPOSITORY / "configs" / "nvsadapter.yaml"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument("overrides", nargs="*", help="key=value for both paths, as for launch.py")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Case:
    """One reconstruction."""

    name: str
    path: str
    seed: int

    def row_file(self, folder: Path) -> Path:
        """Where its row is kept."""
        return folder / "rows" / f"{self.name}-{self.path}-{self.seed}.json"


class Bench:
    """Everything that reconstructions share."""

    def __init__(self, args: argparse.Namespace) -> None:
        found = find_truth(args.objects)
        names = args.object or list(found)[:3]
        if missing := [name for name in names if name not in found]:
            raise InputError(f"{args.objects}: holds no mesh {missing[0]} (known: {', '.join(found)})")
        self.args, self.truth = args, {name: found[name] for name in names}
        self.cases = [Case(*each) for each in product(names, PATHS, range(args.seeds))]
        self.device = choose_device(records.gpu(args.device))
        # Of each path its own, so that neither loads the model again in turn.
        self.pools = {path: GuidancePool() for path in PATHS}
        # Rows of other settings are no rows of this table.
        self.stamp = {"steps": args.steps, "overrides": args.overrides, "device": records.machine(str(self.device))}

    def row(self, case: Case) -> dict[str, Any] | None:
        """The row of a run that is done."""
        file = case.row_file(self.args.folder)
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["row"] if found["stamp"] == self.stamp else None

    def photograph(self, name: str) -> Path:
        """The object from the front, with its silhouette as the alpha channel."""
        path = self.args.folder / "photographs" / f"{name}.png"
        if not path.is_file():
            renderer = TorchMeshRenderer(SIZE, SUPERSAMPLE, self.device)
            renderer.show(load_parts(self.truth[name], "sphere"))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(renderer.render_all([FRONT])[0].cpu().numpy()).save(path)
        return path

    def run(self, case: Case) -> None:
        """Reconstruct, score, and keep the row alone."""
        args, run_dir = self.args, self.args.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        values = [f"data.image_path={self.photograph(case.name)}", f"seed={case.seed}", f"trial_dir={run_dir}", *LEAST]
        values += [*(TINY if args.steps == "tiny" else []), *args.overrides, *PATHS[case.path]]
        config = load_config(args.config, values, device_type=self.device.type)
        start = time.perf_counter()
        system = registry.find("system", config.system_type)
        with tensor_float(case.path == "fast"):
            system(config, open_run(config, "train"), self.device, Host(guidances=self.pools[case.path])).train()
        seconds = time.perf_counter() - start
        (mesh,) = (run_dir / "save").glob("*.glb")
        mesh = mesh.rename(run_dir / f"{case.name}.glb")
        result = MeshEvaluation()
        truth = {case.name: self.truth[case.name]}
        for _ in score_files(run_dir, truth, result, run_dir / "scores", aligned=False):
            pass
        if not result.rows:
            raise InputError(f"{mesh}: {result.skipped[0]['reason']}")
        scores = result.rows[0] | {"f_score": result.rows[0]["f_score"][F_DISTANCE]}
        row = {metric: scores[metric] for metric in METRICS} | {"seconds": round(seconds, 2)}
        write_json(case.row_file(args.folder), {"stamp": self.stamp, "row": row})
        shutil.rmtree(run_dir)


@contextmanager
def tensor_float(usual: bool) -> Iterator[None]:
    """Convolutions as PyTorch does them by default, or in float32 without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and usual
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compared(name: str, metric: str, fast: list[float], plain: list[float], alpha: float) -> dict[str, Any]:
    """One row of the table; ``alpha`` is the probability of error that it may have."""
    difference = fmean(fast) - fmean(plain)
    spread = [stdev(values) if len(values) > 1 else 0.0 for values in (fast, plain)]
    if max(spread) > 0:
        p = float(stats.ttest_ind(fast, plain, equal_var=False).pvalue)
    else:
        p = 1.0 if difference == 0 else 0.0
    return {
        "object": name,
        "metric": metric,
        "fast": fmean(fast),
        "fast_std": spread[0],
        "plain": fmean(plain),
        "plain_std": spread[1],
        "difference": difference,
        "p": p,
        "within_noise": p >= alpha,
    }


def summary(rows: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: every object and metric, and all objects together."""
    names = list(dict.fromkeys(case.name for case in rows))
    alpha = ERROR / (len(METRICS) * (len(names) + 1))

    def values(name: str, path: str, metric: str) -> list[float]:
        return [row[metric] for case, row in rows.items() if (case.name, case.path) == (name, path)]

    table = []
    for metric in METRICS:
        # Objects differ far more than seeds do, so together they are compared as differences from their own mean.
        centred: dict[str, list[float]] = {path: [] for path in PATHS}
        level = 0.0
        for name in names:
            both = [values(name, path, metric) for path in PATHS]
            table.append(compared(name, metric, both[0], both[1], alpha))
            middle = fmean(both[0] + both[1])
            level += middle / len(names)
            for path, found in zip(PATHS, both, strict=True):
                centred[path] += [value - middle for value in found]
        fast, plain = ([level + value for value in found] for found in centred.values())
        table.append(compared("all", metric, fast, plain, alpha))
    return table


def markdown(table: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"Fast against plain path, {about['seeds']} seeds each, mean ± standard deviation; {about['machine']}, "
        f"{about['date'][:10]}, torch {about['versions']['torch']}.",
        "",
        "| object | metric | fast | plain | difference | p | within noise |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        means = [f"{row[path]:.4f} ± {row[f'{path}_std']:.4f}" for path in PATHS]
        verdict = "yes" if row["within_noise"] else "**no**"
        cells = [row["object"], row["metric"], *means, f"{row['difference']:+.4f}", f"{row['p']:.2f}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def work(bench: Bench, console: Console) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yield all rows, doing what is left of them while there is time."""
    start, longest = time.monotonic(), 0.0
    for at, case in enumerate(bench.cases, 1):
        row = bench.row(case)
        if row is None:
            before = time.monotonic()
            if before - start + longest > bench.args.seconds:
                return
            bench.run(case)
            row = bench.row(case)
            longest = max(longest, time.monotonic() - before)
            console.log(f"{at}/{len(bench.cases)} {case.name}, {case.path}, seed {case.seed}: {row}")
        if row is not None:
            yield case, row


def main(arguments: Sequence[str] | None = None) -> int:
    """Reconstruct what is left, and compare when nothing is."""
    args, console = parse(arguments), Console()
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.stderr.write("quality: needs a CUDA device (or --device cpu --steps tiny)\n")
        return 2
    try:
        bench = Bench(args)
        rows = dict(work(bench, console))
    except InputError as error:
        sys.stderr.write(f"quality: {error}\n")
        return 2
    if left := len(bench.cases) - len(rows):
        console.print(f"{left} of {len(bench.cases)} runs are left; the same command goes on")
        return 3
    about = {
        "date": records.now(),
        "machine": bench.stamp["device"],
        "versions": records.versions(("torch", "diffusers")),
        "steps": args.steps,
        "seeds": args.seeds,
        "overrides": args.overrides,
        "plain": PATHS["plain"],
    }
    table = summary(rows)
    text = markdown(table, about)
    console.print(text, markup=False, soft_wrap=True)
    if not args.no_save:
        write_text(args.out / "quality.md", text)
        seconds = {path: fmean(row["seconds"] for case, row in rows.items() if case.path == path) for path in PATHS}
        records.append(args.out, "quality.jsonl", [about | {"seconds_a_run": seconds, "rows": table}])
    return 0 if all(row["within_noise"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
