"""`refinetool eval` as typed: tables, Markdown, JSON, the plot, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

from refinetool import masks
from refinetool.errors import StorageError, UsageError
from refinetool.evaluate import Report
from refinetool.evaluate.gains import GainBin
from refinetool.evaluate.plot import GAIN, LOSS, check_plot, draw_gains, write_plot
from refinetool.settings import EvaluateSettings

SIZE = (40, 60)


def rectangle(x0: int, x1: int) -> dict[str, Any]:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[5:25, x0:x1] = True
    rle = masks.encode(mask)
    return {"size": list(SIZE), "counts": rle.counts.decode()}


def coco(path: Path, spans: dict[int, tuple[int, int]]) -> Path:
    """One object per image: its rectangle from x0 to x1, 20 rows high."""
    images = [{"id": id, "file_name": f"{id}.png", "height": SIZE[0], "width": SIZE[1]} for id in (0, 1)]
    annotations = [
        {"id": id, "image_id": id, "category_id": 3, "iscrowd": 0, "area": 20.0 * (x1 - x0)}
        | {"segmentation": rectangle(x0, x1)}
        for id, (x0, x1) in spans.items()
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "x"}]}))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Truth, coarse masks of IoU 0.5, refined ones of IoU 0.9 and 0.8; and results that are the truth."""
    found = {
        "truth": coco(tmp_path / "truth.json", {0: (10, 30), 1: (20, 40)}),
        "coarse": coco(tmp_path / "coarse.json", {0: (10, 20), 1: (20, 30)}),
        "refined": coco(tmp_path / "refined.json", {0: (10, 28), 1: (20, 36)}),
        "results": tmp_path / "results.json",
    }
    results = [
        {"image_id": image, "category_id": 3, "score": 0.5, "segmentation": rectangle(x0, x0 + 20)}
        for image, x0 in ((0, 10), (1, 20))
    ]
    found["results"].write_text(json.dumps(results))
    return found


def test_the_table_has_before_after_and_gain(command: Command, files: dict[str, Path]) -> None:
    said = command("eval", files["refined"], files["truth"], "--coarse", files["coarse"])
    assert said.code == 0, said.err
    lines = {line.split(",")[0]: line.split()[-3:] for line in said.out.splitlines() if "," in line}
    assert lines["IoU"] == ["50.00", "85.00", "+35.00"]
    assert lines["global IoU"] == ["50.00", "85.00", "+35.00"]
    assert lines["AP50"] == ["100.00", "100.00", "+0.00"]
    assert "2 detections have no score and count as 1.0" in said.out
    assert "100.0% of the objects better" in said.out
    assert "measuring: 2/2 images" in said.err
    assert not command("eval", files["refined"], files["truth"], "--quiet").err


def test_markdown(command: Command, files: dict[str, Path]) -> None:
    said = command("eval", files["refined"], files["truth"], "--coarse", files["coarse"], "--markdown")
    lines = said.out.splitlines()
    assert lines[:3] == [
        "|  | coarse | refined | gain |",
        "| --- | ---: | ---: | ---: |",
        "| IoU, mean over objects | 50.00 | 85.00 | +35.00 |",
    ]
    assert "- 2 scored" in lines
    alone = command("eval", files["refined"], files["truth"], "--markdown").out.splitlines()
    assert alone[2] == "| IoU, mean over objects | 85.00 |"


def test_json_has_figures_bins_and_remarks(command: Command, files: dict[str, Path]) -> None:
    said = command("eval", files["refined"], files["truth"], "--coarse", files["coarse"], "--json")
    report = json.loads(said.out)
    named = {measure["name"]: measure for measure in report["measures"]}
    assert named["IoU"]["gain"] == pytest.approx(0.35)
    assert named["AP large"]["value"] is None
    category = report["per_class"][0]
    assert (category["name"], category["value"], category["before"]) == ("IoU of category 3", 0.85, 0.5)
    (size,) = (bin for bin in report["gain_by_size"] if bin["objects"])
    assert (size["low"], size["high"], size["objects"]) == (16.0, 32.0, 2), "objects of 20 x 20 px"
    (bin,) = (bin for bin in report["gain_by_coarse_iou"] if bin["objects"])
    assert (bin["low"], bin["high"], bin["gain"]) == (0.5, 0.6, pytest.approx(0.35))
    assert report["gain_by_size"][-1]["high"] is None
    assert len(report["remarks"]) == 1


def test_results_against_annotations(command: Command, files: dict[str, Path]) -> None:
    said = command("eval", files["results"], files["truth"], "--coarse", files["coarse"], "--json")
    report = json.loads(said.out)
    assert {measure["name"]: measure["value"] for measure in report["measures"]}["AP"] == 1.0
    assert not any(measure["name"] == "IoU" for measure in report["measures"])
    assert "no annotation ids" in report["remarks"][0]


@pytest.mark.parametrize("outlined", [False, True], ids=["run lengths", "polygons"])
def test_results_take_their_sizes_from_the_ground_truth(
    command: Command, files: dict[str, Path], tmp_path: Path, outlined: bool
) -> None:
    """Results state no image sizes, and a picture whose name ends in an id need not be the image."""
    (tmp_path / "vis" / "deep").mkdir(parents=True)
    for id in (0, 1):
        Image.new("RGB", (32, 24)).save(tmp_path / "vis" / "deep" / f"thumb_{id}.png")
    results = json.loads(files["results"].read_text())
    for result, x0 in zip(results, (10, 20), strict=True):
        if outlined:
            result["segmentation"] = [[x0, 5, x0 + 20, 5, x0 + 20, 25, x0, 25]]
    files["results"].write_text(json.dumps(results))
    said = command("eval", files["results"], files["truth"], "--coarse", files["results"], "--json")
    assert said.code == 0, said.err
    named = {measure["name"]: measure for measure in json.loads(said.out)["measures"]}
    assert (named["AP"]["value"], named["AP"]["before"]) == (1.0, 1.0)


def test_results_of_another_size_than_the_ground_truth_are_refused(command: Command, files: dict[str, Path]) -> None:
    text = files["results"].read_text()
    small = masks.encode(np.ones((4, 6), dtype=np.bool_)).counts.decode()
    results = [result | {"segmentation": {"size": [4, 6], "counts": small}} for result in json.loads(text)]
    files["results"].write_text(json.dumps(results))
    said = command("eval", files["results"], files["truth"])
    assert said.code == 1
    assert "Image 0: masks are 6 x 4 in the prediction, 60 x 40 in the ground truth" in said.err


def test_results_against_results_go_by_the_sizes_of_their_masks(
    command: Command, files: dict[str, Path], tmp_path: Path
) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "thumb_0.png")
    said = command("eval", files["results"], files["results"], "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["counts"]["scored"] == 2


def test_candidates(command: Command, files: dict[str, Path], tmp_path: Path) -> None:
    annotations = [
        {"id": 0, "selected": 1, "single": 0, "scores": [0.1, 0.9, 0.2], "candidates": [rectangle(10, 30)] * 3}
    ]
    path = tmp_path / "candidates.jsonl"
    path.write_text(json.dumps({"image": "0", "annotations": annotations}) + "\n")
    said = command("eval", files["refined"], files["truth"], "--candidates", path)
    assert "top-1 accuracy, highest predicted IoU" in said.out
    assert "1 objects with candidates to select from" in said.out


def test_options_arrive(command: Command, files: dict[str, Path]) -> None:
    def named(*options: str) -> dict[str, float]:
        said = command("eval", files["refined"], files["truth"], "--json", *options)
        return {measure["name"]: measure["value"] for measure in json.loads(said.out)["measures"]}

    plain, wide, bare = named(), named("--boundary-ratio", "0.3"), named("--protocol", "none")
    assert wide["boundary IoU"] == wide["IoU"] != plain["boundary IoU"], "a band so wide is the whole object"
    assert "AP" in plain
    assert "AP" not in bare


def test_the_number_of_processes_arrives(
    command: Command, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def measure(*_: object, workers: int, **__: object) -> Report:
        asked.append(workers)
        return Report(())

    monkeypatch.setattr("refinetool.evaluate.evaluate", measure)
    command("eval", files["refined"], files["truth"], "--workers", "3")
    command("eval", files["refined"], files["truth"])
    assert asked == [3, EvaluateSettings().workers]


def test_a_format_that_only_the_user_knows(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    folder.mkdir()
    Image.fromarray(np.uint8([[0, 3, 7, 255]])).save(folder / "a.png")
    assert "name the format" in command("eval", folder, folder).err
    assert "IoU of class 7" in command("eval", folder, folder, "--format", "voc-class").out


@pytest.mark.parametrize("named", ["--sizes", "--images"])
def test_polygons_against_polygons_need_sizes_from_somewhere(
    command: Command, files: dict[str, Path], tmp_path: Path, named: str
) -> None:
    polygon = [{"image_id": 0, "category_id": 3, "score": 0.5, "segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]]}]
    results = tmp_path / "alone" / "results.json"
    results.parent.mkdir()
    results.write_text(json.dumps(polygon))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (SIZE[1], SIZE[0])).save(tmp_path / "photos" / "0.png")
    places = {"--sizes": files["truth"], "--images": tmp_path / "photos"}
    said = command("eval", results, results, named, places[named], "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["counts"]["empty_prediction"] == 0
    assert "no object in common" in command("eval", results, results).err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--plot", "gain.png"], "name them with --coarse"),
        (["--json", "--markdown"], "choose one"),
        (["--protocol", "lvis"], "neg_category_ids"),
        (["--protocol", "davis"], "index PNGs or masks in folders"),
    ],
)
def test_what_cannot_be_done_is_refused(
    command: Command, files: dict[str, Path], more: list[str], sentence: str
) -> None:
    said = command("eval", files["refined"], files["truth"], *more)
    assert said.code == 2
    assert sentence in said.err


# --- class maps


def class_maps(folder: Path, maps: dict[str, list[list[int]]]) -> Path:
    """A folder of class maps as VOC has them, in shades of grey."""
    target = folder / "SegmentationClass"
    target.mkdir(parents=True)
    for name, rows in maps.items():
        Image.fromarray(np.uint8(rows)).save(target / f"{name}.png")
    return folder


@pytest.mark.parametrize("coarse", [False, True], ids=["prediction", "coarse"])
def test_class_maps_without_a_common_image_are_refused(command: Command, tmp_path: Path, coarse: bool) -> None:
    truth = class_maps(tmp_path / "truth", {"a": [[0, 1]], "b": [[0, 1]]})
    others = class_maps(tmp_path / "others", {"c": [[0, 1]]})
    said = command("eval", truth, truth, "--coarse", others) if coarse else command("eval", others, truth)
    assert (said.code, said.out) == (1, "")
    name = "coarse file" if coarse else "prediction"
    assert f"the {name} and the ground truth have no image in common ('c' and 'a', for example)" in said.err
    assert "Images are matched by the names of their files" in said.err


@pytest.mark.parametrize("order", [("maps", "truth"), ("truth", "maps")], ids=["prediction", "truth"])
def test_class_maps_beside_annotations_are_refused(
    command: Command, files: dict[str, Path], tmp_path: Path, order: tuple[str, str]
) -> None:
    """However the images are called: no common image is needed to see it."""
    both = files | {"maps": class_maps(tmp_path / "maps", {"2007_000032": [[0, 1]]})}
    said = command("eval", *(both[name] for name in order))
    assert (said.code, said.out) == (2, "")
    sides = {"maps": "voc-class", "truth": "coco"}
    assert f"The prediction is {sides[order[0]]} and the ground truth {sides[order[1]]}" in said.err
    assert "class maps can only be compared with class maps" in said.err


def test_a_folder_of_masks_beside_annotations_of_other_images(
    command: Command, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.uint8([[0, 255]])).save(tmp_path / "masks" / "street.png")
    said = command("eval", tmp_path / "masks", files["truth"])
    assert (said.code, said.out) == (1, "")
    assert "no image in common ('street' and '0', for example)" in said.err
    assert "Images are matched by the id in COCO files and the name of the file in folders" in said.err


# --- the plot


def bins(*gains: float | None) -> tuple[GainBin, ...]:
    """Bins of ten objects each, with that gain; None has no objects."""
    return tuple(
        GainBin(n / 10, n / 10 + 0.1, 0, None, None, None, None, None)
        if gain is None
        else GainBin(n / 10, n / 10 + 0.1, 10, 0.5, gain, 0.01, 0.7, 0.2)
        for n, gain in enumerate(gains)
    )


def test_the_plot_is_a_png(command: Command, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "plots" / "gain.png"
    said = command("eval", files["refined"], files["truth"], "--coarse", files["coarse"], "--plot", path)
    assert said.code == 0, said.err
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (720, 1650, 3)
    bars = (pixels == (0x2F, 0x7D, 0x5B)).all(axis=2)  # one bar of gain in each panel
    assert bars[:, :825].sum() > 1000
    assert bars[:, 825:].sum() > 1000
    assert not (pixels == (0xB5, 0x48, 0x2F)).all(axis=2).any()


def test_bars_are_as_high_as_the_gains() -> None:
    figure = draw_gains(Report((), gain_by_size=bins(0.2, None, -0.1), gain_by_coarse_iou=bins(0.05)))
    left, right = figure.axes

    def heights(axes: Axes) -> list[float]:
        return [float(patch.get_height()) for patch in axes.patches]  # type: ignore[attr-defined]

    assert heights(left) == pytest.approx([20.0, 0.0, -10.0])
    assert heights(right) == pytest.approx([5.0])
    colours = [to_hex(patch.get_facecolor()) for patch in left.patches]
    assert colours == [GAIN, GAIN, LOSS]
    (whiskers,) = left.collections
    assert [ends[:, 1].tolist() for ends in whiskers.get_segments()] == [  # type: ignore[attr-defined]
        pytest.approx(span) for span in ([19.0, 21.0], [0.0, 0.0], [-11.0, -9.0])
    ]
    labels = [label.get_text() for label in left.get_xticklabels()]
    assert labels[0].splitlines() == ["0 to 0.1", "n 10", "+70%", "-20%"]
    assert labels[1].splitlines() == ["0.1 to 0.2", "n 0"]


@pytest.mark.parametrize("kind", ["class maps", "results"])
def test_a_plot_of_files_without_gains_is_refused_before_the_work(
    command: Command, files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    if kind == "class maps":
        maps = class_maps(tmp_path / "maps", {"a": [[0, 1]]})
        arguments: list[object] = [maps, maps, "--coarse", maps]
    else:
        arguments = [files["results"], files["truth"], "--coarse", files["results"]]
    said = command("eval", *arguments, "--plot", tmp_path / "gain.png")
    assert (said.code, said.out) == (2, "")
    assert "--plot shows gains of objects that are matched by id" in said.err
    assert "measuring" not in said.err


@pytest.mark.parametrize("place", ["folder", "text.txt/gain.png", "text.txt/deeper/gain.png"])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(
    command: Command, files: dict[str, Path], tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("")
    said = command("eval", files["refined"], files["truth"], "--coarse", files["coarse"], "--plot", tmp_path / place)
    assert (said.code, said.out) == (1, "")
    assert str(tmp_path / place) in said.err
    assert "measuring" not in said.err


def test_a_plot_replaces_none_of_the_files_compared(command: Command, files: dict[str, Path]) -> None:
    said = command("eval", files["refined"], files["truth"], "--coarse", files["coarse"], "--plot", files["truth"])
    assert said.code == 2
    assert "truth.json: the plot would replace the ground truth" in said.err
    assert "measuring" not in said.err


def test_a_folder_that_must_not_be_written_to_has_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop an administrator, who may well run the tests."""
    asked: list[Path] = []
    monkeypatch.setattr("os.access", lambda path, _: asked.append(path))
    with pytest.raises(StorageError, match=f"{tmp_path} can't be written to"):
        check_plot({"coco"}, tmp_path / "new" / "gain.png")
    assert asked == [tmp_path]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("form", ["--json", "--markdown", "--quiet"])
def test_figures_are_printed_even_if_the_plot_fails(
    command: Command, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    def full_disk(*_: object) -> None:
        raise StorageError("gain.png: the disk is full")

    monkeypatch.setattr("refinetool.evaluate.plot.write_plot", full_disk)
    arguments = ("eval", files["refined"], files["truth"], "--coarse", files["coarse"], form)
    said = command(*arguments, "--plot", tmp_path / "gain.png")
    assert said.code == 1
    assert "disk is full" in said.err
    assert said.out == command(*arguments).out


def test_a_plot_without_a_single_object_comes_after_the_table(
    command: Command, files: dict[str, Path], tmp_path: Path
) -> None:
    nothing = coco(tmp_path / "nothing.json", {})
    said = command("eval", nothing, files["truth"], "--coarse", nothing, "--plot", tmp_path / "gain.png")
    assert "AP50" in said.out
    assert said.code == 2
    assert "no gains to plot" in said.err
    assert not (tmp_path / "gain.png").exists()


def test_without_gains_there_is_no_plot(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no gains to plot"):
        write_plot(Report(()), tmp_path / "gain.png")
    assert not (tmp_path / "gain.png").exists()


@pytest.mark.parametrize(("cores", "workers"), [(None, 1), (1, 1), (2, 1), (4, 3), (64, 8)])
def test_one_core_is_left_to_the_process_that_reads(
    cores: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert EvaluateSettings().workers == workers


def test_processes_that_score_need_no_torch() -> None:
    looked = "import sys, refinetool.evaluate.evaluators; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", looked], capture_output=True, text=True, check=True).stdout == "False\n"
    )
