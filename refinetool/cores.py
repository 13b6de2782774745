"""How many cores a process uses, and how its threads wait. Imports neither torch nor OpenCV until it has to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_passively() -> None:
    """Let the threads of torch wait without using a core; to be called before torch is imported.

    By default they wait for each other in busy loops, so that several processes on the same cores, each with a thread
    per core, slow each other down more than tenfold.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_threads(count: int) -> None:
    """Let torch and OpenCV use this many threads per call, in this process.

    By default, each uses one per core. Calls side by side, in this process or in others, would then get in each other's
    way: a thread that has finished its part waits busily for the others, which have no core to run on.
    """
    import cv2
    import torch

    torch.set_num_threads(count)
    cv2.setNumThreads(count)


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Use this many threads per call within the context; see `use_threads`."""
    import torch

    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)
