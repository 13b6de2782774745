"""The commands: what they pass on, what they print, and what they say about bad input."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from commands import HEIGHT, WIDTH, Command, a_summary, save_squares
from fakes import BrightBackend
from pycocotools.mask import decode, frPyObjects

import refinetool
from refinetool import cli
from refinetool.backends import weights
from refinetool.cli import options, settings_options
from refinetool.errors import Interrupted
from refinetool.running import run as running
from refinetool.running.run import Summary
from refinetool.settings import FINE_TUNE_RATE, METHODS, NO_GUARD, RELEASE, JobSettings, RefineSettings, TrainSettings


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last `refine` command passed on instead of running."""
    seen: dict[str, Any] = {}

    def refine_dataset(coarse: Path, **arguments: object) -> Summary:
        seen.update(arguments, coarse=coarse)
        return a_summary()

    monkeypatch.setattr(running, "refine_dataset", refine_dataset)
    return seen


# --- help


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from refinetool.cli import main\n"
        "sys.argv[1:] = sys.argv[1:] or ['--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "found = {'torch', 'numpy', 'cv2', 'PIL', 'scipy', 'skimage', 'pycocotools'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "refine", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--images" in done.stdout


@pytest.mark.parametrize(
    "path",
    [
        "",
        "refine",
        "demo",
        "eval",
        "models",
        "models list",
        "models fetch",
        "models verify",
        "train",
        "train embedded",
        "train head",
    ],
)
def test_every_command_has_help(command: Command, path: str) -> None:
    said = command(*path.split(), "--help")
    assert said.code == 0
    assert "Usage: refinetool" in said.out
    assert said.err == ""


def test_the_package_itself_is_light() -> None:
    script = "import sys, refinetool; assert not {'torch', 'numpy', 'cv2', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "refinetool", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"refinetool {refinetool.__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_under_the_output_of_a_command_is_said_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "refinetool", "models", "list"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert b"No space left" in done.stderr


def test_version(command: Command) -> None:
    assert command("--version").out == f"refinetool {refinetool.__version__}\n"


# --- options and settings


def literals_of(hint: object) -> set[tuple[object, ...]]:
    """The choices of every Literal within a type."""
    if get_origin(hint) is Literal:
        return {get_args(hint)}
    return {choices for inner in get_args(hint) for choices in literals_of(inner)}


def test_every_option_of_a_setting_is_tried_here() -> None:
    assert {setting.flag for setting in settings_options.SETTINGS} == {
        arguments.split()[0] for arguments, _, _ in SETTINGS
    }
    assert len({setting.variable for setting in settings_options.SETTINGS}) == len(settings_options.SETTINGS)
    assert {setting.path for setting in settings_options.SETTINGS} <= flat(RefineSettings()).keys()


def test_a_setting_that_takes_words_refuses_others(command: Command, passed_on: dict[str, Any]) -> None:
    said = command("refine", "masks.json", "--view", "sideways")
    assert said.code == 2
    assert "crop" in said.err
    assert passed_on == {}


def test_other_choices_are_those_of_the_library() -> None:
    assert literals_of(options.Precision) == literals_of(get_type_hints(JobSettings)["precision"])


def test_without_options_the_defaults_are_passed_on(command: Command, passed_on: dict[str, Any]) -> None:
    assert command("refine", "masks.json").code == 0
    job = JobSettings()
    assert passed_on.pop("on_progress") is not None
    assert passed_on == {
        "coarse": Path("masks.json"),
        "follow_links": False,
        "record": None,
        "candidates": None,
        "truth": None,
        "iou_adapter": None,
        "arbiter": None,
        "images": None,
        "output": Path("masks.refined.json"),
        "model": job.model,
        "checkpoint": None,
        "device": job.device,
        "precision": job.precision,
        "head": job.head,
        "settings": RefineSettings(),
        "format": None,
        "sizes": None,
        "limit": None,
        "resume": False,
        "fresh": False,
        "overwrite": False,
        "dry_run": False,
        "mask_suffix": "",
        "categories": [],
        "threads": None,
        "workers": 1,
        "ray_address": None,
        "cache_embeddings": None,
        "compile": False,
        "cache_gigabytes": job.embeddings_gigabytes,
    }


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--images", "photos"], "images", Path("photos")),
        (["-o", "out.json"], "output", Path("out.json")),
        (["--format", "coco"], "format", "coco"),
        (["--sizes", "images.json"], "sizes", Path("images.json")),
        (["--mask-suffix", "_mask"], "mask_suffix", "_mask"),
        (["--categories", "cat, 7", "--categories", "dog"], "categories", ["cat, 7", "dog"]),
        (["--overwrite"], "overwrite", True),
        (["--model", "sam-vit-b"], "model", "sam-vit-b"),
        (["--checkpoint", "random:3"], "checkpoint", "random:3"),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--precision", "bf16"], "precision", "bf16"),
        (["--limit", "7"], "limit", 7),
        (["--dry-run"], "dry_run", True),
        (["--resume"], "resume", True),
        (["--fresh"], "fresh", True),
        (["--threads", "3"], "threads", 3),
        (["--workers", "3"], "workers", 3),
        (["--compile"], "compile", True),
        (["--cache-embeddings", "kept"], "cache_embeddings", Path("kept")),
        (["--cache-gigabytes", "0.5"], "cache_gigabytes", 0.5),
        (["--workers", "auto"], "workers", "auto"),
        (["--ray-address", "auto"], "ray_address", "auto"),
        (["--iou-adapter", "a.safetensors"], "iou_adapter", Path("a.safetensors")),
        (["--arbiter", "a.safetensors"], "arbiter", Path("a.safetensors")),
        (["--candidates", "all.jsonl"], "candidates", Path("all.jsonl")),
        (["--selection", "oracle", "--truth", "truth.json"], "truth", Path("truth.json")),
    ],
)
def test_job_options(
    command: Command, passed_on: dict[str, Any], arguments: list[str], name: str, value: object
) -> None:
    assert command("refine", "masks.json", *arguments).code == 0
    assert passed_on[name] == value


SETTINGS: list[tuple[str, str, object]] = [
    ("--passes 3", "passes", 3),
    ("--cascade logits-b", "cascade", "logits-b"),
    ("--selection coarse", "selection", "coarse"),
    ("--include-crowd", "include_crowd", True),
    ("--seed 5", "seed", 5),
    ("--image-batch 2", "image_batch", 2),
    ("--prompt-batch 4", "prompt_batch", 4),
    ("--max-pixels 1000", "max_pixels", 1000),
    ("--view crop", "view.mode", "crop"),
    ("--view-margin 0.1", "view.margin", 0.1),
    ("--snap guided", "snap.mode", "guided"),
    ("--competition 0.3", "competition.weight", 0.3),
    ("--no-arbiter", "competition.arbitrate", False),
    ("--exclusive", "exclusive.enabled", True),
    ("--speck-px 4", "specks.max_px", 4.0),
    ("--speck-share 0.01", "specks.max_share", 0.01),
    ("--polygon-tolerance 0.5", "polygons.tolerance_px", 0.5),
    ("--holes fill", "polygons.holes", "fill"),
    ("--split-rule paper", "split.rule", "paper"),
    ("--split-rule off", "split.rule", "off"),
    ("--grid-points 8", "grid.points_per_side", 8),
    ("--grid-min-iou 0.5", "grid.min_predicted_iou", 0.5),
    ("--grid-min-stability 0.8", "grid.min_stability", 0.8),
    ("--min-predicted-iou 0.9", "guard.min_predicted_iou", 0.9),
    ("--min-expected-gain 0.3", "guard.min_expected_gain", 0.3),
    ("--sure-iou 0.9", "guard.sure_iou", 0.9),
    ("--min-part-confidence 0.7", "guard.min_part_confidence", 0.7),
    ("--min-part-depth 2", "guard.min_part_depth", 2.0),
    ("--min-coarse-iou 0.8", "guard.min_coarse_iou", 0.8),
    ("--max-area-ratio 2", "guard.max_area_ratio", 2.0),
    ("--min-left 0.6", "guard.min_left", 0.6),
    ("--point box-center", "prompts.point", "box-center"),
    ("--no-point", "prompts.use_point", False),
    ("--no-negative", "prompts.use_negative", False),
    ("--no-box", "prompts.use_box", False),
    ("--no-mask", "prompts.use_mask", False),
    ("--border-is-background", "prompts.border_is_background", True),
    ("--box tight", "prompts.box", "tight"),
    ("--elastic-threshold 0.2", "prompts.elastic_threshold", 0.2),
    ("--elastic-similarity 0.7", "prompts.elastic_similarity", 0.7),
    ("--elastic-step 0.3", "prompts.elastic_step", 0.3),
    ("--elastic-step-px 4", "prompts.elastic_step_px", 4.0),
    ("--elastic-rounds 2", "prompts.elastic_rounds", 2),
    ("--gaussian-shape distance", "prompts.gaussian_shape", "distance"),
    ("--gaussian-amplitude 20", "prompts.gaussian_amplitude", 20.0),
    ("--gaussian-span 2", "prompts.gaussian_span", 2.0),
    ("--gaussian-background zero", "prompts.gaussian_background", "zero"),
    ("--weaken-expanded", "prompts.weaken_expanded", True),
]


def flat(settings: RefineSettings) -> dict[str, object]:
    """Settings by name, with the group before a dot."""
    found: dict[str, object] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if hasattr(value, "__dataclass_fields__"):
            found |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in fields(value)}
        else:
            found[field.name] = value
    return found


@pytest.mark.parametrize(("arguments", "name", "value"), SETTINGS, ids=[row[0] for row in SETTINGS])
def test_an_option_changes_its_setting_alone(
    command: Command, passed_on: dict[str, Any], arguments: str, name: str, value: object
) -> None:
    assert command("refine", "masks.json", *arguments.split()).code == 0
    before, after = flat(RefineSettings()), flat(passed_on["settings"])
    assert {key: after[key] for key in after if after[key] != before[key]} == {name: value}


def test_release_is_a_base_that_options_still_change(command: Command, passed_on: dict[str, Any]) -> None:
    command("refine", "masks.json", "--compat", "release")
    assert passed_on["settings"] == RELEASE
    command("refine", "masks.json", "--compat", "release", "--passes", "1")
    before, after = flat(RELEASE), flat(passed_on["settings"])
    assert {key for key in after if after[key] != before[key]} == {"passes"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_base_that_options_still_change(command: Command, passed_on: dict[str, Any], method: str) -> None:
    command("refine", "masks.json", "--method", method)
    assert passed_on["settings"] == METHODS[method]
    command("refine", "masks.json", "--method", method, "--max-area-ratio", "2")
    before, after = flat(METHODS[method]), flat(passed_on["settings"])
    assert {key for key in after if after[key] != before[key]} == {"guard.max_area_ratio"}


def test_release_and_a_baseline_exclude_each_other(command: Command) -> None:
    said = command("refine", "masks.json", "--compat", "release", "--method", "grabcut")
    assert said.code == 2
    assert "--method grabcut" in said.err


def test_no_guard_gives_way_to_a_threshold(command: Command, passed_on: dict[str, Any]) -> None:
    command("refine", "masks.json", "--no-guard")
    assert passed_on["settings"].guard == NO_GUARD
    command("refine", "masks.json", "--no-guard", "--min-coarse-iou", "0.5")
    assert passed_on["settings"].guard.min_coarse_iou == 0.5
    assert passed_on["settings"].guard.max_area_ratio == NO_GUARD.max_area_ratio


def test_all_that_the_model_offered_is_written(command: Command, folder: Path) -> None:
    offered, out = folder / "all.jsonl", folder / "out.json"
    arguments = ("refine", folder / "coarse.json", "--images", folder / "images", "-o", out, "--candidates", offered)
    assert command(*arguments).code == 0
    lines = [json.loads(line) for line in offered.read_text().splitlines()]
    assert [line["image"] for line in lines] == ["1", "2", "3"]
    refined = {one["id"]: one["segmentation"] for one in json.loads(out.read_text())["annotations"]}
    for line in lines:
        for one in line["annotations"]:
            assert len(one["candidates"]) == len(one["scores"]) == 4
            assert one["selected"] == 1 + int(np.argmax(one["scores"][1:]))
            (ring,) = refined.pop(one["id"])
            taken = decode(one["candidates"][one["selected"]])
            assert decode(frPyObjects([ring], HEIGHT, WIDTH)[0]).tolist() == taken.tolist()
    assert not refined
    measured = command(
        "eval", out, folder / "coarse.json", "--images", folder / "images", "--candidates", offered, "--json"
    )
    assert measured.code == 0, measured.err
    figures = {measure["name"]: measure["value"] for measure in json.loads(measured.out)["measures"]}
    assert figures["IoU of the candidate, taken by refine"] == pytest.approx(figures["IoU"])


def test_the_oracle_needs_ground_truth(command: Command, folder: Path) -> None:
    arguments = ("refine", folder / "coarse.json", "--images", folder / "images", "-o", folder / "out.json")
    said = command(*arguments, "--selection", "oracle")
    assert said.code == 2
    assert "--truth" in said.err
    assert command(*arguments, "--selection", "oracle", "--truth", folder / "coarse.json").code == 0


def test_tables_of_an_ablation(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinetool.ablation.load_backend", lambda *_, **__: BrightBackend())
    arguments = ("ablate", folder / "coarse.json", folder / "coarse.json", "--images", folder / "images")
    said = command(*arguments, "--table", "boxes", "--table", "cascade", "--json")
    assert said.code == 0, said.err
    boxes, cascade = json.loads(said.out)["tables"]
    assert (boxes["name"], cascade["name"]) == ("boxes", "cascade")
    assert boxes["plain"][0]["name"] == "coarse mask"
    assert boxes["plain"][0]["iou"] == 1.0
    assert all(score["objects"] == 3 for score in boxes["plain"])
    markdown = command(*arguments, "--table", "boxes", "--markdown", "--quiet").out
    assert markdown.startswith("**Tight and elastic box (table 2b)**")
    assert markdown.count("\n| ") == 1 + 1 + len(boxes["plain"])


def test_an_unknown_table_is_named(command: Command, folder: Path) -> None:
    said = command("ablate", folder / "coarse.json", folder / "coarse.json", "--table", "nine")
    assert said.code == 2
    assert "'nine'" in said.err
    assert "prompts" in said.err


def test_default_outputs(tmp_path: Path) -> None:
    assert cli.refine.default_output(Path("a/masks.json")) == Path("a/masks.refined.json")
    (tmp_path / "masks").mkdir()
    assert cli.refine.default_output(tmp_path / "masks") == tmp_path / "masks-refined"


# --- a run


def test_refine_writes_the_same_file_with_better_masks(command: Command, folder: Path) -> None:
    said = command("refine", folder / "coarse.json", "--images", folder / "images")
    assert said.code == 0
    assert "3 of 3 masks refined (100%)" in said.out
    assert str(folder / "coarse.refined.json") in said.out
    assert "3/3 images" in said.err
    before = json.loads((folder / "coarse.json").read_text())
    after = json.loads((folder / "coarse.refined.json").read_text())
    assert [a["id"] for a in after["annotations"]] == [10, 20, 30]
    assert [a["area"] for a in after["annotations"]] == [600, 600, 600]
    assert [a["bbox"] for a in after["annotations"]] == [[10 + n, 12 + n, 30, 20] for n in (1, 2, 3)]
    assert after["images"] == before["images"]
    assert after["info"]["refinetool"]["settings"]["passes"] == 1


def test_json_is_all_that_is_on_stdout(command: Command, folder: Path) -> None:
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--json")
    summary = json.loads(said.out)
    assert (summary["images"], summary["masks"], summary["refined"], summary["kept"]) == (3, 3, 3, {})
    assert summary["output"] == str(folder / "coarse.refined.json")


def test_quiet_says_nothing(command: Command, folder: Path) -> None:
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--quiet")
    assert (said.code, said.out, said.err) == (0, "", "")
    assert (folder / "coarse.refined.json").exists()


def test_dry_run_touches_nothing(command: Command, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--dry-run")
    assert said.code == 0
    assert "3 of 3 masks would be refined, in 3 images" in said.out
    assert "model embedded" in said.out
    assert "coarse.refined.json" in said.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("how", [["refine"], ["refine", "--dry-run"], ["corrupt"]], ids=" ".join)
def test_files_that_are_no_masks_are_told(how: list[str], command: Command, tmp_path: Path) -> None:
    save_squares(tmp_path, "masks/a.png", "masks/b.jpg", "images/a.jpg")
    said = command(*how, tmp_path / "masks", "-o", tmp_path / "out")
    assert said.code == 0, said.err
    assert "1 file was not read as a mask: b.jpg;" in said.out


def test_files_that_are_not_measured_are_told(command: Command, tmp_path: Path) -> None:
    save_squares(tmp_path, "found/a.png", "truth/a.png", "truth/b.jpg", "images/a.jpg")
    said = command("eval", tmp_path / "found", tmp_path / "truth", "--workers", 1)
    assert said.code == 0, said.err
    assert f"{tmp_path / 'truth'}: 1 file was not read as a mask: b.jpg;" in said.out.replace("\n", "")


def test_dry_run_beside_an_output_foretells_it(command: Command, folder: Path) -> None:
    arguments = ["refine", folder / "coarse.json", "--images", folder / "images", "--limit", 2]
    assert command(*arguments).code == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = command(*arguments, "--dry-run", "--record", folder / "coarse.refined.json.csv")
    assert said.code == 0, said.err
    assert "coarse.refined.json, which exists already: the run will need --overwrite" in said.out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resuming_a_finished_run_says_so(command: Command, folder: Path) -> None:
    arguments = ["refine", folder / "coarse.json", "--images", folder / "images"]
    assert command(*arguments).code == 0
    said = command(*arguments, "--resume")
    assert said.code == 2
    assert "nothing is left to do; --overwrite refines again" in said.err


def test_one_image_is_no_images(command: Command, folder: Path) -> None:
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--limit", 1)
    assert "1 of 1 mask refined" in said.out
    assert "\n1 image, " in said.out
    assert said.err.startswith("1/1 image, 1 mask, 0 kept")
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--limit", 1, "--dry-run")
    assert "1 of 1 mask would be refined, in 1 image\n" in said.out


@pytest.mark.parametrize(("chosen", "refined"), [("box", 2), ("1", 2), ("7, box", 3), ("lid, red", 1), ("7,", 1)])
def test_only_some_categories_are_refined(command: Command, folder: Path, chosen: str, refined: int) -> None:
    record = json.loads((folder / "coarse.json").read_text())
    record["categories"].append({"id": 7, "name": "lid, red"})
    record["annotations"][1]["category_id"] = 7
    (folder / "coarse.json").write_text(json.dumps(record))
    arguments = ["refine", folder / "coarse.json", "--images", folder / "images"]
    said = command(*arguments, "--categories", chosen, "--record", folder / "masks.csv")
    assert said.code == 0, said.err
    assert f"{refined} of 3 masks refined" in said.out
    assert ("category not named in --categories" in said.out) == (refined < 3)
    assert (folder / "masks.csv").read_text().count("kept:category") == 3 - refined
    said = command(*arguments, "--categories", "bx", "--overwrite")
    assert (said.code, "there is no category 'bx'; did you mean 'box'?" in said.err) == (2, True)


def test_formats_without_names_take_numbers(command: Command, folder: Path) -> None:
    (folder / "labels").mkdir()
    (folder / "labels" / "1.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\n3 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\n")
    arguments = ["refine", folder / "labels", "--images", folder / "images"]
    assert "1 of 2 masks refined" in command(*arguments, "--categories", "3").out
    said = command(*arguments, "--categories", "cat", "--overwrite")
    assert (said.code, "use numbers" in said.err) == (2, True)


def test_a_limited_run_is_continued(command: Command, folder: Path) -> None:
    arguments = ["refine", folder / "coarse.json", "--images", folder / "images", "-o", folder / "out.json"]
    said = command(*arguments, "--limit", 1)
    assert "--resume continues" in said.out
    assert command(*arguments).code == 2
    said = command(*arguments, "--resume")
    assert "1 of them from an earlier run" in said.out
    command(*arguments[:-1], folder / "at-once.json")
    assert (folder / "out.json").read_bytes() == (folder / "at-once.json").read_bytes()


def test_a_resumed_run_says_what_it_does_again(command: Command, folder: Path) -> None:
    arguments = ["refine", folder / "coarse.json", "--images", folder / "images", "-o", folder / "out.json"]
    command(*arguments, "--limit", 1)
    said = command(*arguments, "--resume", "--passes", 2)
    assert "1 image of an earlier run refined again" in said.out
    assert "refined again" not in command(*arguments, "--overwrite").out


def test_an_interrupted_run_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refine_dataset(*_: object, **__: object) -> Summary:
        raise Interrupted("stopped after 3 of 9 images")

    monkeypatch.setattr(running, "refine_dataset", refine_dataset)
    said = command("refine", "my masks.json", "--fresh", "--passes", "2")
    assert said.code == 130
    sentence, hint = said.err.strip().splitlines()
    assert sentence == "stopped after 3 of 9 images"
    typed = shlex.split(hint.removeprefix("Continue with: "))
    assert typed == ["refinetool", "refine", "my masks.json", "--passes", "2", "--resume"]


def test_evaluation_before_and_after(command: Command, folder: Path) -> None:
    coarse, refined = folder / "coarse.json", folder / "coarse.refined.json"
    command("refine", coarse, "--images", folder / "images")
    shutil.rmtree(folder / "images")  # masks are measured without images
    arguments = ["eval", coarse, refined]
    table = command(*arguments, "--coarse", coarse)
    assert table.code == 0
    assert all(word in table.out for word in ("coarse", "refined", "gain", "IoU", "boundary IoU"))
    alone = command(*arguments, "--json")
    report = json.loads(alone.out)
    assert report["measures"][0]["name"] == "IoU"
    assert report["measures"][0]["value"] == pytest.approx(600 / 704)
    assert report["counts"]["scored"] == 3


# --- models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a table with one small file."""
    published = weights.Weights("sam-vit-b", "https://localhost/small.pth", 5, weights_sum(b"12345"), "publisher")
    monkeypatch.setattr(weights, "PUBLISHED", {"sam-vit-b": published})
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def weights_sum(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_models_are_listed(command: Command, cache: Path) -> None:
    (cache / "small.pth").write_bytes(b"12345")
    listed = json.loads(command("models", "list", "--json").out)
    states = {model["name"]: model["state"] for model in listed["models"]}
    assert states["embedded"] == "built in"
    assert states["sam-vit-b"] == "present"
    shown = command("models", "list").out
    assert "embedded" in shown
    assert str(cache) in shown.replace("\n", "")


def test_weights_are_verified(command: Command, cache: Path) -> None:
    assert command("models", "verify").code == 0
    (cache / "small.pth").write_bytes(b"12345")
    good = command("models", "verify", "sam-vit-b")
    assert (good.code, good.err) == (0, "")
    assert "verified" in good.out
    (cache / "small.pth").write_bytes(b"1234X")
    bad = command("models", "verify", "--json")
    assert bad.code == 1
    assert json.loads(bad.out)["sam-vit-b"]["state"] == "damaged"


def test_fetched_weights_are_named(command: Command, cache: Path) -> None:
    (cache / "small.pth").write_bytes(b"12345")
    said = command("models", "fetch", "sam-vit-b")
    assert (said.code, said.err) == (0, "")
    assert str(cache / "small.pth") in said.out


# --- train


def test_training_is_passed_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train_embedded(data: list[Path], output: Path, **arguments: Any) -> Path:
        seen.update(arguments, data=data, output=output)
        arguments["on_progress"](
            SimpleNamespace(
                step=5, steps=9, loss=0.5, iou=0.7, images_per_second=8.0, seconds_left=4.0, validation={"full": 0.8}
            )
        )
        return output / "embedded.safetensors"

    monkeypatch.setitem(sys.modules, "refinetool.train.embedded.run", SimpleNamespace(train_embedded=train_embedded))
    monkeypatch.setattr("refinetool.backends.models.pick_device", lambda _: "cpu")
    said = command("train", "embedded", "--data", "a", "--data", "b", "-o", "out", "--steps", "9", "--from", "w.pt")
    assert said.code == 0
    assert "step 5/9: loss 0.5000, iou 0.7000, full 0.8000" in said.err
    assert str(Path("out") / "embedded.safetensors") in said.out
    assert (seen["data"], seen["output"], seen["start"]) == ([Path("a"), Path("b")], Path("out"), Path("w.pt"))
    assert seen["resume"] is False
    assert seen["settings"].steps == 9
    assert seen["settings"].learning_rate == pytest.approx(TrainSettings().learning_rate * FINE_TUNE_RATE)


# --- the API


def test_the_api_in_three_lines(folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - the fixture puts the fake model in place
    summary = refinetool.refine_dataset(
        folder / "coarse.json", images=folder / "images", output=folder / "refined.json"
    )
    assert summary.refined == 3
    assert (folder / "refined.json").exists()

    monkeypatch.setattr("refinetool.refine.load_backend", lambda *_, **__: BrightBackend())
    refiner = refinetool.load("embedded")
    pixels = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
    pixels[10:30, 20:60] = 220
    coarse = np.zeros((1, HEIGHT, WIDTH), dtype=np.bool_)
    coarse[0, 8:32, 19:61] = True
    (refined,) = refiner.refine_image(pixels, coarse)
    assert refined.status == "refined"
    assert np.array_equal(refined.mask, pixels[..., 0] > 128)


def test_threads_that_wait_leave_the_processor_to_others() -> None:
    """OpenMP reads its policy when torch is imported, so the command sets it first, and not over a user's choice."""
    shown = "print(os.environ['OMP_WAIT_POLICY'])"
    code = f"import os\nfrom refinetool.cli import main\ntry:\n    main()\nfinally:\n    {shown}"
    for chosen, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if chosen is not None:
            environment["OMP_WAIT_POLICY"] = chosen
        done = subprocess.run(
            [sys.executable, "-c", code, "--version"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == expected


def test_shells_can_complete(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in command("--help").out
    monkeypatch.setenv("_REFINETOOL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "refinetool refine --polygon")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert "--polygon-tolerance" in command().out
