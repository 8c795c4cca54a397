"""Results of a function's first run that its second run reads instead of computing them again."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor


class Tape:
    """What `remembered` returned in a first run, in order, for one second run of the same function."""

    def __init__(self) -> None:
        self._values: deque[Tensor] = deque()
        self._replays = False
        self.bytes = 0
        """Of the values recorded."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the code inside remembers."""
        with self._current(replays=False):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give it back, each value once.

        Raises:
            RuntimeError: the code inside remembered more or less than it did when it was recorded.
        """
        with self._current(replays=True):
            yield
        if self._values:
            raise RuntimeError("the second run of a function remembered less than the first one")

    def pass_on(self, make: Callable[[], Tensor]) -> Tensor:
        """The next value."""
        if self._replays:
            if not self._values:
                raise RuntimeError("the second run of a function remembered more than the first one")
            return self._values.popleft()
        value = make()
        self._values.append(value)
        self.bytes += value.numel() * value.element_size()
        return value

    @contextmanager
    def _current(self, replays: bool) -> Iterator[None]:
        self._replays = replays
        token = _TAPE.set(self)
        try:
            yield
        finally:
            _TAPE.reset(token)


_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


def remembered(make: Callable[[], Tensor]) -> Tensor:
    """``make()``; from the tape, where one replays. The value must carry no graph, and nobody may write to it."""
    tape = _TAPE.get()
    return make() if tape is None else tape.pass_on(make)
