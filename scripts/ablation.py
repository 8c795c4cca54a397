r"""Train and score every variant of the adapter alike, and write one table: what each of its parts is worth.

    python scripts/ablation.py --views data/views/train.tar data/views/extra.tar --validation data/views/val.tar
    python scripts/ablation.py --views data/views/train.tar --validation data/views/val.tar \
        --variants base query_1 --steps 4 --batch 2 --objects 2 --sampling-steps 2        a quick look

Each variant is configs/adapter/base.yaml, mini.yaml and a file of its own: a fresh adapter on the embedded model's
frozen base. A finished variant is kept in --output, so the same command goes on after an interruption. The table goes
to RESULTS/ablation.json and RESULTS/ablation.md.

Exit codes: 0 the table is written, 2 a mistake in the command, 130 interrupted.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.evaluation.baselines import copied_reference
from nvsadapter_guidance.evaluation.image_metrics import Lpips, load_lpips
from nvsadapter_guidance.evaluation.view_scores import score_views
from nvsadapter_guidance.model import MINI_MODEL, WEIGHTS_NAME, NVSModel
from nvsadapter_guidance.training.ablation import VARIANTS, Budget, Variant, VariantTraining, score_variant
from nvsadapter_guidance.training.adapter.config_files import load_config
from nvsadapter_guidance.training.adapter.network import build_model, trainable
from nvsadapter_guidance.training.pretrain import LatentBank, PooledBanks
from nvsadapter_guidance.training.views import ViewBank, composite, load_tar

log = logging.getLogger("ablation")
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "adapter"
Data = LatentBank | PooledBanks


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--views", type=Path, nargs="+", required=True, help="training views (.tar, one or several)")
    add(
        "--validation", type=Path, required=True, help="validation views (.tar), of objects that are in none of --views"
    )
    add("--variants", nargs="+", metavar="V", default=list(VARIANTS), help=f"of {', '.join(VARIANTS)} (default: all)")
    add("--steps", type=int, default=Budget.steps, help=f"training steps of each (default {Budget.steps})")
    add("--batch", type=int, default=Budget.batch_size, help=f"objects per step (default {Budget.batch_size})")
    add("--lr", type=float, default=Budget.lr, help=f"learning rate of matrices (default {Budget.lr:g})")
    add("--copies", type=int, default=Budget.copies, help=f"augmented copies of each object (default {Budget.copies})")
    add("--sampling-steps", type=int, default=Budget.sampling_steps, help=f"default {Budget.sampling_steps}")
    add("--objects", type=int, help="the first N validation objects only")
    add("--base", default="mini", help="model folder below the adapter (default: the embedded model)")
    add("--lpips", metavar="B", help="LPIPS with this backbone: alex, vgg or squeeze (needs torchvision)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("-o", "--output", type=Path, default=Path("outputs/ablation"), help="folder for finished variants")
    add("--results", type=Path, default=ROOT / "benchmarks/results", help="folder for the table")
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise for what cannot be used, before anything is read.

    Raises:
        InputError: names the option.
    """
    for name in ("steps", "batch", "lr", "copies", "sampling_steps", "objects"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be greater than 0")
    unknown = [name for name in arguments.variants if name not in VARIANTS]
    if unknown:
        raise InputError(f"--variants: '{unknown[0]}' is unknown; use some of {', '.join(VARIANTS)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {arguments.device}: no CUDA device is found; use cpu")


def model_options(variant: Variant, base: str) -> Any:
    """What a variant trains, from the shipped configurations."""
    files = [CONFIGS / f"{name}.yaml" for name in ("base", "mini", *variant.configs)]
    return load_config(files, [f"model.base={json.dumps(base)}"]).model


def encode_views(paths: list[Path], arguments: argparse.Namespace) -> Data:
    """Latents of the training views; all variants share the frozen autoencoder."""
    start = time.perf_counter()
    model = build_model(model_options(VARIANTS["base"], arguments.base), 0).to(arguments.device)
    generator = torch.Generator(model.device).manual_seed(0)
    banks = [LatentBank(model, load_tar(path).to(model.device), arguments.copies, generator) for path in paths]
    log.info("read and encoded %d objects in %.0f s", sum(len(b.bank) for b in banks), time.perf_counter() - start)
    return PooledBanks(banks) if len(banks) > 1 else banks[0]


def copy_scores(bank: ViewBank, lpips: Lpips | None) -> dict[str, float]:
    """What the table's views score when each is answered with the reference."""
    rows = []
    for index in range(len(bank)):
        truth = composite(bank.rgba[index].float() / 255.0).movedim(-1, 1).cpu()
        targets = ((bank.azimuth[index] % 360.0).abs() > 1.0).cpu()
        mask = bank.rgba[index, ..., 3].cpu() > 127
        rows.append(score_views(copied_reference(truth)[targets], truth[targets], mask[targets], lpips))
    return {key: float(torch.cat([row[key] for row in rows]).double().mean()) for key in rows[0]}


def settings_of(arguments: argparse.Namespace, budget: Budget, bank: ViewBank) -> dict[str, Any]:
    """All that a row depends on; rows of other settings are not mixed into one table.

    Raises:
        InputError: the base or a file of views is missing.
    """
    weights = (MINI_MODEL if arguments.base == "mini" else Path(arguments.base)) / WEIGHTS_NAME
    for path, where in ((weights, "--base"), *((path, "--views") for path in arguments.views)):
        if not path.is_file():
            raise InputError(f"{where}: no file {path}; docs/training-data.md says how views are made")
    return {
        **dataclasses.asdict(budget),
        "views": [f"{path.name}, {path.stat().st_size} bytes" for path in arguments.views],
        "validation_objects": len(bank),
        "base": arguments.base,
        "base_weights": sha256(weights.read_bytes()).hexdigest()[:12],
        "lpips": arguments.lpips,
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
    }


def finished(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row that an earlier call left, if there is one.

    Raises:
        InputError: it was made with other settings.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in settings.items() if found["settings"].get(key) != value]
        row: dict[str, Any] = found["row"]
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to train the variant again") from error
    if changed:
        raise InputError(f"{path}: was made with another {', '.join(changed)}; choose another --output")
    return row


def train_and_score(
    variant: Variant, model: NVSModel, data: Data, bank: ViewBank, lpips: Lpips | None, budget: Budget, advance: Any
) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    final = VariantTraining(model, data, budget, variant.seed).run(advance)
    seconds = time.perf_counter() - start
    scores = score_variant(model, bank, budget, lpips=lpips)
    return {
        "group": variant.group,
        "change": variant.change,
        "parameters": sum(value.numel() for value in trainable(model).values()),
        **{key: round(value, 5) for key, value in scores.items()},
        "training_loss": round(final, 5),
        "training_seconds": round(seconds, 1),
    }


def write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def markdown(rows: Mapping[str, Mapping[str, Any]], copied: Mapping[str, float], settings: Mapping[str, Any]) -> str:
    """The table as a page."""
    lpips = ["lpips"] if "lpips" in copied else []
    keys = ["psnr", "ssim", *lpips, "mask_iou", "loss"]
    trained = f"{settings['steps']} steps of {settings['batch_size']} objects on {settings['device']}"
    sampled = f"{settings['sampling_steps']} sampling steps, guidance {settings['guidance_scale']:g}"
    names = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS", "mask_iou": "mask IoU", "loss": "validation loss"}
    lines = [
        "# Ablation of the adapter on the embedded model's base",
        "",
        f"A fresh adapter in each row, on the same frozen base: {trained}; {settings['validation_objects']} unseen "
        f"objects, {sampled}.",
        "Budgets are short: rows compare with each other, not with the paper. The second row shows how much another",
        "seed changes. Made by `scripts/ablation.py`.",
        "",
        "| part | variant | trained parameters | " + " | ".join(names[key] for key in keys) + " |",
        "|" + "---|" * (len(keys) + 3),
        "| | copy of the reference | | " + " | ".join(_number(copied, key) for key in keys) + " |",
    ]
    for row in rows.values():
        numbers = " | ".join(_number(row, key) for key in keys)
        lines.append(f"| {row['group']} | {row['change']} | {row['parameters']:,} | {numbers} |")
    return "\n".join(lines) + "\n"


def _number(row: Mapping[str, Any], key: str) -> str:
    return "" if key not in row else f"{row[key]:.2f}" if key == "psnr" else f"{row[key]:.4f}"


def run(arguments: argparse.Namespace) -> None:
    """Train what is not trained yet, and write the table."""
    check_arguments(arguments)
    lpips = None if arguments.lpips is None else load_lpips(arguments.lpips, arguments.device)
    budget = Budget(
        steps=arguments.steps,
        batch_size=arguments.batch,
        lr=arguments.lr,
        copies=arguments.copies,
        sampling_steps=arguments.sampling_steps,
    )
    bank = load_tar(arguments.validation).to(arguments.device)
    bank = bank if arguments.objects is None else bank.first(arguments.objects)
    settings = settings_of(arguments, budget, bank)
    found = {name: finished(arguments.output / f"{name}.json", settings) for name in arguments.variants}
    rows = {name: row for name, row in found.items() if row is not None}
    missing = [name for name in found if name not in rows]
    if missing:
        data = encode_views(arguments.views, arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in missing:
            variant, task = VARIANTS[name], progress.add_task(name, total=budget.steps)
            model = build_model(model_options(variant, arguments.base), variant.seed).to(arguments.device)
            advance = partial(progress.advance, task)
            row = rows[name] = train_and_score(variant, model, data, bank, lpips, budget, advance)
            write(arguments.output / f"{name}.json", json.dumps({"settings": settings, "row": row}, indent=1) + "\n")
            log.info("%s: %.2f dB, IoU %.3f, loss %.4f", name, row["psnr"], row["mask_iou"], row["loss"])
    rows = {name: rows[name] for name in arguments.variants}
    copied = copy_scores(bank, lpips)
    table = {"settings": settings, "baselines": {"copy-reference": copied}, "variants": rows}
    write(arguments.results / "ablation.json", json.dumps(table, indent=1) + "\n")
    write(arguments.results / "ablation.md", markdown(rows, copied, settings))
    log.info("wrote %s and ablation.md", arguments.results / "ablation.json")


def main() -> int:
    """Run; see the module for exit codes."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        run(arguments)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; go on with the same command\n")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
