"""The commands ``3drec`` and ``launch.py``. Nothing heavy is imported before a job begins, so ``--help`` is fast."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from threedrec import __version__
from threedrec.errors import InputError
from threedrec.launch import Job, Mode, run_job
from threedrec.registry import nearest
from threedrec.terminal import add_message_options, command_line, guarded, setup_logging

LAUNCH_EXAMPLES = """\
examples:
  launch.py --config configs/nvsadapter.yaml --train data.image_path=load/images/chair.png
  launch.py --config configs/nvsadapter.yaml --train --gpu cpu data.image_path=photo.png trainer.max_steps=100
  launch.py --config configs/nvsadapter.yaml --train data.image_path=photo.png resume=auto
  launch.py --config configs/nvsadapter.yaml --export data.image_path=photo.png system.exporter.texture_size=2048

--train ends with the turntable and the mesh. Any key of the YAML can be set by key=value; `recipe=none` takes the YAML
alone, `resume=auto` goes on with the newest run of the same name and tag. Results: outputs/<name>/<tag>@<time>/save.
"""
RUN_EXAMPLES = """\
examples:
  3drec run photo.png -o chair
  3drec run photo.png -o chair --gpu cpu --recipe mini-cpu
  3drec run photo.png -o chair --seed 3 system.guidance.guidance_scale=4 trainer.max_steps=200
  3drec run photo.png -o chair resume=auto

The mesh is DIR/save/*.glb, the turntable DIR/save/*.mp4, the numbers DIR/metrics.json. A PNG with an alpha channel
tells what the object is; without one the background has to be plain (or: pip install -e '.[segment]').
"""
VIEWS_EXAMPLES = """\
examples:
  3drec views photo.png                                       eight views around the object
  3drec views photo.png --count 24 -o spin                    a smooth orbit
  3drec views photo.png --elevations 0 20 --azimuths 45 -90   one from the right, one from the left and above
  3drec views photo.png --model released --scheduler unipc --steps 20

The photograph is seen from azimuth 0; azimuths grow counter-clockwise seen from above. Writes 000.png, 001.png, …,
sheet.png, orbit.mp4 and views.json.
"""
MODES: dict[str, str] = {
    "train": "optimise, then render the test turntable and export the mesh",
    "validate": "render the validation views of a checkpoint",
    "test": "render the test turntable of a checkpoint",
    "export": "export the mesh of a checkpoint",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes end like all others: one line ``error: …`` and exit code 2."""

    def __init__(self, **options: Any) -> None:
        """Take ``options`` as argparse does; texts keep their lines, and options must be written out."""
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Write the mistake and leave."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command ``3drec`` and return its exit code."""
    parser = Parser(
        prog="3drec",
        description="One photograph in, a textured mesh out.",
        epilog="first try: 3drec run photo.png -o chair",
    )
    parser.add_argument("--version", action="version", version=f"3drec {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="make a mesh from one image; needs no YAML",
        description="Make a textured mesh, a turntable and a metrics file from one image.",
        epilog=RUN_EXAMPLES,
    )
    _add_run_arguments(run)
    run.set_defaults(start=partial(_start, _run_job))
    launch = commands.add_parser(
        "launch",
        help="run a config file; the same as python launch.py",
        description="Run a config file.",
        epilog=LAUNCH_EXAMPLES,
    )
    _add_launch_arguments(launch)
    launch.set_defaults(start=partial(_start, _launch_job))
    _add_views_command(commands)
    _add_weights_command(commands)
    _add_doctor_command(commands)
    _add_batch_command(commands)
    _add_data_commands(commands)
    options, rest = parser.parse_known_args(arguments)
    return options.start(commands.choices[options.command], options, rest)


def launch_main(arguments: Sequence[str] | None = None) -> int:
    """Run ``launch.py`` and return its exit code."""
    parser = Parser(
        prog="launch.py",
        description="Run a config file.",
        epilog=LAUNCH_EXAMPLES,
    )
    _add_launch_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    return _start(_launch_job, parser, options, rest)


def _add_views_command(commands: Any) -> None:
    views = commands.add_parser(
        "views",
        help="images of the object from other cameras",
        description="Make images of the object of a photograph from any camera.",
        epilog=VIEWS_EXAMPLES,
    )
    add = views.add_argument
    add("image", metavar="IMG", help="the photograph (PNG, JPEG or WebP)")
    add("-o", "--output", metavar="DIR", default=None, help="folder for the results (default outputs/views/IMG)")
    add("--elevations", metavar="DEG", nargs="+", type=float, help="degrees, one per view (default 0)")
    add("--azimuths", metavar="DEG", nargs="+", type=float, help="degrees, one per view (default: evenly around)")
    add("--distances", metavar="D", nargs="+", type=float, help="object diameters, one per view (default 1.5)")
    add("--count", metavar="N", type=int, help="how many views evenly around the object (default 8)")
    add("--model", metavar="M", default="auto", help="auto (default), mini, released, or a path of weights")
    add("--model-config", metavar="YAML", help="configuration of a released checkpoint (default: the one beside it)")
    add("--raw", action="store_true", help="take a checkpoint's last weights, not their average")
    add("--pose-convention", metavar="C", help="training (default) or released-sampling, for released weights")
    add("--steps", metavar="N", type=int, help="sampling steps (default 20; released weights 50)")
    add("--guidance-scale", metavar="S", type=float, help="classifier-free guidance (default 1; released weights 3)")
    add("--noise-scale", metavar="S", type=float, help="of the first noise: less varies less (default 0.3; released 1)")
    add("--scheduler", metavar="S", default="euler", help="euler (default), ddim, dpm++ or unipc")
    add("--num-query", metavar="N", type=int, help="views sampled together (default: as many as in training)")
    add("--prompt", default="", help="text for released weights (default: empty, as in training)")
    add("--seed", metavar="N", type=int, default=0, help="seed of every random draw (default 0)")
    add("--resolution", metavar="PX", type=int, help="side of the views (default: the model's own)")
    add("--dtype", metavar="T", default="auto", help="auto (fp16 for released weights on a GPU), fp32, fp16 or bf16")
    add("--offload", metavar="O", default="none", help="GPU memory: none (default), model or sequential")
    add("--gpu", default="auto", metavar="G", help="auto (default), cpu, or a CUDA id such as 0")
    add_message_options(views)
    views.set_defaults(start=partial(_start_plain, _run_views))


def _add_weights_command(commands: Any) -> None:
    from threedrec.weights_command import EXAMPLES, add_arguments, run

    weights = commands.add_parser(
        "weights",
        help="list, download, verify and convert weight files",
        description="List, download, verify and convert weight files.",
        epilog=EXAMPLES,
    )
    add_arguments(weights)
    weights.set_defaults(start=partial(_start_plain, run))


def _add_doctor_command(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what is installed and what a run would use",
        description="Say what is installed, which weights and backends are found, and what a run would use and why. "
        "Ends with 0 when `3drec run` can run here, otherwise with 2.",
    )
    doctor.add_argument("--json", action="store_true", help="as JSON on stdout")
    add_message_options(doctor)
    doctor.set_defaults(start=partial(_start_plain, _run_doctor))


def _add_batch_command(commands: Any) -> None:
    from threedrec.batch_command import EXAMPLES, add_arguments

    batch = commands.add_parser(
        "batch",
        help="make meshes from a folder of images, on one machine or a cluster",
        description="Make a mesh from every image of a folder.",
        epilog=EXAMPLES,
    )
    add_arguments(batch)
    batch.set_defaults(start=_start_batch)


def _add_data_commands(commands: Any) -> None:
    from threedrec import evaluate_command, render_command

    render = commands.add_parser(
        "render",
        help="views of meshes with their cameras, for training",
        description="Render meshes into folders of views with their cameras.",
        epilog=render_command.EXAMPLES,
    )
    render_command.add_arguments(render)
    render.set_defaults(start=partial(_start_data_command, render_command.start))
    evaluate = commands.add_parser(
        "evaluate",
        help="how good imagined views or reconstructed meshes are",
        description="Measure imagined views or reconstructed meshes against the truth.",
        epilog=evaluate_command.EXAMPLES,
    )
    evaluate_command.add_arguments(evaluate)
    evaluate.set_defaults(start=partial(_start_data_command, evaluate_command.start))


def _start_data_command(
    start: Callable[[argparse.Namespace, Sequence[str]], int],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    rest: Sequence[str],
) -> int:
    """Run a command that skips what it cannot use, and says so in its exit code."""
    _refuse_arguments(parser, rest)
    setup_logging(options.verbose)
    return start(options, sys.argv)


def _start_batch(parser: Parser, options: argparse.Namespace, rest: list[str]) -> int:
    from threedrec.batch_command import start

    _refuse_options(parser, rest)
    setup_logging(options.verbose)
    return start(options, rest)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMG", help="the photograph (PNG, JPEG or WebP)")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument(
        "--recipe", metavar="R", default=None, help="auto (default), mini-cpu, mini-gpu, full-gpu, or none"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=None, help="seed of every random draw (default 0)")
    _add_common_arguments(parser)


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="C", required=True, help="YAML file, such as configs/nvsadapter.yaml")
    mode = parser.add_mutually_exclusive_group(required=True)
    for name, words in MODES.items():
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=words)
    _add_common_arguments(parser)


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="auto", metavar="G", help="auto (default), cpu, or CUDA ids such as 0 or 0,1")
    add_message_options(parser)
    # Only for --help: overrides may stand anywhere between the options, which a positional argument cannot.
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').strip()} [key=value ...]"


def _start(
    make: Callable[[argparse.Namespace, list[str]], Job],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    rest: list[str],
) -> int:
    _refuse_options(parser, rest)
    for text in rest:
        if "=" not in text:
            parser.error(f"'{text}' is no key=value, such as trainer.max_steps=100")
    setup_logging(options.verbose)
    again = [argument for argument in sys.argv if not argument.startswith("resume=")] + ["resume=auto"]
    hint = f"go on with: {command_line(again)}"

    def command() -> None:
        run_job(make(options, rest))

    return guarded(command, debug=options.debug, resume_hint=hint)


def _refuse_options(parser: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Refuse an option that is unknown, and name the nearest."""
    for text in rest:
        if text.startswith("-"):
            known = [name for action in parser._actions for name in action.option_strings]
            parser.error(f"unknown option {text}{nearest(text.split('=')[0], known)}")


def _refuse_arguments(parser: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Refuse whatever is left, where a command takes no ``key=value``."""
    if rest:
        parser.error(f"unknown argument {rest[0]}")


def _start_plain(
    run: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    rest: Sequence[str],
) -> int:
    """Run a command that takes no ``key=value``."""
    _refuse_arguments(parser, rest)
    setup_logging(options.verbose)
    return guarded(lambda: run(options), debug=options.debug, resume_hint=f"go on with: {command_line(sys.argv)}")


def _run_doctor(options: argparse.Namespace) -> None:
    from threedrec import doctor

    doctor.run(options.json)


def _run_views(options: argparse.Namespace) -> None:
    from threedrec import views

    views.run(
        views.ViewsJob(
            image=options.image,
            output=options.output or views.default_folder(options.image),
            elevations=options.elevations,
            azimuths=options.azimuths,
            distances=options.distances,
            count=options.count,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            noise_scale=options.noise_scale,
            num_query=options.num_query,
            scheduler=options.scheduler,
            prompt=options.prompt,
            seed=options.seed,
            resolution=options.resolution,
            pretrained=options.model,
            config=options.model_config,
            use_ema=not options.raw,
            pose_convention=options.pose_convention,
            gpu=options.gpu,
            dtype=options.dtype,
            offload=options.offload,
        )
    )


def _launch_job(options: argparse.Namespace, overrides: list[str]) -> Job:
    mode: Mode = options.mode
    return Job(mode=mode, config=options.config, overrides=overrides, gpu=options.gpu)


def _run_job(options: argparse.Namespace, overrides: list[str]) -> Job:
    from threedrec.lookup import configs_dir

    if not options.output:
        raise InputError("-o: give the folder for the results")
    values: dict[str, object] = {"data": {"image_path": options.image}, "trial_dir": options.output}
    if options.recipe is not None:
        values["recipe"] = options.recipe
    if options.seed is not None:
        values["seed"] = options.seed
    config = str(configs_dir() / "nvsadapter.yaml")
    return Job(mode="train", config=config, overrides=overrides, values=values, gpu=options.gpu)


if __name__ == "__main__":
    sys.exit(main())
