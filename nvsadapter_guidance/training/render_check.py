"""Whether meshes can be rendered on this machine, found out before work begins."""

import importlib.util
import os
import subprocess
import sys

from nvsadapter_guidance.errors import InputError

_PROBE = """
from nvsadapter_guidance.training.render_meshes import MeshRenderer
MeshRenderer(size=8, supersample=1).render(0.0, 0.0)
"""


def check_rendering() -> None:
    """Draw an empty view in a process of its own: without the libraries that VTK draws with, it ends the process.

    Raises:
        InputError: VTK or a software renderer is missing; says how to install it.
    """
    if importlib.util.find_spec("vtk") is None:
        raise InputError("rendering meshes needs VTK, which is not installed: pip install -e '.[render]'")
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, env=_environment())
    if probe.returncode:
        raise InputError(
            "rendering meshes: VTK finds no library to draw with, neither EGL nor OSMesa; on Debian or Ubuntu: "
            "apt install libegl1 libgl1-mesa-dri"
        )


def _environment() -> dict[str, str]:
    """The environment of this process, with its places to import from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
