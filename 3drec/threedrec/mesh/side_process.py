"""Shapes made in a process of their own, while the one that asked for them goes on.

The process imports no PyTorch, so that it is there in a fraction of a second and takes no GPU memory. Samples and
shapes go to and fro as files of arrays in a temporary folder; its standard input only says when to begin.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from threedrec.errors import InputError
from threedrec.mesh.isosurface import Grid, Samples
from threedrec.mesh.shape import Shape, ShapeOptions, make_shape
from threedrec.mesh.types import Mesh
from threedrec.mesh.unwrap import Atlas

logger = logging.getLogger(__name__)

_SAMPLES, _SHAPE, _ANSWER, _ERRORS = "samples.npz", "shape.npz", "answer.json", "errors.txt"


class SideProcess:
    """One process for one shape; a context that ends it."""

    def __init__(self) -> None:
        """Start the process; it waits for samples."""
        self._folder = tempfile.TemporaryDirectory(prefix="3drec-mesh-")
        with (Path(self._folder.name) / _ERRORS).open("wb") as errors:
            # A session of its own: an interrupt in the terminal is this process's to handle, which then ends that one.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "threedrec.mesh.side_process", self._folder.name],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def __enter__(self) -> "SideProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def begin(self, samples: Samples, options: ShapeOptions) -> None:
        """Hand over the samples; returns at once."""
        folder = Path(self._folder.name)
        grid = samples.grid
        origin = {"spacing": grid.spacing, "radius": samples.radius, "reaches_sphere": samples.reaches_sphere}
        np.savez(folder / _SAMPLES, density=samples.density, lower=grid.lower)
        request = json.dumps({"samples": origin, "options": asdict(options)})
        # A process that is gone is told of where its shape is asked for.
        with contextlib.suppress(BrokenPipeError), self._input() as stream:
            stream.write(request.encode())

    def shape(self) -> Shape:
        """Wait for the shape.

        Raises:
            InputError: the field is empty.
            RuntimeError: the process failed.
        """
        code = self._process.wait()
        folder = Path(self._folder.name)
        if code != 0 or not (folder / _ANSWER).is_file():
            said = (folder / _ERRORS).read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"the process that makes the mesh ended with {code}: {said[-1] if said else 'no word'}")
        answer = json.loads((folder / _ANSWER).read_text(encoding="utf-8"))
        for name, level, text in answer["log"]:
            logging.getLogger(name).log(level, "%s", text)
        if "error" in answer:
            raise InputError(answer["error"])
        with np.load(folder / _SHAPE) as found:
            mesh = Mesh(found["vertices"], found["faces"])
            atlas = Atlas(found["original"], found["atlas_faces"], found["uv"]) if "uv" in found else None
        self.close()
        return Shape(mesh, atlas, answer["threshold"], answer["seconds"])

    def close(self) -> None:
        """End the process if it is still there, and remove its files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._input().close()
        self._folder.cleanup()

    def _input(self) -> IO[bytes]:
        if self._process.stdin is None:
            raise RuntimeError("the process was started without an input")
        return self._process.stdin


class _Kept(logging.Handler):
    """Keeps what was logged, for the other process to log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))


def _answer(folder: Path, request: dict[str, Any]) -> dict[str, object]:
    """Make the shape and write its arrays; return the rest."""
    origin = request["samples"]
    with np.load(folder / _SAMPLES) as found:
        density, lower = found["density"], found["lower"]
    nx, ny, nz = density.shape
    grid = Grid(lower, origin["spacing"], (nx, ny, nz))
    samples = Samples(grid, density, origin["radius"], origin["reaches_sphere"])
    try:
        shape = make_shape(samples, ShapeOptions(**request["options"]))
    except InputError as error:
        return {"error": str(error)}
    arrays: dict[str, Any] = {"vertices": shape.mesh.vertices, "faces": shape.mesh.faces}
    if shape.atlas is not None:
        arrays |= {"original": shape.atlas.original, "atlas_faces": shape.atlas.faces, "uv": shape.atlas.uv}
    np.savez(folder / _SHAPE, **arrays)
    return {"threshold": shape.threshold, "seconds": shape.seconds}


def main() -> None:
    """Answer one request; an end of the input without one is the end."""
    folder, text = Path(sys.argv[1]), sys.stdin.read()
    if not text:
        return
    kept = _Kept()
    logging.getLogger().addHandler(kept)
    answer = _answer(folder, json.loads(text))
    (folder / _ANSWER).write_text(json.dumps(answer | {"log": kept.lines}), encoding="utf-8")


if __name__ == "__main__":
    main()
