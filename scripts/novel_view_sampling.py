r"""Novel views of an object from one image, with the command line of the released project.

    python3 scripts/novel_view_sampling.py --name nvs --input_image_path load/images/robot.png \
        --config_path checkpoints/base_query_4.yaml --ckpt_path checkpoints/base_query_4_step_200000.ckpt \
        --elevations 0 0 0 0 --azimuths 30 60 90 120 --cfg_scale 3.0 --use_ema

Without --ckpt_path the released checkpoint is taken where it is found, otherwise the embedded model. Views are written
as 000.png, 001.png, … beside sheet.png, orbit.mp4 and views.json. `3drec views` is the same with more options.
"""

import argparse
import sys
from pathlib import Path

# A checkout works without being installed: the packages lie in its root and under 3drec/.
ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "3drec")]

from threedrec.cli import Parser  # noqa: E402
from threedrec.errors import InputError  # noqa: E402
from threedrec.terminal import command_line, guarded, setup_logging  # noqa: E402
from threedrec.views import ViewsJob, run  # noqa: E402


def build_parser() -> Parser:
    """The released script's options; those that name files of the released model have become optional."""
    parser = Parser(prog="novel_view_sampling.py", description=__doc__)
    add = parser.add_argument
    add("-n", "--name", default="nvs", help="name of this sample, part of the default folder (default nvs)")
    add("--input_image_path", metavar="IMG", required=True, help="PNG, JPEG or WebP of one object")
    add("--config_path", metavar="YAML", help="configuration beside the checkpoint (default: found by its name)")
    add("--ckpt_path", metavar="FILE", help="checkpoint (default: the released one if found, else the embedded model)")
    add("--elevations", metavar="DEG", nargs="+", type=float, required=True, help="degrees, one per view")
    add("--azimuths", metavar="DEG", nargs="+", type=float, required=True, help="degrees, one per view")
    add("-c", "--cfg_scale", metavar="S", type=float, help="classifier-free guidance (default 3; embedded model 2)")
    add("--use_ema", action="store_true", help="take the average of the weights that the checkpoint holds")
    add("--num_query", metavar="N", type=int, help="views sampled together (default: as many as in training)")
    add("--resolution", metavar="PX", type=int, help="side of the views (default: the model's own, 256 as released)")
    add("--prompt", default="", help="text for the text encoder (default: empty, as in training)")
    add("--seed", metavar="N", type=int, default=0, help="seed of every random draw (default 0)")
    add("--logdir", metavar="DIR", help="folder of the views (default logs_viz/NAME_IMAGE)")
    add("--gpu", default="auto", metavar="G", help="auto (default), cpu, or a CUDA id such as 0")
    add("--steps", metavar="N", type=int, help="sampling steps (default 50; embedded model 20)")
    add("--debug", action="store_true", help="show the traceback of a user's mistake too")
    return parser


def job_of(options: argparse.Namespace) -> ViewsJob:
    """What the options ask for."""
    image = options.input_image_path
    for option, path in (("--ckpt_path", options.ckpt_path), ("--config_path", options.config_path)):
        if path is not None and not (path and Path(path).exists()):
            raise InputError(f"{option} {path}: no such file; download it with `3drec weights download released`")
    return ViewsJob(
        image=image,
        output=options.logdir or str(Path("logs_viz") / f"{options.name}_{Path(image).stem}"),
        elevations=options.elevations,
        azimuths=options.azimuths,
        num_inference_steps=options.steps,
        guidance_scale=options.cfg_scale,
        num_query=options.num_query,
        prompt=options.prompt,
        seed=options.seed,
        resolution=options.resolution,
        pretrained=options.ckpt_path or "auto",
        config=options.config_path,
        use_ema=options.use_ema,
        gpu=options.gpu,
        as_released=True,
    )


def main() -> int:
    """Sample the views and return the exit code."""
    options = build_parser().parse_args()
    setup_logging()
    again = f"start it again with: {command_line(sys.argv)}"
    return guarded(lambda: _sample(options), debug=options.debug, resume_hint=again)


def _sample(options: argparse.Namespace) -> None:
    run(job_of(options))


if __name__ == "__main__":
    sys.exit(main())
