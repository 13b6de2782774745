"""Measures what one driver can do: images per second that it can read, hand out, take back, journal and write.

    python benchmarks/driver.py [--images 20000] [--workers 64] [--masks 7.4]

Everything is real except the workers, which answer at once with the coarse masks: a COCO file, samples pickled as Ray
pickles them, results pickled back, the journal, the output. Prints rates, bytes per image, and what follows for a
million images. A cluster that refines more images per second than this is limited by its driver.
"""

import argparse
import pickle
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from large_json import HEIGHT, WIDTH, make_file

from refinetool.formats import open_dataset
from refinetool.records import Annotation, Outcome, Sample
from refinetool.running.crew import Done, Event, Ready, unit_size
from refinetool.running.journal import Journal
from refinetool.running.run import run
from refinetool.running.runners import CrewRunner, Team
from refinetool.running.threads import Finished, Result

MILLION = 1_000_000


@dataclass
class InstantCrew:
    """Workers that answer at once: every mask is its coarse one."""

    workers: int
    about: dict[str, object] = field(default_factory=dict)
    crashes: tuple[str, ...] = ()
    events: deque[Event[Result]] = field(default_factory=deque)
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    """Time spent on the workers' side."""

    def __post_init__(self) -> None:
        self.events.extend(Ready(worker) for worker in range(self.workers))

    def hand(self, worker: int, ticket: int, items: Sequence[Sample]) -> None:
        unit = pickle.dumps(list(items), protocol=5)
        began = time.perf_counter()
        answer = pickle.dumps([self.refined(sample) for sample in pickle.loads(unit)], protocol=5)
        self.seconds += time.perf_counter() - began
        self.sent += len(unit)
        self.received += len(answer)
        self.events.append(Done(worker, ticket, pickle.loads(answer)))

    def refined(self, sample: Sample) -> Result:
        annotations = tuple(Annotation(region.mask, None, 0.9, 0.8) for region in sample.regions)
        return Finished(sample, Outcome(sample.key, annotations), 0.1)

    def wait(self) -> Event[Result] | None:
        return self.events.popleft()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--masks", type=float, default=7.4, help="masks per image")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        coarse = folder / "coarse.json"
        make_file(coarse, int(arguments.images * arguments.masks))
        began = time.perf_counter()
        dataset = open_dataset(coarse)
        count = len(dataset)
        opened = time.perf_counter()
        crew = InstantCrew(arguments.workers)
        runner = CrewRunner(Team(crew, arguments.workers, unit_size(count, workers=arguments.workers)))  # type: ignore[arg-type]
        with Journal(folder / "journal", job={}, fresh=True) as journal:
            run(
                dataset.samples(),
                runner,
                journal=journal,
                total=count,
                on_progress=lambda _: None,
                stop=threading.Event(),
            )
            ran = time.perf_counter()
            dataset.write(journal.find, folder / "out.json", {})
        written = time.perf_counter()
        journal_bytes = (folder / "journal").stat().st_size
        driver = ran - opened - crew.seconds
        print(f"{count:,} images of {WIDTH} x {HEIGHT}, {arguments.masks} masks each, {arguments.workers} workers")
        for what, per_image, unit in (
            ("open the file", 1e6 * (opened - began) / count, "us"),
            ("read, hand out, take back, journal", 1e6 * driver / count, "us"),
            ("write the output", 1e6 * (written - ran) / count, "us"),
            ("to a worker", crew.sent / count, "bytes"),
            ("from a worker", crew.received / count, "bytes"),
            ("coarse file", coarse.stat().st_size / count, "bytes"),
            ("journal", journal_bytes / count, "bytes"),
        ):
            total = (
                f"{per_image * MILLION / 1e6 / 60:8.1f} min" if unit == "us" else f"{per_image * MILLION / 1e9:8.2f} GB"
            )
            print(f"{what:>36}  {per_image:9.0f} {unit:<5} an image  {total} for a million")
        print(f"the driver keeps up with {count / driver:,.0f} images per second")


if __name__ == "__main__":
    main()
