"""Average the weights of model folders that come from one training ("model soup").

python scripts/average_models.py RUN_A/model RUN_B/model RUN_C/model -o outputs/soup
python scripts/average_models.py RUN_A/model RUN_B/model --shares 0.7 0.3 -o outputs/soup
"""

import argparse
from pathlib import Path

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.training.soup import average_models


def main() -> None:
    """Write the average of the folders as a folder of the same kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="model folders (config.json and model.safetensors)")
    parser.add_argument("--shares", type=float, nargs="+", help="weight of each (default: equal)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        average_models(arguments.models, arguments.shares).save(arguments.output)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
