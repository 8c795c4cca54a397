r"""Train the embedded model from rendered views: autoencoder first, then UNet, adapter and image encoder together.

    python scripts/train_mini.py --views data/views/train.tar --validation data/views/val.tar -o outputs/mini \
        --seconds 900 --procedural 8192

A run can be cut into pieces: give ``--resume`` with the ``state.pt`` of the piece before, and ``--total-seconds`` the
length of all pieces together, so that the learning rate knows when to fall.
"""

import argparse
import dataclasses
import json
import logging
import time
from pathlib import Path

import torch

from nvsadapter_guidance.model import NVSModel, NVSModelConfig
from nvsadapter_guidance.training.autoencoder import AutoencoderTraining, train_autoencoder
from nvsadapter_guidance.training.pretrain import Pretrainer, Pretraining, encode_banks
from nvsadapter_guidance.training.procedural import render_procedural
from nvsadapter_guidance.training.validate import validate_views
from nvsadapter_guidance.training.views import ViewBank, load_tar

log = logging.getLogger("train_mini")
ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=Path, required=True, help="training views (.tar of render_training_views.py)")
    parser.add_argument("--validation", type=Path, required=True, help="validation views (.tar)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for weights, state and metrics")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/mini/model.json", help="shape of the model")
    parser.add_argument("--autoencoder-seconds", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of this piece of training")
    parser.add_argument("--total-seconds", type=float, help="length of all pieces together (default: --seconds)")
    parser.add_argument("--resume", type=Path, help="state.pt of the piece before")
    parser.add_argument("--start-from", type=Path, help="model folder whose weights to start from")
    parser.add_argument("--procedural", type=int, default=0, help="how many procedural objects to render and add")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of Pretraining, e.g. lr=1e-3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def overrides(pairs: list[str]) -> dict[str, object]:
    """Read ``key=value`` pairs with JSON values."""
    return {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def load_banks(arguments: argparse.Namespace) -> list[ViewBank]:
    """The training views and, when asked for, procedural ones, on the device."""
    banks = [load_tar(arguments.views).to(arguments.device)]
    if arguments.procedural:
        start = time.perf_counter()
        generator = torch.Generator(arguments.device).manual_seed(1)
        banks.append(render_procedural(arguments.procedural, generator))
        log.info("rendered %d procedural objects in %.1f s", arguments.procedural, time.perf_counter() - start)
    return banks


def build_model(arguments: argparse.Namespace, banks: list[ViewBank], metrics: dict[str, object]) -> NVSModel:
    """A model to train: loaded, or fresh with an autoencoder trained first."""
    if arguments.start_from:
        return NVSModel.load(arguments.start_from).to(arguments.device)
    torch.manual_seed(0)
    model = NVSModel(NVSModelConfig(**json.loads(arguments.config.read_text()))).to(arguments.device)
    if not arguments.resume:
        training = AutoencoderTraining(seconds=arguments.autoencoder_seconds)
        metrics["autoencoder"] = train_autoencoder(model.vae, banks, training)
        log.info("autoencoder: %s", metrics["autoencoder"])
    return model


def main() -> None:
    """Run one piece of training, validate, and write ``model/``, ``state.pt``, ``metrics.json`` and ``views.pt``."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    arguments.output.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, object] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    banks = load_banks(arguments)
    model = build_model(arguments, banks, metrics)
    config = Pretraining(
        seconds=arguments.seconds,
        total_seconds=arguments.total_seconds or arguments.seconds,
        **overrides(arguments.set),  # type: ignore[arg-type]
    )
    state = torch.load(arguments.resume, map_location=arguments.device, weights_only=True) if arguments.resume else None
    if state is not None:
        model.load_state_dict(state["model"])
        model.vae.register_to_config(scaling_factor=state["scaling_factor"])
        config.seed += state["step"]
    start = time.perf_counter()
    trainer = Pretrainer(model, encode_banks(model, banks, config), config)
    log.info("encoded the views in %.1f s", time.perf_counter() - start)
    if state is not None:
        trainer.load(state)
    trainer.run(config.seconds)
    torch.save(trainer.state(), arguments.output / "state.pt")
    trainer.swap_average()
    model.eval()
    scores, pictures = validate_views(model, load_tar(arguments.validation).to(arguments.device))
    log.info("validation: %s", scores)
    metrics |= {"config": dataclasses.asdict(config), "steps": trainer.step, "seconds": trainer.elapsed}
    metrics |= {"scores": dataclasses.asdict(scores), "history": trainer.history}
    if torch.cuda.is_available():
        metrics |= {"device": torch.cuda.get_device_name(), "peak_gb": torch.cuda.max_memory_allocated() / 2**30}
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    torch.save((pictures * 255).round().byte().cpu(), arguments.output / "views.pt")
    model.save(arguments.output / "model")


if __name__ == "__main__":
    main()
