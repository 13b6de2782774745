"""Sizes that files claim are bounded before memory is taken or a mask library sees them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from commands import HEIGHT, WIDTH, Command

from refinetool.formats.coco_masks import read_segmentation
from refinetool.statuses import Reason

RLE = {"size": [1_000_000, 1_000_000], "counts": [0, 1_000_000_000_000]}


def claims(folder: Path, **changes: Any) -> Path:
    """The data set with other fields in its second image record."""
    document = json.loads((folder / "coarse.json").read_text())
    document["images"][1] |= changes
    (folder / "coarse.json").write_text(json.dumps(document))
    return folder / "coarse.json"


@pytest.mark.parametrize("changes", [{"width": 1_000_000, "height": 1_000_000}, {"width": 2_147_483_647}])
@pytest.mark.parametrize("name", ["refine", "corrupt", "eval"])
def test_a_record_that_claims_too_many_pixels(
    command: Command, folder: Path, name: str, changes: dict[str, int]
) -> None:
    coarse = claims(folder, **changes)
    started = time.perf_counter()
    said = command(name, coarse, *[coarse] * (name == "eval"), "--images", folder / "images", "--json")
    assert said.code == (1 if name == "refine" else 0), said.err
    assert time.perf_counter() - started < 30
    if name == "refine":
        assert json.loads(said.out)["refined"] == 2
        assert json.loads(said.out)["kept"] == {"size-mismatch": 1}
        assert "its annotations say" in said.err
    if name == "corrupt":
        assert json.loads(said.out)["corrupted"] == 2


@pytest.mark.parametrize("side", [4_294_967_296, 1e300, 10**400, -1, 0, 0.5, "60"])
def test_a_side_that_no_image_has(command: Command, folder: Path, side: object) -> None:
    said = command("refine", claims(folder, width=side), "--images", folder / "images")
    assert said.code == 1
    assert "expected pixels" in said.err
    assert len(said.err) < 1200


@pytest.mark.parametrize("size", [[1_000_000, 1_000_000], [10**400, 10**400], [1 << 32, 1]])
def test_run_lengths_that_claim_too_many_pixels(command: Command, folder: Path, size: list[int]) -> None:
    segmentation = {"size": size, "counts": [0, 1]}
    results = [{"image_id": 9, "category_id": 1, "segmentation": segmentation, "score": 1.0}]
    (folder / "results.json").write_text(json.dumps(results))
    said = command("eval", folder / "results.json", folder / "results.json", "--images", folder / "images")
    assert said.code in (0, 1)


@pytest.mark.parametrize(
    "segmentation", [[[0, 0, 900_000, 0, 0, 900_000]], RLE, {"size": [1_000_000, 1_000_000], "counts": "0"}]
)
def test_masks_of_such_images_are_not_decoded(segmentation: Any) -> None:
    assert read_segmentation(segmentation, (1_000_000, 1_000_000), max_pixels=10**9) == (None, Reason.IMAGE_TOO_LARGE)


def test_an_outline_that_crosses_the_image_too_often_is_not_drawn() -> None:
    zigzag: Any = [[value for n in range(100_000) for value in (n % 13_000, 26_000 * (n % 2))]]
    started = time.perf_counter()
    found = read_segmentation(zigzag, (13_000, 13_000), max_pixels=10**9)
    assert found == (None, Reason.UNREADABLE_MASK)
    assert time.perf_counter() - started < 5


def test_the_limit_is_the_one_of_the_user(command: Command, folder: Path) -> None:
    refine = ["refine", folder / "coarse.json", "--images", folder / "images", "--dry-run", "--json"]
    assert json.loads(command(*refine, "--max-pixels", HEIGHT * WIDTH).out)["kept"] == {"dry-run": 3}
    assert json.loads(command(*refine, "--max-pixels", HEIGHT * WIDTH - 1).out)["kept"] == {"image-too-large": 3}


def test_of_a_missing_image_the_stated_size_is_believed(command: Command, folder: Path) -> None:
    coarse = claims(folder, width=1_000_000, height=1_000_000)
    (folder / "images" / "2.png").unlink()
    said = command("refine", coarse, "--images", folder / "images", "--json")
    assert json.loads(said.out)["kept"] == {"image-too-large": 1}
