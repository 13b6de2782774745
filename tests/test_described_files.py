"""Files that describe themselves: what is read, and what is said of damaged ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refinetool.errors import WeightsError
from refinetool.modules.described_files import read_described

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.float16)}


def read(path: Path) -> tuple[object, dict[str, torch.Tensor]]:
    return read_described(path, entry="thing", what="a thing", writer="refinetool make thing")


def test_description_and_tensors(tmp_path: Path) -> None:
    said = {"kind": "x", "sizes": [1, 2.5, None]}
    save_file(TENSORS, tmp_path / "whole", metadata={"other": "{", "thing": json.dumps(said)})
    described, tensors = read(tmp_path / "whole")
    assert described == said
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in tensors
    )


@pytest.mark.parametrize("metadata", [None, {"other": "1"}])
def test_a_file_that_says_nothing_is_no_error(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, tmp_path / "silent", metadata=metadata)
    assert read(tmp_path / "silent")[0] == {}


@pytest.mark.parametrize("entry", ['{"kind": ', "[" * 100_000, "9" * 10_000])
def test_damaged_descriptions(tmp_path: Path, entry: str) -> None:
    save_file(TENSORS, tmp_path / "bad", metadata={"thing": entry})
    with pytest.raises(
        WeightsError, match=r"bad: this is not a thing \(.+\); refinetool make thing writes one"
    ) as caught:
        read(tmp_path / "bad")
    assert len(str(caught.value)) < 500


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(WeightsError, match="text: this is not a thing"):
        read(tmp_path / "text")
    with pytest.raises(WeightsError, match="nowhere: a thing can't be read from this file"):
        read(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="a thing can't be read from this file"):
        read(tmp_path)
