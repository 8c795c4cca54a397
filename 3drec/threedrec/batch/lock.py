"""One batch at a time in one folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from threedrec.errors import InputError
from threedrec.files import write_error

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    try:
        file = (folder / NAME).open("a", encoding="ascii")
    except OSError as error:
        raise write_error(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another batch is at work here; wait for its end, or name another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
