"""Score a model folder on validation views: PSNR, silhouette IoU, whether views turn the right way.

python scripts/validate_mini.py --validation data/views/val.tar
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from nvsadapter_guidance.model import MINI_MODEL, NVSModel
from nvsadapter_guidance.training.validate import validate_views
from nvsadapter_guidance.training.views import load_tar


def main() -> None:
    """Print the scores as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MINI_MODEL, help="model folder (default: the embedded model)")
    parser.add_argument("--validation", type=Path, required=True, help="validation views (.tar)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only so many objects")
    parser.add_argument("--pictures", type=Path, help="where to keep the sampled views (.pt)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = NVSModel.load(arguments.model).to(device)
    bank = load_tar(arguments.validation).to(device)
    if arguments.limit:
        bank = bank.first(arguments.limit)
    scores, pictures = validate_views(model, bank, arguments.steps, arguments.guidance_scale, arguments.seed)
    sys.stdout.write(json.dumps(dataclasses.asdict(scores), indent=1) + "\n")
    if arguments.pictures:
        torch.save((pictures * 255).round().byte().cpu(), arguments.pictures)


if __name__ == "__main__":
    main()
