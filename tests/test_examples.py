"""The scripts in examples/ run as their first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrays_are_refined() -> None:
    first, second = run("refine_arrays.py").splitlines()
    assert first.startswith("refined: ")
    assert "expects an IoU of 0." in second


def test_a_coco_file_is_made_and_refined(tmp_path: Path) -> None:
    said = run("masks_to_coco.py", tmp_path)
    assert said.startswith("1 of 1 masks refined")
    assert (tmp_path / "refined.json").is_file()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_run_here(script: Path) -> None:
    assert f'run("{script.name}"' in Path(__file__).read_text()
