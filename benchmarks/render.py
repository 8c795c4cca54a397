"""Views of meshes per second: VTK in software against plain PyTorch on a device, and how alike their pictures are.

    python benchmarks/render.py MESHES --device cuda --limit 20

A mesh is seen from 20 training cameras at 128 pixels with 4 x 4 samples a pixel; reading files is not counted, putting
a mesh before the renderer (normals, textures) is. The result is added to ``<out>/render.jsonl``.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import records
import torch
from rich.console import Console

from nvsadapter_guidance.training.mesh_dataset import object_generator, training_views
from nvsadapter_guidance.training.mesh_files import find_meshes, load_parts
from nvsadapter_guidance.training.render_folder import Renderer
from nvsadapter_guidance.training.render_meshes import MeshRenderer
from nvsadapter_guidance.training.render_torch import TorchMeshRenderer
from nvsadapter_guidance.training.views import composite

VIEWS = 20


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", type=Path, nargs="+", help="mesh files or folders")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--no-vtk", action="store_true", help="where VTK is not installed")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    return parser.parse_args()


def main() -> None:
    """Measure, print and keep."""
    args = parse()
    renderers: dict[str, Renderer] = {"torch": TorchMeshRenderer(device=args.device)}
    if not args.no_vtk:
        renderers["vtk"] = MeshRenderer()
    seconds, errors = dict.fromkeys(renderers, 0.0), []
    meshes = dict(list(find_meshes(args.meshes).items())[: args.limit])
    for number, (name, path) in enumerate(meshes.items()):
        cameras = training_views(object_generator(name), VIEWS).cameras
        parts, images = load_parts(path, "sphere"), {}
        for kind, renderer in renderers.items():
            if number == 0:
                renderer.show(parts)
                renderer.render_all(cameras)  # libraries and kernels are loaded
            start = time.perf_counter()
            renderer.show(parts)
            images[kind] = renderer.render_all(cameras).cpu()
            seconds[kind] += time.perf_counter() - start
        if "vtk" in images:
            vtk, plain = (composite(images[kind] / 255.0) for kind in ("vtk", "torch"))
            errors.append(float((vtk - plain).square().mean()))
    count = len(meshes) * VIEWS
    record = {
        "date": records.now(),
        "machine": records.machine(args.device),
        "versions": records.versions(("torch", "trimesh")),
        "meshes": len(meshes),
        "views_per_second": {kind: round(count / value, 1) for kind, value in seconds.items()},
        "psnr_between": round(-10 * float(np.log10(np.mean(errors))), 2) if errors else None,
    }
    Console().print_json(json.dumps(record))
    records.append(args.out, "render.jsonl", [record])


if __name__ == "__main__":
    main()
