"""Maps items on threads and yields the results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def map_ahead(work: Callable[[T], U], items: Iterable[T], *, threads: int, name: str) -> Generator[U, None, None]:
    """Map items on threads, a few ahead of the consumer, in the order of the items.

    An exception in `work` is raised in place of its result. Closing the generator drops items that have not started.

    Args:
        name: Prefix of the names of the threads.
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
