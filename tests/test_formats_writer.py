"""COCO files from scratch: what pycocotools and the tool itself read in them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.coco import COCO

from refinetool import masks
from refinetool.errors import DataError
from refinetool.formats import open_dataset
from refinetool.formats.coco_writer import write_coco
from refinetool.records import BoolArray, Region, Sample

SIZE = (7, 9)


def sample_of(folder: Path, name: str, found: list[BoolArray], *, first: int) -> Sample:
    path = folder / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path)
    regions = tuple(Region(first + n, 2, masks.encode(mask)) for n, mask in enumerate(found))
    return Sample(name, path, SIZE, regions)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(found=st.lists(arrays(np.bool_, SIZE).filter(lambda mask: bool(mask.any())), max_size=3))
def test_what_is_written_is_read_again(tmp_path: Path, found: list[BoolArray]) -> None:
    samples = [sample_of(tmp_path, "b/1.png", found, first=1), sample_of(tmp_path, "a 2.png", found[:1], first=100)]
    write_coco(samples, tmp_path / "made.json", images=tmp_path / "photos", categories={2: "cat"})
    again = list(open_dataset(tmp_path / "made.json", images=tmp_path / "photos").samples())
    assert [sample.image for sample in again] == [sample.image for sample in samples]
    assert [sample.size for sample in again] == [SIZE, SIZE]
    for before, after in zip(samples, again, strict=True):
        assert [(r.id, r.category, r.mask) for r in after.regions] == [
            (r.id, r.category, r.mask) for r in before.regions
        ]


def test_area_and_box_are_those_of_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros(SIZE, np.bool_)
    mask[2:5, 3:8] = mask[6, 1] = True
    sample = sample_of(tmp_path, "1.png", [mask, np.zeros(SIZE, np.bool_)], first=5)
    write_coco([sample], tmp_path / "made.json", images=tmp_path / "photos", categories={2: "cat"})
    coco = COCO(tmp_path / "made.json")
    capsys.readouterr()
    drawn = coco.loadAnns([5])[0]
    assert (coco.annToMask(drawn) == mask).all()
    assert drawn["area"] == mask.sum() == 16
    assert drawn["bbox"] == [1, 2, 7, 5]
    empty = coco.loadAnns([6])[0]
    assert (empty["area"], empty["bbox"]) == (0, [0, 0, 0, 0])
    assert coco.loadCats([2])[0]["name"] == "cat"


def test_a_region_without_a_category_is_an_object(tmp_path: Path) -> None:
    path = sample_of(tmp_path, "1.png", [], first=1).image
    region = Region(1, None, masks.encode(np.ones(SIZE, np.bool_)))
    write_coco([Sample("1", path, SIZE, (region,))], tmp_path / "made.json", images=path.parent)
    (sample,) = open_dataset(tmp_path / "made.json", images=path.parent).samples()
    assert sample.regions[0].category == 1


def test_ids_and_categories_are_checked_and_nothing_is_left_behind(tmp_path: Path) -> None:
    full = np.ones(SIZE, np.bool_)
    twice = [sample_of(tmp_path, f"{n}.png", [full], first=1) for n in (1, 2)]
    with pytest.raises(DataError, match=r"2\.png: the id 1 occurs twice"):
        write_coco(twice, tmp_path / "made.json", images=tmp_path, categories={2: "cat"})
    with pytest.raises(DataError, match="mask 1 is of category 2, which has no name"):
        write_coco(twice[:1], tmp_path / "made.json", images=tmp_path, categories={7: "dog"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
