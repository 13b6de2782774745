"""Shares items out among workers in other processes, and yields the results in the order of the items.

Workers may die at any time. What happens then is decided here and nowhere else:

- the units that a dead worker had are taken apart; each of their items is tried again, alone on an idle worker;
- an item whose worker dies again is given up;
- everything else goes on.

This module does not know where the workers are: `ray.RayCrew` has them in processes of a Ray cluster, tests have fakes.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeAlias, TypeVar

T = TypeVar("T")
U = TypeVar("U")
T_contra = TypeVar("T_contra", contravariant=True)
U_co = TypeVar("U_co", covariant=True)

UNITS_AHEAD = 2
"""Number of units that a worker has at a time: it reads the images of one while the model runs on the other."""
LARGEST_UNIT = 16
"""Number of items in a unit of a long run."""
UNITS_EACH = 8
"""Number of units that each worker gets at least, so that all workers end at about the same time."""
WINDOW = 4
"""Results wait until those before them are there. At most this many times the items that all workers have at once wait
or are being worked on, so that memory stays bounded when one item takes long."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has started, or started again, and can be handed units."""

    worker: int


@dataclass(frozen=True, slots=True)
class Done(Generic[U_co]):
    """A worker has finished a unit: one result per item."""

    worker: int
    ticket: int
    results: Sequence[U_co]


@dataclass(frozen=True, slots=True)
class Died:
    """A worker died, with all units it had; `Ready` says when it can be used again."""

    worker: int
    why: str


Event: TypeAlias = Ready | Done[U] | Died


class Crew(Protocol[T_contra, U_co]):
    """Workers that map units of items to results, elsewhere."""

    def hand(self, worker: int, ticket: int, items: Sequence[T_contra]) -> None:
        """Give a unit to a worker that is ready; returns at once."""

    def wait(self) -> "Event[U_co] | None":
        """Wait for what happens next; None after about a second in which nothing happened.

        Raises:
            RefinetoolError: There are no workers any more.
        """


def unit_size(total: int, *, workers: int) -> int:
    """Return the number of items in a unit, for a number of items in total."""
    return min(LARGEST_UNIT, max(1, total // (UNITS_EACH * workers)))


def share_out(
    items: Iterable[T],
    crew: Crew[T, U],
    *,
    size: int,
    workers: int,
    give_up: Callable[[T, str], U],
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[tuple[int, U], None, None]:
    """Map items to (worker, result), in the order of the items.

    Args:
        items: Read only as far as there is room.
        size: Number of items in a unit.
        workers: Number of workers in the crew.
        give_up: Returns the result of an item whose worker died twice, from the item and the cause of death.
        stopped: Whether to end early. Units that workers have are then finished; nothing else is handed out.
    """
    desk = _Desk(iter(items), crew, size, WINDOW * UNITS_AHEAD * size * workers, give_up)
    while True:
        yield from desk.in_order()
        if not stopped():
            desk.hand_out()
        elif not desk.busy:
            yield from desk.rest()
            return
        if desk.finished:
            return
        desk.enter(crew.wait())


@dataclass(frozen=True, slots=True)
class _Unit(Generic[T]):
    """Consecutive items, the first with this number; or one item that is tried again alone."""

    first: int
    items: tuple[T, ...]
    suspect: bool = False


@dataclass(slots=True)
class _Desk(Generic[T, U]):
    """What is handed out, to whom, and what has come back."""

    items: Iterator[T]
    crew: Crew[T, U]
    size: int
    window: int
    give_up: Callable[[T, str], U]
    exhausted: bool = False
    tickets: int = 0
    taken: int = 0
    """Number of items read."""
    shown: int = 0
    """Number of results yielded."""
    held: dict[int, dict[int, _Unit[T]]] = field(default_factory=dict)
    """The units of each worker that is ready, by ticket."""
    suspects: deque[_Unit[T]] = field(default_factory=deque)
    results: dict[int, tuple[int, U]] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether any worker has a unit."""
        return any(self.held.values())

    @property
    def finished(self) -> bool:
        return self.exhausted and self.shown == self.taken

    def hand_out(self) -> None:
        """Give every worker what it may have."""
        for worker in self._by_load():
            if self.suspects and not self.held[worker]:
                self._give(worker, self.suspects.popleft())
        reserved = self._by_load()[:1] if self.suspects else []  # it gets the next suspect once it is idle
        for load in range(UNITS_AHEAD):
            for worker in self._by_load():
                if len(self.held[worker]) == load and worker not in reserved and not self._alone(worker):
                    unit = self._next_unit()
                    if unit is None:
                        return
                    self._give(worker, unit)

    def in_order(self) -> Iterator[tuple[int, U]]:
        """Yield the results that follow those yielded before."""
        while self.shown in self.results:
            self.shown += 1
            yield self.results.pop(self.shown - 1)

    def rest(self) -> Iterator[tuple[int, U]]:
        """Yield all results there are, over gaps."""
        for number in sorted(self.results):
            yield self.results.pop(number)

    def enter(self, event: Event[U] | None) -> None:
        """Take note of what happened."""
        match event:
            case Ready(worker):
                self.held[worker] = {}
            case Done(worker, ticket, results):
                unit = self.held[worker].pop(ticket)
                for number, (_, result) in enumerate(zip(unit.items, results, strict=True), unit.first):
                    self.results[number] = (worker, result)
            case Died(worker, why):
                for unit in self.held.pop(worker, {}).values():
                    if unit.suspect:
                        self.results[unit.first] = (worker, self.give_up(unit.items[0], why))
                    else:
                        alone = (_Unit(unit.first + n, (item,), suspect=True) for n, item in enumerate(unit.items))
                        self.suspects.extend(alone)

    def _by_load(self) -> list[int]:
        return sorted(self.held, key=lambda worker: (len(self.held[worker]), worker))

    def _alone(self, worker: int) -> bool:
        """Whether a worker has a suspect; nothing else may then be blamed for its death."""
        return any(unit.suspect for unit in self.held[worker].values())

    def _next_unit(self) -> _Unit[T] | None:
        if self.exhausted or self.taken - self.shown + self.size > self.window:
            return None
        items = tuple(islice(self.items, self.size))
        self.exhausted = len(items) < self.size
        self.taken += len(items)
        return _Unit(self.taken - len(items), items) if items else None

    def _give(self, worker: int, unit: _Unit[T]) -> None:
        self.tickets += 1
        self.held[worker][self.tickets] = unit
        self.crew.hand(worker, self.tickets, unit.items)
