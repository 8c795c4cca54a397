"""Work that a GPU does beside other work, so that the host need not wait for that one too."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """Gives a device work that follows what it had been given at :meth:`mark`, not what it was given since.

    Tensors that are made beside may be used as any others until the next mark: nothing beside begins before the work
    that was given up to then is done, so no memory changes hands too early. On a CPU everything is done in its turn.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare a stream that goes first where both have work that is ready."""
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._marked = torch.cuda.Event() if device.type == "cuda" else None

    def mark(self) -> None:
        """What is done beside from now on needs what the device has been given, and nothing later."""
        if self._marked is not None:
            self._marked.record(torch.cuda.current_stream(self._device))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Do the work of this block beside; what comes after the block needs it."""
        if self._stream is None or self._marked is None:
            yield
            return
        self._stream.wait_event(self._marked)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
