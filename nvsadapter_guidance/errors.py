"""The one exception that a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what is wrong, where (file or key) and what to do. Commands print it
    as ``error: <message>`` on stderr and exit with code 2; library callers catch it like any ``ValueError``.
    """


def one_line(error: BaseException) -> str:
    """What an exception of another library says, short and without line breaks, for use in a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
