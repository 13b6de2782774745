"""Work in threads, results in order."""

import threading
import time
from contextlib import closing

import pytest

from refinetool.running.ahead import map_ahead


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_not_much_ahead(threads: int) -> None:
    started = 0

    def work(item: int) -> int:
        nonlocal started
        started += 1
        time.sleep(0.001 * (item % 3))
        return item * item

    results = map_ahead(work, range(50), threads=threads, name="work")
    assert next(results) == 0
    assert started <= 2 * threads + 1
    assert list(results) == [item * item for item in range(1, 50)]


def test_an_error_comes_where_the_result_would_have() -> None:
    def work(item: int) -> float:
        return 1 / (3 - item)

    results = map_ahead(work, range(10), threads=2, name="work")
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_drops_what_has_not_begun() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            gate.wait(5)
        return item

    with closing(map_ahead(work, range(100), threads=1, name="work")) as results:
        assert next(results) == 0
        gate.set()
    assert len(begun) <= 3
