"""What the commands say in the terminal: log lines on stderr, and one line for each kind of ending."""

import argparse
import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

from threedrec.errors import InputError

EXIT_OK, EXIT_BUG, EXIT_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

_PACKAGES = ("threedrec", "nvsadapter_guidance")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG}
"""Failures to write or read that the user can mend."""

_OUT_OF_MEMORY = "out of GPU memory: lower data.random_camera.batch_size or height, or take recipe=mini-gpu"


def add_message_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--verbose`` and ``--debug``, which every command has."""
    parser.add_argument("--verbose", action="store_true", help="show debug lines and warnings of libraries")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake too")


def setup_logging(verbose: bool = False) -> None:
    """Send the log of both packages to stderr; ``verbose`` shows debug lines too."""
    handler = _terminal_handler(verbose) if sys.stderr.isatty() else _plain_handler()
    for name in _PACKAGES:
        package = logging.getLogger(name)
        package.handlers = [handler]
        package.setLevel(logging.DEBUG if verbose else logging.INFO)
        package.propagate = False
    logging.captureWarnings(True)
    # Warnings of libraries say little to somebody who wants a mesh.
    logging.getLogger("py.warnings").addHandler(handler if verbose else logging.NullHandler())


def _terminal_handler(verbose: bool) -> logging.Handler:
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=verbose, log_time_format="%H:%M:%S")
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def _plain_handler() -> logging.Handler:
    """One log line is one line of the file that stderr goes to; ``rich`` would wrap it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    return handler


def say_error(message: str) -> None:
    """Write ``error: …`` to stderr, as the last line."""
    sys.stderr.write(f"error: {message}\n")


def guarded(command: Callable[[], None], debug: bool = False, resume_hint: str = "") -> int:
    """Run ``command`` and return the exit code that its ending deserves.

    A user's mistake gives one line and 2, an interruption 130 and how to go on, anything else a traceback and 1.
    ``debug`` shows the traceback of a user's mistake too.
    """
    try:
        command()
    except InputError as error:
        return _input_error(str(error), debug)
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted{f'; {resume_hint}' if resume_hint else ''}\n")
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in _PACKAGES:
            return _bug()
        return _input_error(
            f"the package '{error.name}' is not installed; in the checkout run `make setup`, or pip install -e .", debug
        )
    except OSError as error:
        if error.errno in DISK_ERRORS:
            return _input_error(f"{error.filename or 'output'}: {error.strerror}", debug)
        return _bug()
    except Exception as error:  # noqa: BLE001 - the last line of defence
        return _input_error(_OUT_OF_MEMORY, debug) if _out_of_gpu_memory(error) else _bug()
    return EXIT_OK


def command_line(arguments: Sequence[str]) -> str:
    """Return a command as a shell would take it; a script is started by ``python``, which ``sys.argv`` leaves out."""
    words = [os.fspath(argument) for argument in arguments]
    return shlex.join(["python", *words] if words and words[0].endswith(".py") else words)


def _out_of_gpu_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported for this: an error of torch's comes from a torch that is there
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


def _input_error(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say_error(message)
    return EXIT_INPUT


def _bug() -> int:
    traceback.print_exc()
    say_error("unexpected; this is a fault of the program. Please report the lines above with the command that was run")
    return EXIT_BUG
