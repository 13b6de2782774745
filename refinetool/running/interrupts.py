"""Handles Ctrl-C: the first lets a run stop without losing work, the second kills it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LOG = logging.getLogger(__name__)


@contextmanager
def stop_on_interrupt(*, after: str) -> Iterator[threading.Event]:
    """Let Ctrl-C set the yielded event instead of raising; a second Ctrl-C kills the process at once.

    This works only in the main thread, and only where Ctrl-C is not ignored. Elsewhere the event is never set.

    Args:
        after: What the run still waits for, for the message of the first Ctrl-C: "the model has answered".
    """
    stop = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield stop
        return

    def first(_signal: int, _frame: FrameType | None) -> None:
        stop.set()
        _LOG.warning("stopping as soon as %s; Ctrl-C again stops at once", after)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
