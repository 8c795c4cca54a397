"""The commands ``3drec`` and ``launch.py``. Nothing heavy is imported before a job begins, so ``--help`` is fast."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from threedrec import __version__
from threedrec.errors import InputError
from threedrec.launch import Job, Mode, run_job
from threedrec.registry import nearest
from threedrec.terminal import command_line, guarded, setup_logging

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
    launch = commands.add_parser(
        "launch",
        help="run a config file; the same as python launch.py",
        description="Run a config file.",
        epilog=LAUNCH_EXAMPLES,
    )
    _add_launch_arguments(launch)
    options, rest = parser.parse_known_args(arguments)
    chosen = {"run": run, "launch": launch}[options.command]
    return _start(_run_job if options.command == "run" else _launch_job, chosen, options, rest)


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
    parser.add_argument("--verbose", action="store_true", help="show debug lines and warnings of libraries")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake too")
    # Only for --help: overrides may stand anywhere between the options, which a positional argument cannot.
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').strip()} [key=value ...]"


def _start(
    make: Callable[[argparse.Namespace, list[str]], Job],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    rest: list[str],
) -> int:
    for text in rest:
        if text.startswith("-"):
            known = [name for action in parser._actions for name in action.option_strings]
            parser.error(f"unknown option {text}{nearest(text.split('=')[0], known)}")
        if "=" not in text:
            parser.error(f"'{text}' is no key=value, such as trainer.max_steps=100")
    setup_logging(options.verbose)
    again = [argument for argument in sys.argv if not argument.startswith("resume=")] + ["resume=auto"]
    hint = f"go on with: {command_line(again)}"

    def command() -> None:
        run_job(make(options, rest))

    return guarded(command, debug=options.debug, resume_hint=hint)


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
