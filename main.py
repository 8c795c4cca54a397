"""python3 main.py -b configs/adapter/base.yaml [more.yaml …] -- [key=value …]: train the adapter; see --help."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A checkout works without being installed: the command line's manners lie with the reconstruction package.
sys.path.insert(1, str(Path(__file__).resolve().parent / "3drec"))

from threedrec.cli import Parser
from threedrec.errors import InputError
from threedrec.terminal import add_message_options, command_line, guarded, setup_logging

EXAMPLES = """\
examples:
  main.py -b configs/adapter/base.yaml -- data.root=renderings trainer.devices=0, data.batch_size=4
  main.py -b configs/adapter/base.yaml configs/adapter/query_2.yaml -n two -- data.root=renderings
  main.py -b configs/adapter/base.yaml -r auto -- data.root=renderings          go on with the newest checkpoint
  torchrun --nproc_per_node 8 main.py -b configs/adapter/base.yaml -- data.root=renderings trainer.devices=8
  main.py --export outputs/adapter/base/checkpoints/step_00200000.ckpt -o checkpoints/my-adapter

Configs are merged from left to right, key=value after -- comes last. Results: outputs/adapter/NAME. docs/training.md
has the keys, the folder's files, several machines and SLURM.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or export, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    setup_logging(options.verbose)
    again = [word for word in sys.argv if word not in ("-r", "--resume", "auto", options.resume)]
    hint = f"go on with: {command_line([*again[:1], '-r', 'auto', *again[1:]])}"
    return guarded(lambda: _run(options), debug=options.debug, resume_hint="" if options.export else hint)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="main.py", description="Train the NVS-Adapter on rendered objects.", epilog=EXAMPLES)
    add = parser.add_argument
    add("-b", "--base", metavar="YAML", nargs="+", default=[], help="configs, merged from left to right")
    add("-n", "--name", help="of the run and its folder (default: the last config's)")
    add("-l", "--logdir", metavar="DIR", help="folder of the runs (default outputs/adapter)")
    add("-s", "--seed", metavar="N", type=int, help="seed of every random draw (default 0)")
    add(
        "-r",
        "--resume",
        metavar="R",
        help="go on with a checkpoint, with a run's folder, or auto: with this run's newest",
    )
    add("--count", action="store_true", help="say how many parameters would be trained, and end; reads no weights")
    add("--export", metavar="CKPT", help="write the weights of a checkpoint as an adapter folder, and end")
    add("-o", "--output", metavar="DIR", help="folder for --export")
    add("--raw", action="store_true", help="with --export: the last weights, not their moving average")
    add_message_options(parser)
    add("overrides", metavar="key=value", nargs="*", help="any key of the configs, after --")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.export:
        _export(options)
        return
    from nvsadapter_guidance.training.adapter.config_files import load_config
    from threedrec.lookup import find_path

    if not options.base:
        raise InputError("-b: missing; give a config such as configs/adapter/base.yaml")
    files = [find_path(word) for word in options.base if "=" not in word]
    given = {"name": options.name, "output": options.logdir, "seed": options.seed}
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    config = load_config(files, [*(word for word in options.base if "=" in word), *options.overrides, *words])
    if options.count:
        from nvsadapter_guidance.training.adapter.network import blank_model, trainable

        total = sum(value.numel() for value in trainable(blank_model(config.model)).values())
        sys.stdout.write(f"{total} parameters would be trained\n")
        return
    from nvsadapter_guidance.training.adapter.run import train

    train(config, options.resume)


def _export(options: argparse.Namespace) -> None:
    from nvsadapter_guidance.training.adapter.export import export_checkpoint

    if not options.output:
        raise InputError("-o: missing; give the folder for the adapter")
    export_checkpoint(Path(options.export), Path(options.output), use_ema=not options.raw)


if __name__ == "__main__":
    sys.exit(main())
