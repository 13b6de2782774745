"""Writes CSV tables that a spreadsheet can open without harm."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import BinaryIO

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins with one of these for a formula, which may start programs or send data."""


def write_table(raw: BinaryIO, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as UTF-8; floats get four digits, None is an empty cell.

    Text that a spreadsheet would take for a formula gets a quotation mark in front; numbers stay numbers. Bytes of file
    names that are not Unicode are escaped.
    """
    text = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
    table = csv.writer(text)
    table.writerow(headings)
    for row in rows:
        table.writerow([_cell(value) for value in row])
    text.detach()  # the file is flushed and closed by whoever opened it


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    shown = str(value)
    return f"'{shown}" if shown.startswith(_FORMULA) and not isinstance(value, int) else shown
