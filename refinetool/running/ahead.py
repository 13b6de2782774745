"""Work in threads, results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def map_ahead(work: Callable[[T], U], items: Iterable[T], *, threads: int, name: str) -> Generator[U, None, None]:
    """Map items on threads, a few ahead of who asks, in the order of the items.

    What `work` raises is raised where its result would have come. Closing the generator drops what has not begun.

    Args:
        name: How the threads are called.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
