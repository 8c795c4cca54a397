"""What a worker keeps between tasks: the loaded guidance, the image read ahead, the wish to stop."""

import importlib
import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from threedrec.batch.task import FAILED, INTERRUPTED, Outcome, Task, kind_of, one_line
from threedrec.errors import InputError
from threedrec.host import Host, Interrupted
from threedrec.image import SupportView

logger = logging.getLogger(__name__)

TaskFunction = Callable[[Task, Host], Outcome]


def task_function(name: str) -> TaskFunction:
    """Return the function called ``module:function``.

    Raises:
        InputError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}: cannot be imported ({error}); give module:function") from error


class WarmHost:
    """Serves one task after another, and reads the next one's image while the device works on this one's."""

    def __init__(
        self, function: TaskFunction, on_progress: Callable[[str, int, int], None], read_ahead: bool = True
    ) -> None:
        """Serve tasks by ``function``; ``read_ahead`` only where it takes ``host.support``."""
        self._function, self._reads_ahead = function, read_ahead
        self._stop = threading.Event()
        self._host = Host(stop=self._stop.is_set, progress=on_progress)
        self._ahead: _ReadAhead | None = None

    def stop(self) -> None:
        """Ask the task under way, and any after it, to end with a checkpoint."""
        self._stop.set()

    def work(self, task: Task) -> Outcome:
        """Do a task; whatever it raises becomes an outcome."""
        support = None
        if self._ahead is not None and self._ahead.image == task.image:
            support = self._ahead.result()
        self._ahead = _ReadAhead(task) if task.next_image and self._reads_ahead else None
        try:
            return self._function(task, replace(self._host, support=support))
        except Interrupted:
            return Outcome(INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - of a task function that does not keep its promise
            return Outcome(FAILED, error=one_line(error), kind=kind_of(error))


class _ReadAhead:
    """Reads one image in a thread. A failure is nobody's yet: the task will meet it again in its own turn."""

    def __init__(self, task: Task) -> None:
        self.image = task.next_image
        self._task = task
        self._view: SupportView | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def result(self) -> SupportView | None:
        """The image, or None when it could not be read."""
        self._thread.join()
        return self._view

    def _read(self) -> None:
        from threedrec.config import load_config
        from threedrec.image import load_support_view
        from threedrec.reconstruct import SUPPORT_SIZE

        try:
            config = load_config(self._task.config, values={"data": {"image_path": self.image}})
            self._view = load_support_view(config.data, SUPPORT_SIZE)
        except Exception as error:  # noqa: BLE001
            logger.debug("%s: not read ahead: %s", self.image, error)
