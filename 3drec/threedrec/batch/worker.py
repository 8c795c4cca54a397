"""The program of a local worker: ``python -m threedrec.batch.worker SOCKET FUNCTION``, started by `process.Process`.

Messages are pickled tuples. In: ``("task", Task)``, ``("stop",)``. Out: ``("ready",)``, ``("progress", stage, done,
total)``, ``("outcome", Outcome)``. The end of the socket is the end of the worker.
"""

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Serve tasks until the other end hangs up."""
    handle, function, *_ = sys.argv[1:]
    faulthandler.enable()
    # Interruptions are the batch's affair, which then asks for a checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    _be_first_to_go()
    connection, sending = Connection(int(handle)), threading.Lock()

    def send(*message: Any) -> None:
        with sending, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(message)

    from threedrec.batch.hosting import WarmHost, task_function
    from threedrec.batch.options import RECONSTRUCT
    from threedrec.terminal import setup_logging

    setup_logging()
    host = WarmHost(
        task_function(function),
        lambda stage, done, total: send("progress", stage, done, total),
        read_ahead=function == RECONSTRUCT,
    )
    _choose_threads()
    tasks: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, host, tasks), daemon=True).start()
    send("ready")
    while (task := tasks.get()) is not None:
        send("outcome", host.work(task))


def _listen(connection: Connection, host: Any, tasks: "queue.Queue[Any]") -> None:
    """Take messages while the main thread works."""
    try:
        while True:
            kind, *content = connection.recv()
            if kind == "stop":
                host.stop()
            else:
                tasks.put(content[0])
    except (EOFError, OSError):
        # The batch has gone: nobody would read what comes out.
        os._exit(0)


def _choose_threads() -> None:
    import torch

    if not torch.cuda.is_available():
        from threedrec.threads import choose_threads

        choose_threads()


def _end_with_parent() -> None:
    """A batch that is killed takes its workers along (Linux), so that a resumed one meets no writer of the old."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(0)


def _be_first_to_go() -> None:
    """When memory runs out, the kernel is to take the worker, not the batch."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


if __name__ == "__main__":
    main()
