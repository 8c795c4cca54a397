"""The command ``3drec evaluate``: its options, and which evaluation they ask for."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from threedrec.terminal import EXIT_BUG, EXIT_OK, add_message_options, command_line, guarded

logger = logging.getLogger(__name__)

EXIT_SKIPPED = EXIT_BUG
"""Some objects were skipped, as in ``3drec batch``."""
_MOST_SHOWN = 20

EXAMPLES = """\
examples:
  3drec evaluate views --objects meshes/ -o scores            imagined views against rendered ones
  3drec evaluate views --objects meshes/ -o scores --weights released --training-views views/
  3drec evaluate views --pairs samples/ -o scores --lpips vgg  pictures: samples/*/pred.png against target.png
  3drec evaluate mesh --predictions results/ --truth meshes/ -o scores

Both write DIR/metrics.json: means, a row for each object, and a list of objects that were skipped, with the reason.
Exit codes: 0 all objects are scored, 1 some were skipped, 2 a mistake in the command, 130 interrupted.
"""
VIEWS_EXAMPLES = """\
examples:
  3drec evaluate views --objects meshes/ -o scores
  3drec evaluate views --objects meshes/ -o scores --limit 2 --views 8 --steps 10     a quick look
  3drec evaluate views --objects meshes/ -o scores --training-views data/views/train.tar
  3drec evaluate views --pairs samples/ -o scores --lpips vgg

Every mesh is rendered (by VTK, no GPU or display needed, or by --renderer torch) from cameras around it. The view at
azimuth 0 and elevation 0 is the reference; all views at other azimuths, at elevations 0 and 30, are sampled from it and
compared with the renderings, beside baselines. Writes DIR/metrics.json, DIR/grid.png and DIR/objects/NAME/; the same
command goes on after an interruption. docs/evaluation.md says what is measured. Exit codes: 0, 1 some objects were
skipped, 2, 130.
"""
MESH_EXAMPLES = """\
examples:
  3drec evaluate mesh --predictions results/ --truth meshes/ -o scores

The prediction for meshes/NAME.glb is results/NAME.glb (or .obj, .ply, …), or the mesh below results/NAME/, where
`3drec run photo.png -o results/NAME` leaves it. Both are scaled to a longest side of 1 and centred, and not aligned;
"aligned" in DIR/metrics.json are the scores after the best rotation, shift and scale.
docs/evaluation.md says what is measured. Exit codes: 0, 1 some objects were skipped, 2, 130.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two subcommands and their options."""
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    views = kinds.add_parser("views", help="imagined views of objects, or pairs of pictures", epilog=VIEWS_EXAMPLES)
    add = views.add_argument
    what = views.add_mutually_exclusive_group(required=True)
    what.add_argument("--objects", metavar="DIR", help="folder of meshes (.glb, .obj, …), front +z, y up")
    what.add_argument("--pairs", metavar="DIR", help="folder of folders with a pred.png and a target.png")
    add("-o", "--output", metavar="DIR", required=True, help="folder for the results")
    add("--weights", metavar="W", default="auto", help="auto (default), mini, released, or a path")
    add("--weights-config", metavar="YAML", help="of a released checkpoint (default: the one beside it)")
    add("--views", metavar="N", type=int, default=16, help="cameras, half level and half at elevation 30 (default 16)")
    add("--steps", metavar="N", type=int, help="sampling steps (default 20; released weights 50)")
    add("--guidance-scale", metavar="S", type=float, help="classifier-free guidance (default 1; released weights 3)")
    add("--scheduler", metavar="S", default="euler", help="euler (default), ddim, dpm++ or unipc")
    add("--seed", metavar="N", type=int, default=0, help="seed of every random draw (default 0)")
    add("--fit", metavar="F", default="sphere", help="sphere (default): radius 0.5; cube: longest side 1; none")
    add("--renderer", metavar="R", default="vtk", help="of true views: vtk (default); torch: on a GPU if there is one")
    add("--limit", metavar="N", type=int, help="the first N objects only")
    add("--training-views", metavar="PATH", help="renderings of training objects: adds nearest-training-object")
    add("--lpips", metavar="B", help="LPIPS with this backbone: alex, vgg or squeeze (needs torchvision)")
    add("--dtype", metavar="T", default="auto", help="auto (fp16 for released weights on a GPU), fp32, fp16 or bf16")
    add("--gpu", default="auto", metavar="G", help="auto (default), cpu, or a CUDA id such as 0")
    mesh = kinds.add_parser("mesh", help="reconstructed meshes against true ones", epilog=MESH_EXAMPLES)
    add = mesh.add_argument
    add("--predictions", metavar="DIR", required=True, help="folder of reconstructed meshes")
    add("--truth", metavar="DIR", required=True, help="folder of true meshes")
    add("-o", "--output", metavar="DIR", required=True, help="folder for the results")
    add("--no-aligned", action="store_true", help="leave out the scores after alignment")
    for part in (views, mesh):
        add_message_options(part)


def start(options: argparse.Namespace, again: Sequence[str]) -> int:
    """Evaluate, and return the exit code; ``again`` is the command line that goes on after an interruption."""
    skipped: list[dict[str, str]] = []

    def command() -> None:
        skipped.extend(_evaluate(options))

    code = guarded(command, debug=options.debug, resume_hint=f"go on with: {command_line(again)}")
    if code != EXIT_OK:
        return code
    for entry in skipped[:_MOST_SHOWN]:
        logger.warning("skipped: %s: %s", entry["name"], entry["reason"])
    if len(skipped) > _MOST_SHOWN:
        logger.warning("… and %d more, see %s/metrics.json", len(skipped) - _MOST_SHOWN, options.output)
    return EXIT_SKIPPED if skipped else EXIT_OK


def _evaluate(options: argparse.Namespace) -> list[dict[str, str]]:
    from threedrec import evaluate

    if options.kind == "mesh":
        return evaluate.meshes(options.predictions, options.truth, options.output, aligned=not options.no_aligned)
    if options.pairs is not None:
        return evaluate.pairs(options.pairs, options.output, options.lpips)
    names = ("objects", "output", "weights", "weights_config", "views", "steps", "guidance_scale", "scheduler", "seed")
    more = ("fit", "renderer", "limit", "training_views", "lpips", "dtype", "gpu")
    values: dict[str, Any] = {name: getattr(options, name) for name in (*names, *more)}
    return evaluate.views(evaluate.ViewsEvaluation(**values))
