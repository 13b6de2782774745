"""Samples of several files, joined by key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinetool.errors import DataError
from refinetool.formats.joining import joined
from refinetool.records import Sample


def samples(keys: list[str]) -> list[Sample]:
    return [Sample(key, Path(key), (2, 3), ()) for key in keys]


keys = st.lists(st.sampled_from("abcdef"), unique=True)


@given(keys, keys)
def test_every_key_comes_once_with_what_each_file_has(first: list[str], second: list[str]) -> None:
    found = dict(joined(samples(first), samples(second)))
    assert {key: set(row) for key, row in found.items()} == {
        key: {number for number, file in enumerate((first, second)) if key in file} for key in {*first, *second}
    }


@pytest.mark.parametrize("first", [["a", "a"], ["a", "b", "a"], ["b", "a", "c", "a"]])
@pytest.mark.parametrize("second", [["a"], ["b", "a"], []])
def test_a_key_that_occurs_twice_is_refused(first: list[str], second: list[str]) -> None:
    """Also where its first occurrence was handed out long ago."""
    with pytest.raises(DataError, match="occurs twice"):
        list(joined(samples(first), samples(second)))
