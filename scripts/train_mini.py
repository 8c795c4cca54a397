r"""Train the embedded model from rendered views: autoencoder first, then UNet, adapter and image encoder together.

    python scripts/train_mini.py --views data/views/train.tar --validation data/views/val.tar \
        -o outputs/mini --seconds 900 --procedural 2048

``--meshes FOLDER`` renders views on the training device instead of reading them, other ones at every start.

On several GPUs: ``torchrun --nproc_per_node=2 scripts/train_mini.py ...``; the batch size is that of one of them.
There, the first process trains the autoencoder while the others render the procedural objects.

A run can be cut into pieces: give ``--resume`` with the ``state.pt`` of the piece before, and ``--total-seconds`` the
length of all pieces together, so that the learning rate knows when to fall.
"""

import argparse
import dataclasses
import json
import logging
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.profiler import profile

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, HALF_PRECISION, WEIGHTS_NAME, NVSModel, NVSModelConfig
from nvsadapter_guidance.quantise import dequantise_state_dict, quantise_state_dict
from nvsadapter_guidance.training.autoencoder import AutoencoderTraining, measure, train_autoencoder
from nvsadapter_guidance.training.colour_start import carry_colours
from nvsadapter_guidance.training.mesh_bank import render_bank
from nvsadapter_guidance.training.pretrain import Pretrainer, Pretraining, clock_of_first, encode_banks
from nvsadapter_guidance.training.procedural import render_procedural
from nvsadapter_guidance.training.validate import validate_views
from nvsadapter_guidance.training.views import ViewBank, composite, load_tar

log = logging.getLogger("train_mini")
ROOT = Path(__file__).resolve().parent.parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORST_COLOUR_ERROR = 0.4
"""A model never gets its colours more right than its autoencoder does, so above this the run ends early."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=Path, nargs="*", default=[], help="training views (.tar, one or several)")
    parser.add_argument("--meshes", type=Path, nargs="*", default=[], help="folders of meshes to render on the device")
    parser.add_argument("--views-per-mesh", type=int, default=40, help="of each of --meshes, a multiple of 5")
    parser.add_argument("--bent-meshes", type=Path, nargs="*", default=[], help="the same, bent into other shapes")
    parser.add_argument("--validation", type=Path, required=True, help="validation views (.tar)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for weights, state and metrics")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/mini/model.json", help="shape of the model")
    parser.add_argument("--autoencoder-seconds", type=float, help="default: 60, or 0 with --autoencoder-from")
    parser.add_argument("--autoencoder-from", type=Path, help="model folder whose autoencoder to start from")
    parser.add_argument("--autoencoder-only", action="store_true", help="train, save and show the autoencoder alone")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of this piece of training")
    parser.add_argument("--deadline", type=float, help="end training when the whole process is this old, in seconds")
    parser.add_argument("--total-seconds", type=float, help="length of all pieces together (default: --seconds)")
    parser.add_argument("--resume", type=Path, help="state.pt of the piece before")
    parser.add_argument("--start-from", type=Path, help="model folder whose weights to start from")
    parser.add_argument("--procedural", type=int, default=0, help="how many procedural objects to render and add")
    parser.add_argument("--profile", type=Path, help="where to write what the time of three steps goes into")
    parser.add_argument("--no-validation", action="store_true", help="skip the sampled views at the end")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="fields of Pretraining, e.g. lr=1e-3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def overrides(pairs: list[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs with JSON values."""
    return {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def shared_seed(device: torch.device) -> int:
    """The first process's clock, in seconds: the same in all processes of a run."""
    return int(clock_of_first(time.time(), device))


def procedural_bank(count: int, device: torch.device, seed: int) -> ViewBank:
    """Render procedural objects, other ones in every process."""
    start = time.perf_counter()
    # Compiling the tracer takes minutes, which so few objects do not earn back.
    bank = render_procedural(count, torch.Generator(device).manual_seed(seed + 1 + RANK), compiled=False)
    log.info("rendered %d procedural objects in %.1f s", count, time.perf_counter() - start)
    return bank


def mesh_banks(arguments: argparse.Namespace, device: torch.device) -> list[ViewBank]:
    """Views of meshes: read, or rendered here; then other ones in every process and at every time.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    banks = [load_tar(path).to(device) for path in arguments.views]
    seed = shared_seed(device) + RANK
    folders = [*product(arguments.meshes, [False]), *product(arguments.bent_meshes, [True])]
    for folder, bent in folders:
        start = time.perf_counter()
        banks.append(render_bank(folder, arguments.views_per_mesh, device, seed, bent=bent))
        log.info("rendered the meshes of %s in %.1f s", folder, time.perf_counter() - start)
    if not banks:
        raise InputError("nothing to train on: give --views (.tar), --meshes or --bent-meshes (folders)")
    return banks


def build_model(arguments: argparse.Namespace, device: torch.device) -> NVSModel:
    """A model to train, the same in every process: loaded, or fresh."""
    if arguments.start_from:
        return NVSModel.load(arguments.start_from).to(device)
    torch.manual_seed(0)
    return NVSModel(NVSModelConfig(**json.loads(arguments.config.read_text()))).to(device)


def load_autoencoder(model: NVSModel, folder: Path) -> None:
    """Take the autoencoder of a model folder, whatever else is in it."""
    wanted, found = (
        {k: v for k, v in config.items() if k != "scaling_factor"}
        for config in (model.config.vae, json.loads((folder / CONFIG_NAME).read_text())["vae"])
    )
    if wanted != found:
        raise InputError(f"{folder / CONFIG_NAME}: its autoencoder has another shape than --config asks for")
    packed = {k: v for k, v in load_file(folder / WEIGHTS_NAME).items() if k.startswith("vae.")}
    state = dequantise_state_dict(packed, str(folder / WEIGHTS_NAME))
    model.vae.load_state_dict({k.removeprefix("vae."): v for k, v in state.items()})


def train_or_load_autoencoder(
    arguments: argparse.Namespace, model: NVSModel, banks: list[ViewBank]
) -> dict[str, float]:
    """Bring the autoencoder to where the UNet can be trained on its latents; return its scores."""
    seconds = arguments.autoencoder_seconds
    if arguments.autoencoder_from:
        load_autoencoder(model, arguments.autoencoder_from)
        seconds = seconds or 0.0
    if seconds == 0.0:
        return measure(model.vae, banks[0], torch.Generator(model.device).manual_seed(0))
    if not arguments.autoencoder_from:
        carry_colours(model.vae)
    return train_autoencoder(model.vae, banks, AutoencoderTraining(seconds=60.0 if seconds is None else seconds))


def save_autoencoder(model: NVSModel, arguments: argparse.Namespace, scores: dict[str, float]) -> None:
    """Write a folder for ``--autoencoder-from``, its scores, and unseen views above their reconstructions.

    Raises:
        RuntimeError: the colours are too wrong to train a model on.
    """
    output = arguments.output / "autoencoder"
    output.mkdir(parents=True, exist_ok=True)
    model.config.vae["scaling_factor"] = model.vae.config.scaling_factor
    (output / CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(model.config), indent=1))
    state = {f"vae.{key}": value for key, value in model.vae.state_dict().items()}
    save_file(quantise_state_dict(state, half=HALF_PRECISION), output / WEIGHTS_NAME)
    (output / "autoencoder.json").write_text(json.dumps(scores, indent=1))
    views = composite(load_tar(arguments.validation).rgba[:16, 0].float() / 255).permute(0, 3, 1, 2).to(model.device)
    with torch.no_grad():
        rows = torch.cat([views, (model.decode(model.encode(views * 2 - 1)) + 1) / 2]).unflatten(0, (4, -1))
    sheet = rows[[0, 2, 1, 3]].permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((sheet * 255).round().byte().cpu().numpy()).save(output / "autoencoder.png")
    if scores["colour_error"] > WORST_COLOUR_ERROR:
        raise RuntimeError(f"the autoencoder's colours are {scores['colour_error']:.0%} wrong: train it for longer")


def share_autoencoder(model: NVSModel) -> None:
    """Give every process the first one's autoencoder."""
    if WORLD == 1:
        return
    for tensor in model.vae.state_dict().values():
        # Memory is sent as it lies, and processes may hold kernels in different memory formats.
        packed = tensor.contiguous()
        dist.broadcast(packed, 0)
        tensor.copy_(packed)
    scale = torch.tensor([model.vae.config.scaling_factor], device=model.device, dtype=torch.float64)
    dist.broadcast(scale, 0)
    model.vae.register_to_config(scaling_factor=float(scale))


def prepare_training(
    arguments: argparse.Namespace, device: torch.device, config: Pretraining, metrics: dict[str, Any]
) -> Pretrainer:
    """Load the views, train or load the autoencoder, encode everything, restore the state."""
    banks = mesh_banks(arguments, device)
    pooled = len(banks)
    model = build_model(arguments, device)
    if arguments.procedural and (RANK > 0 or WORLD == 1):
        banks.append(procedural_bank(arguments.procedural, device, config.seed))
        config.procedural_share *= WORLD / max(WORLD - 1, 1)
    if arguments.resume:
        state = torch.load(arguments.resume, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        model.vae.register_to_config(scaling_factor=state["scaling_factor"])
        config.seed += state["step"]
        metrics["autoencoder"] = state["autoencoder"]
    elif arguments.start_from:
        factor = model.vae.config.scaling_factor
        metrics["autoencoder"] = measure(model.vae, banks[0], torch.Generator(device).manual_seed(0))
        # The network knows latents of its own scale, whatever that of these views would be.
        metrics["autoencoder"]["scaling_factor"] = factor
        model.vae.register_to_config(scaling_factor=factor)
    else:
        if RANK == 0:
            metrics["autoencoder"] = train_or_load_autoencoder(arguments, model, banks)
            log.info("autoencoder: %s", metrics["autoencoder"])
            save_autoencoder(model, arguments, metrics["autoencoder"])
        share_autoencoder(model)
    config.seed += 1000 * RANK
    start = time.perf_counter()
    trainer = Pretrainer(model, encode_banks(model, banks, config, pooled), config)
    log.info("encoded the views in %.1f s", time.perf_counter() - start)
    if arguments.resume:
        trainer.load(state)
    return trainer


def profile_steps(trainer: Pretrainer, steps: int = 3) -> str:
    """Tables of what a step's time goes into, on the device and on the host."""
    trainer.train_step()
    with profile() as recorded:
        for _ in range(steps):
            float(trainer.train_step())
    tables = recorded.key_averages()
    return "\n".join(tables.table(sort_by=f"self_{where}_time_total", row_limit=30) for where in ("device", "cpu"))


def finish(arguments: argparse.Namespace, trainer: Pretrainer, metrics: dict[str, Any]) -> None:
    """Write the state, the averaged model, its scores and some of its views."""
    model = trainer.model
    torch.save(trainer.state() | {"autoencoder": metrics.get("autoencoder")}, arguments.output / "state.pt")
    trainer.swap_average()
    model.eval()
    model.save(arguments.output / "model")
    metrics |= {"config": dataclasses.asdict(trainer.config), "steps": trainer.step, "seconds": trainer.elapsed}
    metrics |= {"history": trainer.history, "procedural": arguments.procedural, "processes": WORLD}
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    if torch.cuda.is_available():
        metrics |= {"device": torch.cuda.get_device_name(), "peak_gb": torch.cuda.max_memory_allocated() / 2**30}
    metrics["torch"] = torch.__version__
    if not arguments.no_validation:
        scores, pictures = validate_views(model, load_tar(arguments.validation).to(model.device))
        log.info("validation: %s", scores)
        metrics["scores"] = dataclasses.asdict(scores)
        torch.save((pictures * 255).round().byte().cpu(), arguments.output / "views.pt")
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=1))


def main() -> None:
    """Run one piece of training, validate, and write ``model/``, ``state.pt``, ``metrics.json`` and ``views.pt``."""
    began = time.perf_counter()
    arguments = parse_arguments()
    level = logging.INFO if RANK == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    cuda = arguments.device == "cuda"
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    arguments.output.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    if arguments.autoencoder_only:
        model = build_model(arguments, device)
        scores = train_or_load_autoencoder(arguments, model, mesh_banks(arguments, device))
        log.info("autoencoder: %s", scores)
        save_autoencoder(model, arguments, scores)
        return
    # A piece that goes on from another's weights has to see other augmentations, so seeds differ unless one is set.
    values = {"seed": shared_seed(device)} | overrides(arguments.set)
    total = arguments.total_seconds or arguments.seconds
    config = Pretraining(seconds=arguments.seconds, total_seconds=total, **values)
    trainer = prepare_training(arguments, device, config, metrics)
    start = time.perf_counter()
    trainer.train_step()
    log.info("first step, with compilation, in %.1f s", time.perf_counter() - start)
    if arguments.profile:
        # Every process takes part, or the first would wait for the others' gradients.
        report = profile_steps(trainer)
        if RANK == 0:
            arguments.profile.write_text(report)
    seconds = config.seconds
    if arguments.deadline:
        seconds = min(seconds, arguments.deadline - clock_of_first(time.perf_counter() - began, device))
        if arguments.total_seconds is None:
            config.total_seconds = trainer.elapsed + seconds
    trainer.run(seconds)
    log.info("%d steps in %.0f s", trainer.step, trainer.elapsed)
    if RANK == 0:
        finish(arguments, trainer, metrics)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
