"""What docs/how-to/label.md says is so: its blocks run in order, with the weights in the package."""

import contextlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from pycocotools import mask as coco_mask
from test_docs import DOCS, FENCE

from refinetool.backends import models
from refinetool.backends.reference import shipped_reference_weights
from refinetool.refine import load_refiner
from refinetool.running import identity, runners


def run_page(command: Command, *, until: str) -> None:
    """Do what the page says before a heading."""
    text = (DOCS / "how-to" / "label.md").read_text().partition(until)[0]
    for info, body in FENCE.findall(text):
        language, _, file = info.partition(" ")
        if language == "json":
            Path(file).write_text(body)
        elif language == "python":
            exec(compile(body, "label.md", "exec"), {})
        else:
            for words in (shlex.split(line) for line in body.splitlines()):
                said = command(*words[1:])
                assert said.code == 0, f"{shlex.join(words)}\n{said.err}"


@pytest.mark.skipif(not shipped_reference_weights().is_file(), reason="no reference encoder in the package")
def test_ten_clicks_become_masks(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "load_refiner", load_refiner)
    monkeypatch.setattr(identity, "pick_device", models.pick_device)
    monkeypatch.setattr(identity, "pick_precision", models.pick_precision)
    with contextlib.chdir(tmp_path):
        run_page(command, until="## References")
    for name in ("labels.json", "refined.json", "both.json"):
        record = json.loads((tmp_path / name).read_text())
        (annotation,) = record["annotations"]
        found = coco_mask.decode(annotation["segmentation"]).astype(bool)
        # Centres of the coins of the upper row, and places between them.
        coins = [(44, 54), (101, 57), (156, 51), (216, 50), (279, 52), (338, 43)]
        between = [(72, 84), (72, 20), (128, 84), (186, 15), (248, 84), (310, 84)]
        on, off = (np.mean([found[y, x] for x, y in places]) for places in (coins, between))
        assert on > 0.7, name
        assert off < 0.2, name
