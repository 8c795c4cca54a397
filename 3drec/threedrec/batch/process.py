"""The parent's end of a local worker: start it, talk to it, see how it ended."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from threedrec.batch.task import Task

_TAIL = 4000


class Process:
    """One worker process, in a session of its own so that Ctrl-C in the terminal does not reach it."""

    def __init__(self, function: str, log: Path, variables: Mapping[str, str] | None = None) -> None:
        """Start a worker.

        Args:
            function: what it does with tasks, ``module:function``.
            log: file that what it says is added to.
            variables: of its environment, beside those of this process.
        """
        self.connection, theirs = Pipe()
        self.log = log
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
        handle = str(theirs.fileno())
        with log.open("ab") as said:
            self._said_before = said.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "threedrec.batch.worker", handle, function],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
        theirs.close()

    def send(self, task: Task) -> None:
        """Give it a task; a worker that has just died is noticed by ``receive``."""
        with contextlib.suppress(OSError):
            self._said_before = self.log.stat().st_size
            self.connection.send(("task", task))

    def stop(self) -> None:
        """Ask it to checkpoint its task."""
        with contextlib.suppress(OSError):
            self.connection.send(("stop",))

    def receive(self) -> list[tuple[Any, ...]]:
        """Return the messages that have come.

        Raises:
            EOFError: it has ended, and all that it said was received before.
        """
        messages = []
        try:
            while self.connection.poll():
                messages.append(self.connection.recv())
        except OSError as error:
            if not messages:
                raise EOFError from error
        except EOFError:
            if not messages:
                raise
        return messages

    def memory_gb(self) -> float:
        """Resident memory in GB (Linux; 0 elsewhere)."""
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
        return 0.0

    def kill(self) -> None:
        """End it and whatever it has started, now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def ending(self) -> tuple[str, str]:
        """Return the kind and the description of an end that nobody asked for."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
            return "crash", "the worker stopped answering"
        self.connection.close()
        if code == -signal.SIGKILL:
            return "memory", "the system killed the worker, most likely for lack of memory"
        if code < 0:
            name = signal.Signals(-code).name
            return "crash", f"the worker crashed ({name}); the end of {self.log} says where"
        words = self._last_words()
        return "crash", f"the worker ended with code {code}{f': {words}' if words else ''}"

    def _last_words(self) -> str:
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(self._said_before, file.tell() - _TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
            return lines[-1].strip() if lines else ""
        return ""
