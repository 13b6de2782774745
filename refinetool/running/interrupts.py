"""Ctrl-C: the first asks a run to stop where nothing is lost, the second kills it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LOG = logging.getLogger(__name__)


@contextmanager
def stop_on_interrupt(*, after: str) -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising; a second one kills at once.

    Only in the main thread, and only where Ctrl-C is not ignored: elsewhere the event is never set.

    Args:
        after: What is still waited for, for the sentence that the first Ctrl-C logs: "the model has answered".
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
