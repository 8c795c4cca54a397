"""Videos of frames that are still being made: H.264 by ffmpeg, or a GIF where there is none."""

import errno
import logging
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from threedrec.files import atomic_path

logger = logging.getLogger(__name__)

Picture = UInt8[np.ndarray, "H W 3"]

_WAITING = 16
"""Frames that may wait for the encoder."""


def write_video(pictures: Iterable[Picture], path: str | os.PathLike[str], fps: int = 24) -> Path:
    """Write a video of pictures of one size.

    H.264 in yuv420p, which every player and browser shows. Without a working ffmpeg a ``.gif`` is written instead,
    and a warning says so.

    Returns:
        The file written.

    Raises:
        InputError: the file cannot be written.
    """
    path, even = Path(path), (_even(picture) for picture in pictures)
    problem = _ffmpeg_problem()
    if problem is None:
        with atomic_path(path) as temporary:
            _encode(even, temporary, fps)
        return path
    logger.warning("%s: ffmpeg is not usable (%s), so a .gif is written instead.", path, problem)
    path = path.with_suffix(".gif")
    images = [Image.fromarray(picture).quantize(128) for picture in even]
    with atomic_path(path) as temporary:
        images[0].save(temporary, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return path


class BackgroundVideo:
    """`write_video` in a thread of its own, so that frames are encoded while the next ones are rendered.

    A context: its end waits for the file, and raises what `write_video` raised. An error inside it leaves no file.
    """

    def __init__(self, path: str | os.PathLike[str], fps: int = 24) -> None:
        """Write to ``path``."""
        self._queue: queue.Queue[Picture | None] = queue.Queue(_WAITING)
        self._aborted = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(path, fps), name="video", daemon=True)

    def __enter__(self) -> "BackgroundVideo":
        self._thread.start()
        return self

    def add(self, pictures: UInt8[np.ndarray, "T H W 3"]) -> None:
        """Append frames; waits when the encoder is far behind."""
        for picture in pictures:
            self._put(picture)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._aborted = kind is not None
        self._put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _put(self, picture: Picture | None) -> None:
        while self._thread.is_alive():
            try:
                self._queue.put(picture, timeout=0.5)
            except queue.Full:
                continue
            return

    def _work(self, path: str | os.PathLike[str], fps: int) -> None:
        try:
            write_video(self._frames(), path, fps)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the frames come from
            self._error = error

    def _frames(self) -> Iterator[Picture]:
        while (picture := self._queue.get()) is not None:
            yield picture
        if self._aborted:
            raise InterruptedError("the frames ended early")


def _even(picture: Picture) -> Picture:
    # yuv420p stores colour at half the size, hence even sides.
    return np.pad(picture, [(0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)], mode="edge")


def _ffmpeg_problem() -> str | None:
    """Why ffmpeg cannot be used, or None where it can."""
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def _encode(pictures: Iterable[Picture], path: Path, fps: int) -> None:
    import imageio.v2 as imageio
    import imageio_ffmpeg

    count = size = 0
    try:
        writer: Any = imageio.get_writer(
            path,
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=1,
            quality=None,
            # Half the processor time of the usual preset; the mesh is being made meanwhile.
            output_params=["-movflags", "+faststart", "-crf", "20", "-preset", "veryfast"],
        )
        with writer:
            for picture in pictures:
                writer.append_data(picture)
                count, size = count + 1, size + picture.nbytes
        # ffmpeg runs in a process of its own, and its failure at the end of a file goes unnoticed.
        written = imageio_ffmpeg.count_frames_and_secs(path)[0] if path.exists() else 0
    except (OSError, RuntimeError) as error:
        told = isinstance(error, OSError) and error.errno not in (None, errno.EPIPE)
        if told or isinstance(error, InterruptedError):
            raise
        written = -1
    if written != count:
        full = shutil.disk_usage(path.parent).free < size
        raise OSError(errno.ENOSPC if full else errno.EIO, "ffmpeg did not finish the video")
