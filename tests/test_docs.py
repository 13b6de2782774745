"""What the documentation says is so: pages written from the code are current, commands run, names and links exist."""

import ast
import contextlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from commands import Command
from fakes import BrightBackend
from packaging.requirements import Requirement
from PIL import Image

from refinetool import cli, refine
from refinetool.backends import models
from refinetool.refine import Refiner, load_refiner
from refinetool.running import identity, runners
from refinetool.settings import RefineSettings
from refinetool.statuses import Reason

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import generate_reference  # noqa: E402 - docs/ is no package

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"pip", "uv", "source"}
"""Commands of other tools, which set up what a test has already."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# --- reading pages


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; the rest of the line after the language is ignored."""
    return [body for info, body in FENCE.findall(page.read_text()) if info.split(" ")[0] == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command in the blocks of a page, in order, whatever the block calls its language."""
    for block in (*blocks(page, "bash"), *blocks(page, "")):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.partition("#")[0].split("&&"):
                words = shlex.split(command)
                while words and ("=" in words[0] or words[:2] == ["uv", "run"]):  # a variable, or uv in front
                    words = words[1 + (words[0] == "uv") :]
                if words:
                    yield words


def refinetool_lines(page: Path) -> list[list[str]]:
    return [words[1:] for words in command_lines(page) if words[0] == "refinetool"]


# --- pages written from the code


@pytest.mark.parametrize("page", generate_reference.PAGES, ids=name_of)
def test_the_generated_reference_is_current(page: Path) -> None:
    assert page.read_text() == generate_reference.PAGES[page](), "run python docs/generate_reference.py"


# --- names


@cache
def root() -> Any:
    return typer.main.get_command(cli.app)


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words begin with, and the words that are left for it."""
    command = root()
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


@cache
def known_options() -> dict[str, frozenset[str]]:
    """Every option of any command with its choices, none where it takes anything else."""
    for_all = ("--help", "-h", "--version", "--install-completion")
    known: dict[str, frozenset[str]] = dict.fromkeys(for_all, frozenset())
    for command in generate_reference.commands(cli.app):
        for option in command.parameters:
            choices = frozenset(re.findall(r"`([a-z0-9-]+)`", option.values))
            known |= {flag: known.get(flag, frozenset()) | choices for flag in option.flags}
    return known


@each_page
def test_commands_in_blocks_can_be_parsed(page: Path) -> None:
    for words in refinetool_lines(page):
        command, arguments = find_command(words)
        if words == ["--version"]:
            continue
        assert not hasattr(command, "commands"), f"refinetool {shlex.join(words)} is no command"
        command.make_context(command.name, list(arguments))  # raises for an unknown option or value


@each_page
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    text = prose(page)
    for spoken in re.findall(r"`refinetool ([^`]+)`", text):
        words = spoken.split()
        command, rest = find_command(words)
        assert len(rest) < len(words) or words[0].startswith("-"), f"refinetool {spoken}"
        assert not hasattr(command, "commands") or not rest or rest[0].startswith("-"), f"refinetool {spoken}"
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", re.sub(r"\(#[^)]*\)|\.md#[^)]*\)", "", text)):
        assert option in known_options(), option
    for option, value in re.findall(r"`(--[a-z-]+) ([^ `]+)`", text):
        assert not known_options()[option] or value in known_options()[option], f"{option} {value}"


@each_page
def test_names_of_models_in_commands_exist(page: Path) -> None:
    for words in refinetool_lines(page):
        for option, value in pairwise(words):
            if option == "--model":
                assert value in models.MODELS


@each_page
def test_python_in_the_pages_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, name_of(page), "exec")


# --- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = set(), [ROOT / "README.md", DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.is_file():
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", prose(page))
        waiting += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= reached


# --- statuses, messages, dependencies, layers


@cache
def sources() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in (ROOT / "refinetool").rglob("*.py")]


def test_every_reason_is_documented() -> None:
    documented = set(
        re.findall(r"^\| `kept:([a-z-]+)`", (DOCS / "reference" / "statuses.md").read_text(), re.MULTILINE)
    )
    assert documented == set(Reason)


def test_the_messages_explained_are_those_of_the_code() -> None:
    messages = [text for tree in sources() for node in ast.walk(tree) for text in literal_text(node)]
    page = (DOCS / "how-to" / "troubleshooting.md").read_text()
    quoted = [
        text for cell in re.findall(r"^\| (`.+?`) \| ", page, re.MULTILINE) for text in re.findall("`(.+?)`", cell)
    ]
    assert len(quoted) > 50
    for text in quoted:
        pattern = ".*".join(re.escape(piece) for piece in text.split("…"))
        assert any(re.search(pattern, message) for message in messages), text


def literal_text(node: ast.AST) -> list[str]:
    """A string, with a gap for each value that is put into it."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            return ["".join(str(value.value) if isinstance(value, ast.Constant) else "\0" for value in values)]
    return []


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=~! ]", dependency)[0] for dependency in project["dependencies"]}
    table = re.findall(r"^\| (`.+?`) \| ", (DOCS / "design" / "dependencies.md").read_text(), re.MULTILINE)
    assert {name for cell in table for name in re.findall("`(.+?)`", cell)} == required


def test_the_lock_holds_every_dependency_at_a_version_that_is_allowed() -> None:
    """Not that it is the newest: what a registry offers changes from day to day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = dict(re.findall(r"^([\w.-]+)==([^ ]+) ", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = [Requirement(text) for text in (*project["project"]["dependencies"], *project["dependency-groups"]["dev"])]
    assert len(pinned) > len(wanted)
    for requirement in wanted:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_layers_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [layer.replace("refinetool.", "") for layer in contracts[0]["layers"]]
    assert "\n".join(layers) + "\n" in blocks(DOCS / "design" / "flow.md", "text")


# --- running what the pages say


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Path]:
    """The working folder, with a small data set of each kind under the names that the pages use."""
    coco(tmp_path)
    voc(tmp_path / "VOC2012")
    voc(tmp_path / "truth")
    for name in ("masks", "truth-masks"):
        save_map(tmp_path / name / "street" / "1.png", 255)
        save_map(tmp_path / name / "cat.png", 255)
    save_map(tmp_path / "DAVIS" / "Annotations" / "480p" / "bear" / "00000.png", 1, 2)
    save_map(tmp_path / "index-maps" / "cat.png", 1, 2)
    save_map(tmp_path / "carvana" / "car1_mask.png", 255)
    save_map(tmp_path / "mask.png", 255)
    photos = ("images/street.jpg", "images/cat.jpg", "DAVIS/JPEGImages/480p/bear/00000.jpg", "carvana/car1.jpg")
    for image in (*photos, "photo.jpg"):
        save_image(tmp_path / image)
    others(tmp_path)
    with contextlib.chdir(tmp_path):
        yield tmp_path


def others(folder: Path) -> None:
    """A small data set of YOLO, LabelMe, COCO panoptic and Cityscapes."""
    for image in ("yolo-set/images/a.jpg", "labelled/a.jpg", "images/7.jpg", "leftImg8bit/a_leftImg8bit.png"):
        save_image(folder / image)
    (folder / "yolo-set" / "labels").mkdir()
    (folder / "yolo-set" / "labels" / "a.txt").write_text("0 0.1 0.1 0.4 0.1 0.4 0.5 0.1 0.5\n")
    shapes = [{"label": "cat", "points": [[9, 8], [31, 8], [31, 32], [9, 32]], "shape_type": "polygon"}]
    (folder / "labelled" / "a.json").write_text(json.dumps({"shapes": shapes, "imagePath": "a.jpg"}))
    segments = [{"id": 1, "category_id": 1, "iscrowd": 0, "area": 528, "bbox": [9, 8, 22, 24]}]
    annotation = {"image_id": 7, "file_name": "7.png", "segments_info": segments}
    images = [{"id": 7, "file_name": "7.jpg", "height": 60, "width": 80}]
    record = {"images": images, "annotations": [annotation], "categories": [{"id": 1, "isthing": 1}]}
    (folder / "panoptic_val.json").write_text(json.dumps(record))
    save_map(folder / "panoptic_val" / "7.png", 1)
    with Image.open(folder / "panoptic_val" / "7.png") as grey:
        Image.merge("RGB", (grey, Image.new("L", grey.size), Image.new("L", grey.size))).save(grey.filename)
    deep = np.zeros((60, 80), dtype=np.uint16)
    deep[8:32, 9:31] = 26001
    (folder / "gtFine").mkdir()
    Image.fromarray(deep).save(folder / "gtFine" / "a_gtFine_instanceIds.png")


def save_image(path: Path) -> None:
    """Two bright squares on a dark ground."""
    pixels = np.full((60, 80, 3), 40, dtype=np.uint8)
    pixels[10:30, 10:30] = pixels[35:55, 45:70] = 220
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_map(path: Path, *values: int) -> None:
    """Loose masks of the squares, as a grey PNG."""
    pixels = np.zeros((60, 80), dtype=np.uint8)
    for value, (rows, columns) in zip(
        values, ((slice(8, 32), slice(9, 31)), (slice(34, 57), slice(44, 72))), strict=False
    ):
        pixels[rows, columns] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def coco(folder: Path) -> None:
    """`annotations.json`, `coarse.json`, `truth.json` and `results.json`, with images in `photos` and `images`."""
    images, annotations = [], []
    for number in (1, 2):
        for place in ("photos", "images"):
            save_image(folder / place / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
        ring = [9, 8, 31, 8, 31, 32, 9, 32]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": [ring]})
    names = [{"id": 1, "name": "person"}]
    record = json.dumps({"images": images, "annotations": annotations, "categories": names})
    for name in ("annotations", "coarse", "truth"):
        (folder / f"{name}.json").write_text(record)
    result = {
        "image_id": 1,
        "category_id": 1,
        "score": 0.5,
        "segmentation": {"size": [60, 80], "counts": [550, 20, 4230]},
    }
    (folder / "results.json").write_text(json.dumps([result]))


def voc(root: Path) -> None:
    save_image(root / "JPEGImages" / "2007_000001.jpg")
    for name in ("SegmentationClass", "SegmentationObject"):
        save_map(root / name / "2007_000001.png", 1, 2)


RUN = ("coco", "voc", "mask-folders", "other-formats", "resume-and-large-datasets", "tuning", "corrupt", "evaluate")


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("page", [DOCS / "how-to" / f"{name}.md" for name in RUN], ids=name_of)
def test_the_commands_of_a_page_run_in_order(command: Command, page: Path) -> None:
    assert refinetool_lines(page)
    for words in refinetool_lines(page):
        said = command(*words)
        assert said.code == 0, f"refinetool {shlex.join(words)}\n{said.err}"


def test_the_python_page_runs_in_order(sandbox: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    del command  # its fake model also serves refine_dataset

    def load(name: str, *, settings: RefineSettings, **_: object) -> Refiner:
        models.find_model(name)
        return Refiner(BrightBackend(), settings)

    monkeypatch.setattr(refine, "load_refiner", load)
    names: dict[str, Any] = {}
    for block in blocks(DOCS / "how-to" / "python-api.md", "python"):
        exec(compile(block, "python-api.md", "exec"), names)
    assert names["statuses"] == dict.fromkeys((1, 2), "refined")
    assert names["doubtful"] == []
    assert names["report"].measures[0].name == "IoU"
    assert (sandbox / "refined.json").is_file()


def tutorial(command: Command) -> list[str]:
    """Do what the tutorial says, in the order of the page; returns what the commands wrote."""
    said = []
    for info, body in FENCE.findall((DOCS / "tutorial.md").read_text()):
        language, _, file = info.partition(" ")
        if language == "json":
            Path(file).write_text(body)
        elif language == "python":
            exec(compile(body, "tutorial.md", "exec"), {})
        else:
            for words in (shlex.split(line) for line in body.splitlines()):
                if words[0] not in NOT_RUN:
                    assert words[0] == "refinetool", words
                    result = command(*words[1:])
                    assert result.code == 0, f"{shlex.join(words)}\n{result.err}"
                    said.append(result.out)
    return said


def test_the_tutorial_runs(command: Command, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        said = tutorial(command)
    assert len(list((tmp_path / "refinetool-demo" / "before-after").glob("*.png"))) == 5
    assert not (tmp_path / "refined.json.journal.jsonl").exists()
    assert "3 scored" in said[-1]


@pytest.mark.slow
@pytest.mark.skipif(not models.embedded_weights().is_file(), reason="no embedded weights")
def test_the_tutorial_runs_with_the_embedded_model(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "load_refiner", load_refiner)
    monkeypatch.setattr(identity, "pick_device", models.pick_device)
    monkeypatch.setattr(identity, "pick_precision", models.pick_precision)
    with contextlib.chdir(tmp_path):
        said = tutorial(command)
    assert "IoU" in said[-1]
