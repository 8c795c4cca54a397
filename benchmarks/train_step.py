r"""Times the training step of the embedded model: how many samples a second.

What limits it: ``scripts/train_mini.py --profile``.


    python benchmarks/train_step.py --batch 144 288 --mode default
    python benchmarks/train_step.py --batch 256 --mode eager

One sample is a support view and ``num_query`` query views. Data are noise: only time counts here.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from nvsadapter_guidance.model import NVSModel, NVSModelConfig
from nvsadapter_guidance.training.pretrain import Pretrainer, Pretraining, encode_banks
from nvsadapter_guidance.training.views import ViewBank

ROOT = Path(__file__).resolve().parent.parent
OBJECTS, VIEWS, SIZE = 32, 16, 128


def random_views(device: torch.device) -> ViewBank:
    """A bank of noise."""
    generator = torch.Generator().manual_seed(0)
    rgba = torch.randint(0, 256, (OBJECTS, VIEWS, SIZE, SIZE, 4), generator=generator).byte()
    azimuth = torch.rand(OBJECTS, VIEWS, generator=generator) * 360.0
    names = tuple(str(index) for index in range(OBJECTS))
    return ViewBank(rgba, azimuth, torch.zeros_like(azimuth), torch.full_like(azimuth, 1.5), names).to(device)


def measure(batch: int, mode: str, steps: int) -> dict[str, float | int | str]:
    """Seconds of the first step (with compilation) and milliseconds of the following ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = NVSModel(NVSModelConfig(**json.loads((ROOT / "configs/mini/model.json").read_text()))).to(device)
    config = Pretraining(batch_size=batch, copies=1, compile=mode != "eager", compile_mode=mode)
    trainer = Pretrainer(model, encode_banks(model, [random_views(device)], config), config)

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            loss = trainer.train_step()
        float(loss)
        return time.perf_counter() - start

    first = run(1)
    run(3)
    each = run(steps) / steps
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "device": name,
        "mode": mode,
        "batch": batch,
        "first_step_s": round(first, 1),
        "step_ms": round(1e3 * each, 1),
        "samples_per_s": round(batch / each),
        "peak_gb": round(peak, 1),
    }


def main() -> None:
    """Measure every batch size that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[144, 288])
    parser.add_argument("--mode", default="default", help="mode of torch.compile, or eager")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    for batch in arguments.batch:
        result = measure(batch, arguments.mode, arguments.steps)
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
