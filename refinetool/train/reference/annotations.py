"""Simulates what a person would draw on a reference image: points, scribbles, a box or the mask, from its true mask.

The rules are those of SEEM, which VRP-SAM uses (supplement): k random points; up to twenty free-form strokes, each a
random walk with inertia, cut off at the outline; the box around all of the class; the mask itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from refinetool.errors import UsageError
from refinetool.masks import tight_box
from refinetool.records import Mask

Kind: TypeAlias = Literal["point", "scribble", "box", "mask"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST = 20
"""Largest number of points and of strokes."""
CANVAS_PX = 512
"""Side of the canvas that lengths of strokes refer to; on a smaller one they are scaled."""
TURN = 0.5
"""Largest change of heading from one vertex to the next, in radians."""


@dataclass(frozen=True, slots=True)
class Strokes:
    """A preset of strokes: ranges of the number of vertices and the brush, and the walk's speeds, in pixels."""

    vertices: tuple[int, int]
    top_speed: float
    acceleration: float
    brush: tuple[int, int]
    jitter: float
    initial_speed: float


CURVES = Strokes((10, 29), 20, 15, (3, 9), 3, 6)
SMALL_CURVES = Strokes((6, 21), 12, 8, (2, 4), 1.5, 3)


def named_kinds(given: Sequence[str]) -> tuple[Kind, ...]:
    """Return kinds by name, all of them if none is given; raises UsageError for an unknown name."""
    unknown = sorted(set(given) - set(KINDS))
    if unknown:
        raise UsageError(f"there is no kind of annotation {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in given or not given)


def simulate(mask: Mask, kind: Kind, *, rng: Generator, most: bool) -> Mask:
    """Draw an annotation of a non-empty mask, bool (H, W): bool (H, W), never empty, and within the mask or its box.

    Args:
        most: Whether to draw as many points as are allowed, as in an evaluation, instead of a random number.
    """
    match kind:
        case "mask":
            return mask.copy()
        case "box":
            x0, y0, x1, y1 = tight_box(mask)
            box = np.zeros_like(mask)
            box[y0:y1, x0:x1] = True
            return box
        case "point":
            limit = min(MOST, int(mask.sum()))
            return draw_points(mask, count=limit if most else int(rng.integers(1, limit + 1)), rng=rng)
        case "scribble":
            return draw_scribble(mask, rng=rng)


def draw_points(mask: Mask, *, count: int, rng: Generator) -> Mask:
    """Mark `count` different pixels of a mask."""
    marked = np.zeros_like(mask)
    marked.flat[rng.choice(np.flatnonzero(mask), size=count, replace=False)] = True
    return marked


def draw_scribble(mask: Mask, *, rng: Generator) -> Mask:
    """Draw strokes that begin in the mask, and cut them off at its outline; a single point if nothing is left."""
    preset = CURVES if rng.random() < 0.5 else SMALL_CURVES
    count = int(rng.integers(1, min(MOST, int(mask.sum())) + 1))
    starts = rng.choice(np.flatnonzero(mask), size=count, replace=False)
    canvas = np.zeros(mask.shape, np.uint8)
    scale = max(mask.shape) / CANVAS_PX
    for start in starts:
        y, x = divmod(int(start), mask.shape[1])
        path = jittered(walk((x, y), preset, scale=scale, rng=rng), preset, scale=scale, rng=rng)
        brush = max(1, round(scale * int(rng.integers(preset.brush[0], preset.brush[1] + 1))))
        corners = np.rint(path).astype(np.int32)
        cv2.polylines(canvas, [corners.reshape(-1, 1, 2)], isClosed=False, color=1, thickness=brush)
        for corner in corners.tolist():
            cv2.circle(canvas, corner, brush // 2, 1, -1)
    drawn: Mask = (canvas > 0) & mask
    return drawn if drawn.any() else draw_points(mask, count=1, rng=rng)


def walk(start: tuple[int, int], preset: Strokes, *, scale: float, rng: Generator) -> NDArray[np.float64]:
    """Return the vertices (V, 2), (x, y), of a random walk whose speed and heading change little by little."""
    count = int(rng.integers(preset.vertices[0], preset.vertices[1] + 1))
    heading, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, preset.top_speed)
    path = [np.array(start, np.float64)]
    for _ in range(count - 1):
        speed = float(np.clip(speed + rng.uniform(-preset.acceleration, preset.acceleration), 0, preset.top_speed))
        heading += rng.uniform(-TURN, TURN)
        path.append(path[-1] + scale * speed * np.array([math.cos(heading), math.sin(heading)]))
    return np.array(path)


def jittered(path: NDArray[np.float64], preset: Strokes, *, scale: float, rng: Generator) -> NDArray[np.float64]:
    """Shift a whole path in a random direction, and every second vertex or so by a little more."""
    angle, length = rng.uniform(0, 2 * math.pi), abs(rng.normal(0, preset.initial_speed / 2))
    moved = path + scale * length * np.array([math.cos(angle), math.sin(angle)])
    some = rng.random(len(path)) < 0.5
    moved[some] += scale * rng.uniform(-preset.jitter, preset.jitter, (int(some.sum()), 2))
    return moved
