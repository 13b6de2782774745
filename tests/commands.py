"""What tests of whole commands share; the fixtures are in conftest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from refinetool.running.summary import Summary
from refinetool.statuses import Reason

HEIGHT, WIDTH = 60, 80


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


Command: TypeAlias = Callable[..., Said]


def a_summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "images": 4,
        "masks": 10,
        "refined": 7,
        "kept": {Reason.DRIFT: 2, Reason.UNCHANGED: 1},
        "failed": 0,
        "errors": (),
        "mean_change": 0.123,
        "reused": 1,
        "redone": 0,
        "seconds": 100.0,
        "images_per_second": 0.03,
        "output": Path("out.json"),
    }
    return Summary(**(values | changes))


def save_squares(folder: Path, *names: str) -> None:
    """Save the same mask under some names, 0 and 255, and make their folders."""
    square = np.zeros((HEIGHT, WIDTH), np.uint8)
    square[10:30, 20:50] = 255
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(square).save(folder / name)
