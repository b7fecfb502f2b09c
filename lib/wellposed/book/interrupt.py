"""Ctrl-C that nobody can lose.

Python raises ``KeyboardInterrupt`` wherever the program happens to be. If that is in a library's
callback, or in an import behind a bare ``except``, the exception is dropped and the run goes on as
if nobody had asked it to stop. So the signal is also remembered, and a run asks for it between
cells and before it keeps its record.
"""

import signal
from types import FrameType

_asked = False


def listen() -> None:
    """From now on remember Ctrl-C, and take being asked to end (SIGTERM) for the same."""
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _remember)
    signal.signal(signal.SIGTERM, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def heed() -> None:
    """Raise ``KeyboardInterrupt`` if one was asked for since :func:`listen`, lost or not."""
    if _asked:
        raise KeyboardInterrupt
