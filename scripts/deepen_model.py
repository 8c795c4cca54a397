"""Make a deeper model that predicts what a model predicts, to train a larger teacher from there.

python scripts/deepen_model.py nvsadapter_guidance/pretrained/mini -o outputs/deeper
python scripts/train_mini.py --start-from outputs/deeper ...
"""

import argparse
from pathlib import Path

import torch

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.training.growth import deepen


def main() -> None:
    """Write the deeper model as a folder of the same kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder (config.json and model.safetensors)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the new layers (default 0)")
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed {arguments.seed}: must be 0 or more and fit into 63 bits")
    try:
        torch.manual_seed(arguments.seed)
        deepen(NVSModel.load(arguments.model)).save(arguments.output)
    except (InputError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
