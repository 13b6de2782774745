"""File names and links can't lead a command to files outside the folders that the user named."""

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import HEIGHT, WIDTH, Command
from PIL import Image

from refinetool.formats.image_files import fault_of_name


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A folder outside the data set, with a copy of its second image and of the masks of a mask folder."""
    outside = tmp_path_factory.mktemp("outside")
    shutil.copy(folder / "images" / "2.png", outside / "secret.png")
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (12, 14, 44, 36))
    mask.save(outside / "mask.png")
    return outside


def test_an_image_that_is_a_link_out_of_its_folder_is_not_read(command: Command, folder: Path, outside: Path) -> None:
    (folder / "images" / "2.png").unlink()
    (folder / "images" / "2.png").symlink_to(outside / "secret.png")
    refine = ["refine", folder / "coarse.json", "--images", folder / "images", "--json"]
    said = command(*refine)
    assert said.code == 1
    assert "--follow-links" in said.err
    summary = json.loads(said.out)
    assert (summary["refined"], summary["kept"]) == (2, {"image-outside": 1})
    followed = command(*refine, "--overwrite", "--fresh", "--follow-links")
    assert (followed.code, json.loads(followed.out)["refined"]) == (0, 3)


def test_a_folder_where_all_images_are_links_is_refused_at_once(
    command: Command, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("store")
    masks = folder / "masks"
    masks.mkdir()
    for number in (1, 2, 3):
        (folder / "images" / f"{number}.png").rename(elsewhere / f"{number}.png")
        (folder / "images" / f"{number}.png").symlink_to(elsewhere / f"{number}.png")
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(255, (11, 11, 45, 36))
        mask.save(masks / f"{number}.png")
    for coarse in (folder / "coarse.json", masks):
        said = command("refine", coarse, "--images", folder / "images")
        assert said.code == 1
        assert "--follow-links" in said.err
        assert said.err.count("\n") == 1
        assert sorted(path.name for path in folder.iterdir()) == ["coarse.json", "images", "masks"]
    assert command("eval", folder / "coarse.json", folder / "coarse.json", "--images", folder / "images").code == 0


def test_links_within_the_folder_and_to_the_folder_are_followed(command: Command, folder: Path) -> None:
    (folder / "images" / "store").mkdir()
    (folder / "images" / "2.png").rename(folder / "images" / "store" / "b.png")
    (folder / "images" / "2.png").symlink_to("store/b.png")
    (folder / "photos").symlink_to("images")
    said = command("refine", folder / "coarse.json", "--images", folder / "photos", "--json")
    assert (said.code, json.loads(said.out)["refined"]) == (0, 3)


def test_a_folder_of_links_out_of_it_is_followed_only_when_asked(command: Command, folder: Path, outside: Path) -> None:
    linked = folder / "linked"
    linked.mkdir()
    (linked / "2.png").symlink_to(outside / "mask.png")
    for arguments in (["refine", linked, "--images", folder / "images"], ["eval", linked, linked]):
        said = command(*arguments)
        assert said.code == 1
        assert "--follow-links" in said.err
        assert said.err.count("\n") == 1
        assert command(*arguments, "--follow-links").code == 0


def test_the_size_of_an_image_outside_is_not_read_either(command: Command, folder: Path, outside: Path) -> None:
    document = json.loads((folder / "coarse.json").read_text())
    for image in document["images"]:
        del image["width"], image["height"]
    (folder / "coarse.json").write_text(json.dumps(document))
    (folder / "images" / "2.png").unlink()
    (folder / "images" / "2.png").symlink_to(outside / "secret.png")
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--json")
    assert said.code == 1
    assert json.loads(said.out)["refined"] == 2


@pytest.mark.parametrize("name", ["../outside/secret", "/etc/passwd", "a\0b", "x" * 300, "\ud800"])
def test_the_image_ids_of_results_are_no_way_out(command: Command, folder: Path, name: str) -> None:
    (folder / "outside").mkdir()
    shutil.copy(folder / "images" / "2.png", folder / "outside" / "secret.jpg")
    mask = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
    records = [{"image_id": 1, "category_id": 1, "segmentation": mask, "score": 1.0}]
    records.append(records[0] | {"image_id": name})
    (folder / "results.json").write_text(json.dumps(records))
    said = command("refine", folder / "results.json", "--images", folder / "images")
    assert said.code == 1
    assert "file name" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a/b.jpg", None),
        ("a b..jpg", None),
        (os.fsdecode(b"caf\xe9.jpg"), None),  # Latin-1, as on old disks
        ("a/../../b.jpg", "leads out"),
        ("a\\..\\..\\b.jpg", "leads out"),
        ("C:b.jpg", "leads out"),
        ("a\0.jpg", "NUL"),
        ("\ud800.jpg", "Unicode"),
        ("ä" * 150, "longer"),
        ("a/" * 600, "longer"),
    ],
)
def test_file_names(name: str, fault: str | None) -> None:
    found = fault_of_name(name)
    assert found is None if fault is None else fault in (found or "")


@pytest.mark.parametrize("target", ["3.png", "nowhere.png"])
def test_a_link_that_leads_nowhere_is_said_at_once(command: Command, folder: Path, target: str) -> None:
    masks = folder / "masks"
    masks.mkdir()
    Image.new("L", (WIDTH, HEIGHT), 255).save(masks / "1.png")
    (masks / "3.png").symlink_to(target)
    said = command("refine", masks, "--images", folder / "images", "--follow-links")
    assert (said.code, said.err) == (1, f"{masks / '3.png'}: is a link that leads nowhere; mend it, or remove it.\n")


def test_files_that_are_links_to_themselves(command: Command, folder: Path) -> None:
    loop = folder / "loop.json"
    loop.symlink_to("loop.json")
    said = command("refine", loop, "--images", folder / "images")
    assert (said.code, said.err.count("\n")) == (1, 1), said
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "-o", loop)
    assert said.code == 0, said.err
    assert not loop.is_symlink()
    assert len(json.loads(loop.read_text())["annotations"]) == 3
