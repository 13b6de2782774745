"""Draws episodes: a class, a target image, and reference images of the same class with simulated annotations."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from refinetool.errors import DataError
from refinetool.formats.storage import new_file
from refinetool.train.reference.annotations import KINDS, Kind
from refinetool.train.reference.data import ClassPicture

MIN_AREA_PX = 10
"""Classes with fewer pixels in an image are not used there."""
VERSION = 1


@dataclass(frozen=True, slots=True)
class Episode:
    """One question: find the class in the target, given the references. Images are known by their keys.

    seed: Of the simulated annotations; that of the nth reference is (seed, n).
    """

    name: str
    target: str
    references: tuple[str, ...]
    kind: Kind
    seed: int


@dataclass(frozen=True, slots=True)
class ClassIndex:
    """Which images can be target or reference of each class; every class has at least two images."""

    targets: dict[str, tuple[str, ...]]
    references: dict[str, tuple[str, ...]]

    def draw(self, name: str, *, shots: int, kind: Kind, rng: Generator) -> Episode:
        """Draw a target and distinct references of a class; fewer references if there are not enough."""
        targets = self.targets[name]
        target = targets[int(rng.integers(len(targets)))]
        others = [key for key in self.references[name] if key != target]
        chosen = rng.choice(len(others), size=min(shots, len(others)), replace=False)
        return Episode(name, target, tuple(others[int(n)] for n in chosen), kind, int(rng.integers(2**31)))


def index_classes(
    targets: Iterable[ClassPicture], references: Iterable[ClassPicture], *, classes: Iterable[str], min_area: float
) -> ClassIndex:
    """Index the given classes that have a target, and a reference other than it.

    Args:
        min_area: Smallest area of a class in an image, as a fraction of the image; `MIN_AREA_PX` at least.
    """
    wanted = set(classes)
    by_target, by_reference = (_by_class(pictures, wanted, min_area) for pictures in (targets, references))
    usable = sorted(
        name for name, found in by_target.items() if any(set(by_reference.get(name, ())) - {target} for target in found)
    )
    return ClassIndex(
        {name: tuple(target for target in by_target[name] if set(by_reference[name]) - {target}) for name in usable},
        {name: tuple(by_reference[name]) for name in usable},
    )


def _by_class(pictures: Iterable[ClassPicture], wanted: set[str], min_area: float) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for picture in pictures:
        least = max(MIN_AREA_PX, min_area * picture.size[0] * picture.size[1])
        for name, area in picture.areas.items():
            if name in wanted and area >= least:
                found.setdefault(name, []).append(picture.key)
    return found


def fixed_episodes(index: ClassIndex, *, count: int, shots: int, kinds: Sequence[Kind], seed: int) -> list[Episode]:
    """Draw a list of episodes that depends on nothing but its arguments; classes take turns, and so do kinds."""
    rng = np.random.default_rng(seed)
    names = sorted(index.targets)
    order = [names[int(n)] for _ in range(-(-count // len(names))) for n in rng.permutation(len(names))]
    return [
        index.draw(name, shots=shots, kind=kinds[number % len(kinds)], rng=rng)
        for number, name in enumerate(order[:count])
    ]


def write_episodes(episodes: Sequence[Episode], path: Path) -> None:
    """Write a list of episodes as JSON."""
    content = {"version": VERSION, "episodes": [asdict(episode) for episode in episodes]}
    with new_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_episodes(path: Path) -> list[Episode]:
    """Read a list of episodes; raises DataError if the file holds something else."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise DataError(
                f"{path}: holds episodes of version {content['version']}, expected {VERSION}; draw them anew."
            )
        return [_episode(one) for one in content["episodes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: can't be read as a list of episodes ({error}); name another file.") from error


def _episode(found: dict[str, Any]) -> Episode:
    episode = Episode(**{**found, "references": tuple(found["references"])})
    if episode.kind not in KINDS or not episode.references:
        raise ValueError(f"an episode of kind {episode.kind!r} with {len(episode.references)} references")
    return episode
