"""python launch.py --config configs/nvsadapter.yaml --train data.image_path=IMG [key=value …]; see --help."""

import sys
from pathlib import Path

# A checkout works without being installed: the reconstruction package lies under 3drec/.
sys.path.insert(1, str(Path(__file__).resolve().parent / "3drec"))

from threedrec.cli import launch_main

if __name__ == "__main__":
    sys.exit(launch_main())
