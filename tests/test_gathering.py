"""Gathering features: the same file for any workers, whoever dies; nothing lost when it ends early."""

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from commands import HEIGHT, WIDTH
from PIL import Image

from refinetool.backends.models import load_backend
from refinetool.errors import Interrupted, UsageError
from refinetool.formats import open_dataset
from refinetool.records import Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.running.crew import Died, Done, Event, Ready
from refinetool.running.runners import LoadedJob, Team
from refinetool.settings import AdaptSettings, RefineSettings
from refinetool.train.iou import gathering
from refinetool.train.iou.adapt import AdaptSummary, adapt_iou
from refinetool.train.iou.features import FeatureFile
from refinetool.train.iou.gathering import (
    HEAD,
    CrewGatherer,
    FeatureUnits,
    Found,
    Gathered,
    Gatherer,
    LocalGatherer,
    gather,
)
from refinetool.train.iou.head import Head

COUNT, UNIT = 9, 2
RANDOM = "random:0"
QUICK = AdaptSettings(steps=12, decay_steps=(6,), learning_rate=0.5, margin=0.1, held_out=0.4)


@pytest.fixture(scope="module")
def refiner() -> Refiner:
    return load_refiner("embedded", checkpoint=RANDOM, device="cpu", precision="fp32", settings=RefineSettings())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`coarse.json` and `images`, with 0 to 2 loose boxes around bright rectangles in each; image 4 is broken."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        pixels = rng.integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        for row in range(1 if number == 4 else number % 3):
            x, y = 8 + 30 * row + number, 10 + number
            pixels[y : y + 16, x : x + 20] = 210
            ring = [x - 1, y - 2, x + 21, y - 2, x + 21, y + 17, x - 1, y + 17]
            annotations.append(
                {"id": 10 * number + row, "image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": [ring]}
                | {"area": 418, "bbox": [x - 1, y - 2, 22, 19]}
            )
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "4.png").write_bytes(b"broken")
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (tmp_path / "coarse.json").write_text(json.dumps(record))
    return tmp_path


def samples_in(folder: Path) -> list[Sample]:
    return list(open_dataset(folder / "coarse.json", images=folder / "images").samples())


def local(refiner: Refiner, *, batches: int = 1) -> LocalGatherer:
    return LocalGatherer(LoadedJob(refiner, {}, batches), threads=2)


@dataclass
class FakeCrew:
    """Workers in this process, which answer the last unit first; the samples with the keys `deadly` kill them."""

    work: Callable[[Sequence[Sample]], Sequence[Found]]
    workers: int = 2
    deadly: frozenset[str] = frozenset()
    crashes: list[str] = field(default_factory=list)
    about: Mapping[str, object] = field(default_factory=dict)
    units: list[tuple[int, int, Sequence[Sample]]] = field(default_factory=list)
    events: "deque[Event[Found]]" = field(default_factory=deque)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events.extend(Ready(worker) for worker in range(self.workers))

    def hand(self, worker: int, ticket: int, items: Sequence[Sample]) -> None:
        self.units.append((worker, ticket, items))

    def wait(self) -> "Event[Found]":
        if self.events:
            return self.events.popleft()
        worker, ticket, items = self.units.pop()
        if self.deadly & {sample.key for sample in items}:
            self.units = [unit for unit in self.units if unit[0] != worker]
            self.crashes.append("killed")
            self.events.append(Ready(worker))
            return Died(worker, "killed")
        self.asked.extend(sample.key for sample in items)
        return Done(worker, ticket, self.work(items))


def crewed(crew: FakeCrew) -> CrewGatherer:
    return CrewGatherer(Team(crew, crew.workers, UNIT))  # type: ignore[arg-type]


def collect(
    samples: Sequence[Sample],
    gatherer: Gatherer,
    path: Path,
    *,
    stop: threading.Event | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Gathered:
    stop = stop or threading.Event()
    with FeatureFile(path, job={}, fresh=False) as cache:
        return gather(samples, gatherer, cache=cache, total=len(samples), on_progress=on_progress, stop=stop)


def keys_in(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]]


# --- who does it


def test_workers_gather_what_one_process_gathers(data: Path, refiner: Refiner, tmp_path: Path) -> None:
    samples = samples_in(data)
    whole = collect(samples, local(refiner), tmp_path / "whole")
    crew = FakeCrew(FeatureUnits(local(refiner)))
    told: list[int] = []
    found = collect(samples, crewed(crew), tmp_path / "shared", on_progress=lambda done, _: told.append(done))
    assert found == whole
    assert (whole.masks, whole.reused, whole.failed) == (8, 0, 1)
    assert "4.png" in whole.errors[0]
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "whole").read_bytes()
    assert keys_in(tmp_path / "shared") == list(found.keys) == sorted(found.keys, key=int)
    assert crew.asked != sorted(crew.asked, key=int), "the crew was not in order"
    assert told == list(range(1, COUNT + 1))


def test_several_images_at_a_time_change_nothing(data: Path, refiner: Refiner, tmp_path: Path) -> None:
    """The model is asked from several threads; none sees the features of another."""
    files = [tmp_path / str(batches) for batches in (1, 4)]
    for batches, path in zip((1, 4), files, strict=True):
        collect(samples_in(data), local(refiner, batches=batches), path)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_image_that_kills_twice_is_left_out_and_tried_by_the_next_run(
    data: Path, refiner: Refiner, tmp_path: Path
) -> None:
    samples = samples_in(data)
    whole = collect(samples, local(refiner), tmp_path / "whole")
    killed = FakeCrew(FeatureUnits(local(refiner)), deadly=frozenset({whole.keys[2]}))
    found = collect(samples, crewed(killed), tmp_path / "f")
    assert found.keys == tuple(key for key in whole.keys if key != whole.keys[2])
    assert (found.failed, len(killed.crashes)) == (2, 2)
    assert (
        "the worker process died twice while it prompted the model for this image (killed); look at the image, or "
        "name fewer --workers" in "".join(found.errors)
    )
    again = FakeCrew(FeatureUnits(local(refiner)))
    found = collect(samples, crewed(again), tmp_path / "f")
    assert sorted(again.asked) == sorted(["4", whole.keys[2]]), "only what has no features"
    assert found.keys == whole.keys, "in the order of the samples, wherever the lines are"
    assert found.reused == len(whole.keys) - 1


# --- ending early


def interrupted(samples: Sequence[Sample], gatherer: Gatherer, path: Path, *, after: int) -> None:
    stop = threading.Event()

    def watch(done: int, _: int) -> None:
        if done == after:
            stop.set()

    with pytest.raises(
        Interrupted, match=rf"stopped after \d+ of {len(samples)} images; features are kept in .*{path}"
    ):
        collect(samples, gatherer, path, stop=stop, on_progress=watch)


@pytest.mark.parametrize("shared", [False, True])
def test_a_stop_keeps_what_was_answered(data: Path, refiner: Refiner, tmp_path: Path, shared: bool) -> None:
    samples = [replace(sample, key=f"{turn} {sample.key}") for turn in range(4) for sample in samples_in(data)]
    whole = collect(samples, local(refiner), tmp_path / "whole")
    crew = FakeCrew(FeatureUnits(local(refiner)))
    path = tmp_path / "f"
    interrupted(samples, crewed(crew) if shared else local(refiner), path, after=12)
    kept = keys_in(path)
    assert len(kept) >= 5
    if shared:
        assert set(kept) == set(crew.asked) & set(whole.keys), "units that were handed out are finished"
    else:
        assert len(kept) < len(whole.keys) - 5, "images that were only read are dropped"
    found = collect(samples, local(refiner), path)
    assert (found.keys, found.masks, found.reused) == (whole.keys, whole.masks, len(kept))


def test_a_bug_is_raised_with_the_image_and_what_came_before_is_kept(
    data: Path, refiner: Refiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def buggy(*_: object, **__: object) -> object:
        asked.append(1)
        if len(asked) == 3:
            raise ZeroDivisionError("a bug")
        return real(*_, **__)  # type: ignore[arg-type]

    real = gathering.answers
    monkeypatch.setattr(gathering, "answers", buggy)
    crew = FakeCrew(FeatureUnits(LocalGatherer(LoadedJob(refiner, {}, 1), threads=1)), workers=1)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        collect(samples_in(data), crewed(crew), tmp_path / "f")
    notes = "".join(caught.value.__notes__)
    assert "in buggy" in notes and "while prompting the model for" in notes


# --- what workers say about themselves


def test_a_head_travels_to_the_bit(refiner: Refiner) -> None:
    backend = load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="fp32")
    head = Head.of(backend)
    about = {"model": "embedded", HEAD: json.loads(json.dumps(head.packed()))}
    gatherer = crewed(FakeCrew(FeatureUnits(local(refiner)), about=about))
    assert gatherer.identity == {"model": "embedded"}
    assert gatherer.head.sigmoid == head.sigmoid
    for name, values in head.layer.state_dict().items():
        np.testing.assert_array_equal(gatherer.head.layer.state_dict()[name], values)


def test_a_method_without_a_model_is_refused() -> None:
    settings = replace(RefineSettings(), method="smooth")
    refiner = load_refiner("embedded", checkpoint=RANDOM, device="cpu", precision="fp32", settings=settings)
    with pytest.raises(UsageError, match="smooth has no model"):
        local(refiner)


# --- whole runs


def adapt(folder: Path, name: str, *, workers: int) -> AdaptSummary:
    return adapt_iou(
        folder / "coarse.json",
        output=folder / name,
        images=folder / "images",
        checkpoint=RANDOM,
        precision="fp32",
        recipe=QUICK,
        keep=True,
        keep_features=True,
        workers=workers,
    )


@pytest.mark.ray
# Ray leaves its pipes and subprocesses to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
def test_one_worker_and_two_write_the_same_adapter_and_features(data: Path) -> None:
    one, two = (adapt(data, f"{workers}.safetensors", workers=workers) for workers in (1, 2))
    assert (data / "1.safetensors").read_bytes() == (data / "2.safetensors").read_bytes()
    assert one.features is not None and two.features is not None
    assert one.features.read_bytes() == two.features.read_bytes()
    assert (two.failed, two.crashes) == (1, ())
    assert two.errors == one.errors
