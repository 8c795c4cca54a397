"""Jobs done beside the run: in order, few at a time, and no error is lost."""

import threading

import pytest

from threedrec.background_writer import BackgroundWriter


def fail() -> None:
    raise OSError("no room")


@pytest.fixture
def gate():
    opened = threading.Event()
    yield opened
    opened.set()


def test_jobs_are_done_in_order_and_by_the_end_of_the_context(gate):
    done: list[int] = []
    writer = BackgroundWriter(unfinished=6)
    with writer:
        writer.submit(gate.wait)
        for number in range(5):
            writer.submit(lambda number=number: done.append(number))
        assert done == []
        gate.set()
    assert done == [0, 1, 2, 3, 4]
    with writer:  # again
        writer.submit(lambda: done.append(5))
    assert done[-1] == 5


def test_who_gives_too_many_jobs_waits(gate):
    writer = BackgroundWriter(unfinished=2)
    writer.submit(gate.wait)
    writer.submit(gate.wait)
    giver = threading.Thread(target=writer.submit, args=(gate.wait,))
    giver.start()
    giver.join(0.1)
    assert giver.is_alive()
    gate.set()
    giver.join(10)
    assert not giver.is_alive()
    writer.finish()


def test_an_error_is_raised_at_the_next_job_and_takes_along_those_behind_it(gate):
    done: list[int] = []
    writer = BackgroundWriter(unfinished=3)
    writer.submit(gate.wait)
    writer.submit(fail)
    writer.submit(lambda: done.append(1))
    gate.set()
    with pytest.raises(OSError, match="no room"):  # noqa: PT012 - the second at the latest, where it has to wait
        for _ in range(3):
            writer.submit(lambda: done.append(2))
    writer.finish()
    assert done == []


def test_an_error_is_raised_at_the_end():
    writer = BackgroundWriter()
    with pytest.raises(OSError, match="no room"), writer:
        writer.submit(fail)
    writer.submit(fail)
    with pytest.raises(OSError, match="no room"):
        writer.finish()
    writer.finish()


def test_the_error_that_ends_a_run_is_not_replaced(caplog):
    writer, done = BackgroundWriter(), []
    with pytest.raises(KeyError), writer:
        writer.submit(lambda: done.append(1))
        writer.submit(fail)
        raise KeyError
    assert done == [1] and "no room" in caplog.text
