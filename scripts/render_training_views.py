"""Render folders of meshes into training views: python scripts/render_training_views.py MESHES OUT.tar [options]."""

import argparse
import sys
from pathlib import Path

from rich.progress import Progress

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.mesh_dataset import read_index, render_split


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Render a folder of .glb meshes into one .tar of training views.")
    parser.add_argument("meshes", type=Path, help="folder of .glb files with an index.json")
    parser.add_argument("output", type=Path, help="the .tar to write, e.g. data/views/train.tar")
    parser.add_argument("--validation", action="store_true", help="16 fixed cameras in place of random ones")
    parser.add_argument("--views", type=int, default=40, help="random views per object, a multiple of 5")
    parser.add_argument("--size", type=int, default=128, help="side of a view in pixels")
    parser.add_argument("--quality", type=int, default=92, help="WebP quality of the colours, 0..100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, default=0, help="show so many bent shapes of each mesh")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=int, help="render the first few objects only")
    return parser.parse_args()


def main() -> int:
    """Render, showing progress; 2 where the input cannot be used."""
    options = vars(parse_arguments())
    try:
        total = len(read_index(options["meshes"])[: options["limit"]]) * max(options["variants"], 1)
        with Progress() as progress:
            task = progress.add_task("rendering", total=total)
            for _ in render_split(options.pop("meshes"), options.pop("output"), **options):
                progress.advance(task)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
