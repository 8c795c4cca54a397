"""The command ``3drec render``: meshes into folders of views with their cameras, for training."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from threedrec.errors import InputError
from threedrec.terminal import EXIT_BUG, EXIT_OK, add_message_options, command_line, guarded

logger = logging.getLogger(__name__)

EXIT_SKIPPED = EXIT_BUG
"""Some meshes were skipped, as in ``3drec batch``."""
_MOST_SHOWN = 20

EXAMPLES = """\
examples:
  3drec render meshes/ -o views                        twelve views of every mesh below meshes/
  3drec render chair.glb robot.obj -o views --size 256
  3drec render meshes/ -o views --processes 4          four at once; the same command goes on after an interruption
  3drec render meshes/ -o views --renderer torch       on a GPU; needs no VTK

Writes DIR/NAME/000.png (RGBA) and DIR/NAME/000.npy (3x4, world to camera, Blender's axes), … 011, as the renderings of
Zero-1-to-3 have them; DIR/valid_paths.json lists the objects for scripts/objaverse_renderings_to_webdataset.py.
No GPU and no display are needed: VTK draws in software (pip install -e '.[render]'). Meshes are y up, front +z.

Meshes that cannot be rendered are skipped and listed in DIR/broken.json. Exit codes: 0 all meshes are rendered, 1 some
were skipped, 2 a mistake in the command, 130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("meshes", metavar="MESHES", nargs="+", help="mesh files (.glb, .gltf, .obj, .ply, .stl, .off) or folders")
    add("-o", "--output", metavar="DIR", required=True, help="folder for the objects' folders")
    add("--views", metavar="N", type=int, default=12, help="views per object (default 12)")
    add("--size", metavar="PX", type=int, default=512, help="side of a view (default 512)")
    add("--supersample", metavar="N", type=int, default=2, help="samples per pixel along each side (default 2)")
    add("--fit", metavar="F", default="cube", help="cube (default): longest side 1; sphere: radius 0.5; none")
    add("--distances", metavar="D", nargs=2, type=float, default=[1.5, 2.2], help="of the cameras (default 1.5 2.2)")
    add("--elevations", metavar="DEG", nargs=2, type=float, default=[-90.0, 90.0], help="range (default -90 90)")
    add("--seed", metavar="N", type=int, default=0, help="seed of the cameras (default 0)")
    add("--renderer", metavar="R", default="vtk", help="vtk (default): in software; torch: on a GPU if there is one")
    add("--processes", metavar="N", type=int, default=1, help="meshes rendered at once (default 1)")
    add("--limit", metavar="N", type=int, default=None, help="the first N meshes only")
    add_message_options(parser)


def start(options: argparse.Namespace, again: Sequence[str]) -> int:
    """Render, and return the exit code; ``again`` is the command line that goes on after an interruption."""
    problems: list[str] = []

    def command() -> None:
        problems.extend(run(options))

    code = guarded(command, debug=options.debug, resume_hint=f"go on with: {command_line(again)}")
    if code != EXIT_OK:
        return code
    for problem in problems[:_MOST_SHOWN]:
        logger.warning("skipped: %s", problem)
    if len(problems) > _MOST_SHOWN:
        logger.warning("… and %d more, see %s/broken.json", len(problems) - _MOST_SHOWN, options.output)
    return EXIT_SKIPPED if problems else EXIT_OK


def run(options: argparse.Namespace) -> list[str]:
    """Render what the command line names, and return what is wrong with the meshes that were skipped.

    Raises:
        InputError: an option cannot be used, or VTK is missing.
    """
    from nvsadapter_guidance.training.mesh_files import find_meshes
    from nvsadapter_guidance.training.render_check import check_rendering
    from nvsadapter_guidance.training.render_folder import RenderOptions, render_folder
    from threedrec.launch import ensure_writable
    from threedrec.views import progress_bar

    render_options = RenderOptions(
        views=options.views,
        size=options.size,
        supersample=options.supersample,
        fit=options.fit,
        nearest=options.distances[0],
        farthest=options.distances[1],
        lowest=options.elevations[0],
        highest=options.elevations[1],
        seed=options.seed,
        renderer=options.renderer,
    )
    for name in ("processes", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: use 1 or more")
    meshes = dict(list(find_meshes(Path(path) for path in options.meshes).items())[: options.limit])
    if options.renderer == "vtk":
        check_rendering()
    ensure_writable(Path(options.output))
    outcomes = []
    with progress_bar(f"{len(meshes)} meshes", len(meshes)) as advance:
        for outcome in render_folder(meshes, Path(options.output), render_options, options.processes):
            outcomes.append(outcome)
            advance(1)
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    there = sum(outcome.was_there for outcome in outcomes)
    done = len(outcomes) - len(problems)
    logger.info("%d objects of %d views in %s (%d were there)", done, options.views, options.output, there)
    return problems
