"""The launch.py of the repository's root, for people who work in this folder."""

import sys
from pathlib import Path

# A checkout works without being installed: the guidance package lies in the repository's root.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from threedrec.cli import launch_main

if __name__ == "__main__":
    sys.exit(launch_main())
