"""Workers in processes of a Ray cluster, which this module starts or joins. The only module that imports Ray.

Each worker is an actor: a process that loads the model once and then maps units of items to results. The driver retries
what a dead actor had (`crew.share_out`), not Ray, because only the driver knows which items are suspects.
"""

import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from refinetool.errors import RefinetoolError, UsageError, first_line
from refinetool.running.crew import Died, Done, Event, Ready

# Before the import, which reads them. With the first, `uv run` would build a second environment for the workers; the
# second sends statistics; the third hides the GPUs from actors that don't need one, after a warning.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import worker as ray_driver
from ray.exceptions import RayActorError, RayError, RayTaskError

# Ray prints a paragraph on stdout for every process that dies, and has no setting against it; stdout is for results.
ray_driver.print_to_stdstream = lambda *_, **__: None

T = TypeVar("T")
U = TypeVar("U")
T_contra = TypeVar("T_contra", contravariant=True)
U_co = TypeVar("U_co", covariant=True)

OBJECT_STORE_BYTES = 1 << 28
"""Units and results are a few kilobytes each; pixels never leave the worker."""
DEATHS_IN_A_ROW = 5
"""A worker that dies this often without finishing a unit is not started again: something is wrong with its machine."""
CALLS_AT_ONCE = 2
"""Units that an actor works on at the same time: one is read while the model runs on the other."""
REACH_SECONDS = 10.0
LAST_LINES = 8
"""Lines of a dead worker's log that are shown."""
PYTHON_CRASH = "Fatal Python error: "


class Work(Protocol[T_contra, U_co]):
    """What a worker does with a unit of items, from several threads: one result per item."""

    def __call__(self, items: Sequence[T_contra]) -> Sequence[U_co]: ...


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T, U]):
    """A worker's work, and what identifies it, which must be the same for all workers."""

    work: Work[T, U]
    about: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Place:
    """What each worker gets of a machine."""

    cpus: int
    gpus: int


@dataclass(slots=True)
class _Worker:
    actor: Any
    starting: Any
    running: dict[Any, int] = field(default_factory=dict)
    """Tickets by reference."""
    deaths: int = 0
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a Ray cluster has."""

    cpus: int
    gpus: int


@contextmanager
def cluster(address: str | None, *, cpus: int) -> Iterator[Cluster]:
    """Join the cluster at an address (`auto`: the one of this machine), or start one on this machine for the context.

    Where Ray is in use already, its cluster is used, and left as it is.

    Args:
        cpus: Number of cores that a cluster started here offers.

    Raises:
        UsageError: The cluster can't be joined or started.
    """
    joined = not ray.is_initialized()
    if joined:
        _connect(address, cpus=cpus)
    try:
        there = ray.cluster_resources()
        yield Cluster(int(there.get("CPU", 0)), int(there.get("GPU", 0)))
    finally:
        if joined:
            ray.shutdown()


class RayCrew(Generic[T, U]):
    """Workers in Ray actors. A context: leaving it stops them."""

    def __init__(self, load: Callable[[], Loaded[T, U]], *, workers: int, place: Place, folder: Path) -> None:
        """Start the workers in the present cluster, and wait for the first.

        Args:
            load: Called once in each worker; must be picklable.
            workers: Number of workers.
            place: What each of them needs.
            folder: The working folder of the workers, where it exists.

        Raises:
            UsageError: The cluster does not have what the workers need, or the workers are not alike.
            Exception: What `load` raised.
        """
        self.crashes: list[str] = []
        """How workers died, in order: a sentence, then the end of the worker's log."""
        self.about: Mapping[str, object] = {}
        self._load, self._folder = load, str(folder)
        self._events: deque[Event[U]] = deque()
        _check_resources(workers, place)
        # Actors are not restarted and calls are not repeated by Ray: the defaults.
        needs = {"num_cpus": place.cpus, "num_gpus": place.gpus, "max_concurrency": CALLS_AT_ONCE}
        self._actor = ray.remote(**needs)(_Actor)
        self._workers = {number: self._hired() for number in range(workers)}
        try:
            while not self.about:
                event = self._next()
                if event is not None:
                    self._events.append(event)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hand(self, worker: int, ticket: int, items: Sequence[T]) -> None:
        member = self._workers[worker]
        member.running[member.actor.run.remote(list(items))] = ticket

    def wait(self) -> Event[U] | None:
        return self._events.popleft() if self._events else self._next()

    def _next(self) -> Event[U] | None:
        if not self._workers:
            raise RefinetoolError(
                f"no worker is left; {self.crashes[-1].partition(chr(10))[0]}. Finished images are kept: mend the "
                "cause or name fewer --workers, and continue with --resume"
            )
        owners = {
            reference: number
            for number, member in self._workers.items()
            for reference in ([member.starting] if member.starting is not None else [*member.running])
        }
        done, _ = ray.wait(list(owners), num_returns=1, timeout=1.0)
        return self._event(owners[done[0]], done[0]) if done else None

    def close(self) -> None:
        """Stop the workers."""
        for member in self._workers.values():
            ray.kill(member.actor)

    def _hired(self, deaths: int = 0) -> _Worker:
        actor = self._actor.remote()
        return _Worker(actor, actor.start.remote(self._load, self._folder), deaths=deaths)

    def _event(self, number: int, reference: Any) -> Event[U] | None:
        member = self._workers[number]
        try:
            found = ray.get(reference)
        except RayActorError as error:
            return self._buried(number, error)
        except RayTaskError as error:
            raise error.cause if error.cause is not None else error from None
        if reference != member.starting:
            member.deaths = 0
            return Done(number, member.running.pop(reference), found)
        member.starting, (member.pid, about) = None, found
        self.about = self.about or about
        if about != self.about:
            different = next(name for name in self.about if about.get(name) != self.about[name])
            raise UsageError(
                f"the workers are not alike: {different} is {self.about[different]} for one and "
                f"{about.get(different)} for another; install the same environment on every machine"
            )
        return Ready(number)

    def _buried(self, number: int, error: RayActorError) -> Died:
        """Replace a dead worker, unless it dies all the time."""
        member = self._workers.pop(number)
        ray.kill(member.actor)  # it may only be out of reach
        log = _log_of(member.pid)
        why = _cause(error, log)
        self.crashes.append("\n    ".join((f"worker {number}: {why}", *log)))
        if member.deaths + 1 < DEATHS_IN_A_ROW:
            self._workers[number] = self._hired(member.deaths + 1)
        return Died(number, why)


class _Actor:
    """A worker, in its own process. `run` is called from several threads."""

    def start(self, load: Callable[[], Loaded[Any, Any]], folder: str) -> tuple[int, Mapping[str, object]]:
        """Load; returns the id of the process and what identifies the work."""
        if Path(folder).is_dir():
            os.chdir(folder)  # relative paths mean the same as on the driver
        loaded = load()
        self._work = loaded.work
        return os.getpid(), loaded.about

    def run(self, items: Sequence[Any]) -> Sequence[Any]:
        return self._work(items)


def with_traceback(error: Exception) -> Exception:
    """Return an exception with its traceback as a note, since only notes are sent to another process."""
    error.add_note("".join(traceback.format_exception(error)))
    return error


def _connect(address: str | None, *, cpus: int) -> None:
    if address not in (None, "auto"):
        _reach(address)
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = first_line(error)
        if address is None:
            raise UsageError(f"Ray could not be started: {reason}") from error
        raise UsageError(
            f"the Ray cluster at {address} can't be joined: {reason} If it checks tokens, as since Ray 2.60, set "
            "RAY_AUTH_MODE=token here too"
        ) from error


def _reach(address: str) -> None:
    """Refuse an address at which nothing listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(f"--ray-address is {address!r}; expected HOST:PORT, as ray start prints it, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"there is no Ray cluster at {address} ({error}); start one with ray start --head, or correct the address"
        ) from error


def _check_resources(workers: int, place: Place) -> None:
    """Refuse workers that the cluster could never place, which Ray would wait for without end."""
    there = ray.cluster_resources()
    for name, each in (("GPU", place.gpus), ("CPU", place.cpus)):
        have = int(there.get(name, 0))
        if workers * each > have:
            advice = "name fewer --workers" if have else "use --device cpu"
            raise UsageError(f"{workers} workers need {workers * each} {name}s, and the cluster has {have}; {advice}")


def _cause(error: RayActorError, log: Sequence[str]) -> str:
    """Say in a few words what ended a worker."""
    message = str(error)
    if "running low on memory" in message:
        return "the machine ran out of memory and Ray ended the process"
    if "node" in message and ("marked dead" in message or "node died" in message):
        return "its machine left the cluster"
    for line in log:
        if line.startswith(PYTHON_CRASH):
            return f"the process crashed: {line.removeprefix(PYTHON_CRASH)}"
    return "the process was killed, perhaps because memory ran out"


def _log_of(pid: int) -> list[str]:
    """Return the end of what a worker of this machine wrote to stderr; from the crash on, if Python saw one."""
    node = ray_driver._global_node
    if node is None or not pid:
        return []
    for path in Path(node.get_session_dir_path(), "logs").glob(f"worker-*-{pid}.err"):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip() and line[0] not in ":["]
        crash = next((n for n, line in enumerate(lines) if line.startswith(PYTHON_CRASH)), None)
        if crash is None:
            return lines[-LAST_LINES:]
        return [line for line in lines[crash : crash + LAST_LINES] if "/ray/" not in line and "Extension" not in line]
    return []
