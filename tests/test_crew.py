"""Sharing items out among workers: every item gets one result, in order, whatever dies, and nobody is left waiting."""

import heapq
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinetool.errors import RefinetoolError
from refinetool.running.crew import (
    LARGEST_UNIT,
    UNITS_AHEAD,
    WINDOW,
    Died,
    Done,
    Event,
    Ready,
    share_out,
    unit_size,
)

START = 5.0


@dataclass(order=True)
class Happening:
    at: float
    number: int
    event: Event[int] = field(compare=False)


@dataclass
class FakeCrew:
    """Workers in a virtual time: an item takes `seconds`; poison kills whoever works on it; results are squares.

    A worker does one unit after the other, and dies with everything that it has.
    """

    workers: int
    poison: frozenset[int] = frozenset()
    seconds: dict[int, float] = field(default_factory=dict)
    usual: float = 1.0
    now: float = 0.0
    happenings: list[Happening] = field(default_factory=list)
    queues: dict[int, list[tuple[int, Sequence[int]]]] = field(default_factory=lambda: defaultdict(list))
    free_at: dict[int, float] = field(default_factory=dict)
    killers: dict[int, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    returns: bool = True
    """Whether dead workers are started again."""
    counter: int = 0
    busy: float = 0.0
    largest_queue: int = 0
    handed: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for worker in range(self.workers):
            self.later(START, Ready(worker))

    def later(self, at: float, event: Event[int]) -> None:
        self.counter += 1
        heapq.heappush(self.happenings, Happening(at, self.counter, event))

    def hand(self, worker: int, ticket: int, items: Sequence[int]) -> None:
        assert worker in self.free_at, "only workers that are ready are handed units"
        self.handed.append(tuple(items))
        self.queues[worker].append((ticket, items))
        self.largest_queue = max(self.largest_queue, len(self.queues[worker]))
        if len(self.queues[worker]) == 1:
            self.begin(worker)

    def begin(self, worker: int) -> None:
        ticket, items = self.queues[worker][0]
        start = max(self.now, self.free_at[worker])
        takes = sum(self.seconds.get(item, self.usual) for item in items)
        self.free_at[worker] = start + takes
        self.busy += takes
        if self.poison & set(items):
            self.later(start + takes, Died(worker, f"by {self.poison & set(items)}"))
        else:
            self.later(start + takes, Done(worker, ticket, [item * item for item in items]))

    def wait(self) -> Event[int] | None:
        if not self.happenings:
            raise RefinetoolError("no worker is left")
        happening = heapq.heappop(self.happenings)
        self.now = happening.at
        match happening.event:
            case Ready(worker):
                self.free_at[worker] = self.now
            case Done(worker, ticket, _):
                assert self.queues[worker].pop(0)[0] == ticket
                if self.queues[worker]:
                    self.begin(worker)
            case Died(worker, _):
                self.killers[worker].append(tuple(self.queues[worker][0][1]))
                del self.queues[worker], self.free_at[worker]
                if self.returns:
                    self.later(self.now + START, Ready(worker))
        return happening.event


def shared(items: Sequence[int], crew: FakeCrew, *, size: int) -> list[int]:
    """Results in the order in which they come; an item that is given up is minus itself."""
    found = share_out(items, crew, size=size, workers=crew.workers, give_up=lambda item, _: -item)
    return [result for _, result in found]


@given(
    count=st.integers(0, 60),
    workers=st.integers(1, 5),
    size=st.integers(1, 9),
    poison=st.sets(st.integers(1, 60), max_size=5),
    slow=st.dictionaries(st.integers(0, 60), st.floats(0.1, 300), max_size=8),
)
def test_every_item_gets_its_result_in_order(
    count: int, workers: int, size: int, poison: set[int], slow: dict[int, float]
) -> None:
    crew = FakeCrew(workers, frozenset(poison), slow)
    assert shared(range(count), crew, size=size) == [-n if n in poison else n * n for n in range(count)]
    assert crew.largest_queue <= UNITS_AHEAD


def test_an_item_dies_alone_and_only_twice() -> None:
    crew = FakeCrew(2, poison=frozenset({13}))
    shared(range(40), crew, size=8)
    deaths = [unit for units in crew.killers.values() for unit in units]
    assert [len(unit) for unit in sorted(deaths, key=len, reverse=True)] == [8, 1]
    assert crew.handed.count((13,)) == 1
    assert sum(13 in unit for unit in crew.handed) == 2


def test_a_suspect_has_its_worker_to_itself() -> None:
    """Or an innocent unit in the same process would be blamed for its death."""

    class Watching(FakeCrew):
        def hand(self, worker: int, ticket: int, items: Sequence[int]) -> None:
            before = [unit for _, unit in self.queues[worker]]
            again = sum(set(items) <= set(unit) for unit in self.handed)
            assert not (again and before), "nothing is there yet"
            tried_again = [unit for unit in before if sum(set(unit) <= set(other) for other in self.handed) > 1]
            assert not tried_again, "nothing joins a suspect"
            super().hand(worker, ticket, items)

    crew = Watching(3, poison=frozenset({5, 21, 22}))
    assert len(shared(range(64), crew, size=4)) == 64


def test_no_worker_runs_dry_and_all_end_together() -> None:
    crew = FakeCrew(4)
    shared(range(640), crew, size=16)
    assert crew.now == START + 640 / 4
    assert crew.largest_queue == UNITS_AHEAD, "the next unit is there before one is done"


def test_suspects_need_not_wait_for_the_worker_that_died() -> None:
    crew = FakeCrew(3, poison=frozenset({0}), returns=False)
    results = share_out(range(600), crew, size=4, workers=3, give_up=lambda item, _: -item)
    first = [next(results) for _ in range(4)]
    assert [result for _, result in first] == [0, 1, 4, 9]
    assert len(crew.handed) < 20, "another worker was kept free for them"
    assert len(list(results)) == 596


def test_items_are_read_only_as_far_as_there_is_room() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    crew = FakeCrew(3, seconds={1: 5_000.0})
    results = share_out(items(), crew, size=4, workers=3, give_up=lambda item, _: -item)
    assert next(results) == (0, 1)
    assert read <= WINDOW * UNITS_AHEAD * 4 * 3, "the first item took long, and the others waited for it"


def test_a_stop_finishes_what_workers_have() -> None:
    stop = False
    crew = FakeCrew(2)
    results = share_out(range(1000), crew, size=5, workers=2, give_up=lambda item, _: -item, stopped=lambda: stop)
    first = [next(results) for _ in range(20)]
    stop = True
    rest = list(results)
    assert [result for _, result in first + rest] == [n * n for unit in crew.handed for n in unit]
    assert len(rest) <= 2 * UNITS_AHEAD * 5


def test_a_stop_keeps_results_behind_a_gap() -> None:
    stop = False

    class Stopping(FakeCrew):
        def wait(self) -> Event[int] | None:
            nonlocal stop
            event = super().wait()
            stop = stop or isinstance(event, Died)
            return event

    crew = Stopping(2, poison=frozenset({1}))
    found = share_out(range(100), crew, size=5, workers=2, give_up=lambda item, _: -item, stopped=lambda: stop)
    numbers = [result for _, result in found]
    assert numbers, "the other worker had two units"
    assert numbers == sorted(n * n for unit in crew.handed for n in unit if n * n in numbers)
    assert not {n * n for n in range(5)} & set(numbers), "they were to be tried again"


def test_a_stop_before_any_worker_is_there() -> None:
    assert list(share_out(range(9), FakeCrew(2), size=1, workers=2, give_up=min, stopped=lambda: True)) == []


def test_without_workers_it_ends() -> None:
    crew = FakeCrew(1)
    crew.happenings.clear()
    with pytest.raises(RefinetoolError, match="no worker is left"):
        list(share_out(range(9), crew, size=1, workers=1, give_up=lambda item, _: item))


def test_units_are_large_in_long_runs_and_small_in_short_ones() -> None:
    assert unit_size(100_000, workers=8) == LARGEST_UNIT
    assert unit_size(100, workers=4) == 3
    assert unit_size(3, workers=8) == unit_size(0, workers=1) == 1


def test_sixty_four_workers_of_uneven_speed_are_kept_busy_by_one_driver() -> None:
    """A virtual run of 100,000 images on 64 GPUs, some of which take long or die."""
    count, workers = 100_000, 64
    poison = frozenset(range(7_777, count, 20_000))
    seconds = dict.fromkeys(range(0, count, 1000), 1.0)
    crew = FakeCrew(workers, poison, seconds, usual=1 / 65)
    began = time.process_time()
    found = shared(range(count), crew, size=unit_size(count, workers=workers))
    spent = time.process_time() - began
    assert found == [-n if n in poison else n * n for n in range(count)]
    busy = crew.busy / (workers * (crew.now - START))
    assert busy > 0.85, "the rest is new starts after deaths, and waiting for the window"
    assert spent / count < 0.01, "the driver is not what holds up 64 workers"
