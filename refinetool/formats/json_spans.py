"""Finds the byte positions of values in a JSON file, so that a writer can keep all other bytes.

Python's JSON scanner finds where each value ends, but works on text. Therefore a window of the file is decoded as
Latin-1, in which every byte is one character and JSON's own characters are unchanged; values with other characters are
then decoded again as UTF-8. Memory is bounded by the size of the window, or of the longest single value.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from refinetool.errors import DataError

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

WINDOW_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` (half-open) of a file."""

    start: int
    end: int


_scan = json.JSONDecoder().raw_decode
_blank = re.compile(r"[ \t\n\r]*")
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=[^ \t\n\r])")

DEEPEST = 200
"""Levels of nesting. Python's recursion ends after a few hundred more, depending on who calls; COCO needs ten."""

_STREAMED = 10
"""Levels of objects that `skip` walks through member by member."""

_brackets = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')

_UNDECIDED = 16
"""A scanner that stops this close to the end of the window may have met the end instead of an error."""

_CLOSERS = '}]"'
"""A value that ends with one of these is complete; numbers and words are complete only if something follows."""


def refuse_utf16(path: Path, start: bytes) -> None:
    """Raise DataError if a file begins with a byte order mark of UTF-16, in which PowerShell writes."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16; save it as UTF-8.")


class Cursor:
    """A position in a JSON file that moves over values, members of objects and items of arrays.

    Every method starts at a value (whitespace before it is skipped) and ends behind it. Positions are byte offsets.

    Raises:
        DataError: The text is not JSON; the message has line and column.
    """

    def __init__(self, file: BinaryIO, path: Path, window_bytes: int) -> None:
        self._file = file
        self._path = path
        self._window_bytes = window_bytes
        self._text = ""
        self._base = 0  # byte offset of the window
        self._at = 0  # position in the window
        self._complete = False  # the window ends where the file ends
        self._read_on()
        start = self._text[:3].encode("latin-1")
        refuse_utf16(path, start)
        if start == codecs.BOM_UTF8:
            self._at = len(start)

    @property
    def offset(self) -> int:
        return self._base + self._at

    def peek(self) -> str:
        """Return the first character of the next value: `{`, `[`, `"` ...; empty at the end of the file."""
        self._skip_blanks()
        return self._text[self._at : self._at + 1]

    def value(self) -> tuple[Json, Span]:
        """Read the next value, of any type."""
        self.peek()
        found, end = self._scan_value()
        span = Span(self.offset, self._base + end)
        self._at = end
        return found, span

    def skip(self, *, level: int = 0) -> Span:
        """Skip the next value, holding at most one item of it in memory, or one member of its innermost objects."""
        kind = self.peek()
        start = self.offset
        if kind == "[":
            for _ in self.items():
                pass
        elif kind == "{" and level < _STREAMED:
            for _ in self.members():
                self.skip(level=level + 1)
        else:
            self.value()
        return Span(start, self.offset)

    def items(self) -> Iterator[tuple[Json, int, int]]:
        """Yield the items of the next value, an array, each with the offsets of its start and end."""
        self._open("[", "an array")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            item, end = self._scan_value()
            start = self._base + self._at
            self._at = end
            yield item, start, self._base + end
            if not self._next("]"):
                return

    def members(self) -> Iterator[str]:
        """Yield the names in the next value, an object. After each, the caller must read or skip the name's value."""
        self._open("{", "an object")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._error("expected a name in double quotes", self.offset)
            name, end = self._scan_value()
            self._at = end
            if self.peek() != ":":
                raise self._error("expected ':' after a name", self.offset)
            self._at += 1
            yield str(name)
            if not self._next("}"):
                return

    def finish(self) -> None:
        """Check that only whitespace follows."""
        if self.peek():
            raise self._error("something follows the end of the data", self.offset)

    def expect(self, kind: str, what: str) -> None:
        """Check that the next value opens with `kind`."""
        if self.peek() != kind:
            raise DataError(f"{self._path}, {place(self._path, self.offset)}: expected {what}.")

    def _open(self, bracket: str, what: str) -> None:
        self.expect(bracket, what)
        self._at += 1

    def _next(self, closing: str) -> bool:
        """Skip a comma (True), or the closing bracket (False)."""
        comma = _comma.match(self._text, self._at)
        if comma:
            self._at = comma.end()
            return True
        found = self.peek()
        if found == ",":
            self._at += 1
            self.peek()
            return True
        if found == closing:
            self._at += 1
            return False
        raise self._error(f"expected ',' or '{closing}'", self.offset)

    def _skip_blanks(self) -> None:
        while True:
            blanks = _blank.match(self._text, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._text) or self._complete:
                return
            self._read_on()

    def _scan_value(self) -> tuple[Json, int]:
        """Return the value at the cursor and the position in the window behind it."""
        while True:
            try:
                found, end = _scan(self._text, self._at)
                fault, at = "", end
            except json.JSONDecodeError as error:
                fault, at = error.msg, error.pos
            except RecursionError:
                raise self._error(_TOO_DEEP, self.offset) from None
            except ValueError:
                raise self._error("a number has thousands of digits", self.offset) from None
            whole = self._complete or not self._may_be_cut(fault, at)
            if fault and whole:
                raise self._error(fault, self._base + at)
            if whole or (not fault and self._text[end - 1] in _CLOSERS):
                if _too_deep(self._text, self._at, end):
                    raise self._error(_TOO_DEEP, self.offset)
                return (found if self._text.isascii() else self._as_utf8(found, end)), end
            self._read_on()

    def _may_be_cut(self, fault: str, at: int) -> bool:
        """Whether the scanner stopped because the window ends: a word may be incomplete, a number may continue."""
        return fault.startswith("Unterminated string") or len(self._text) - at < _UNDECIDED

    def _as_utf8(self, found: Json, end: int) -> Json:
        piece = self._text[self._at : end]
        if piece.isascii():
            return found
        try:
            again: Json = json.loads(piece.encode("latin-1").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self._error("text that is not UTF-8", self.offset + error.start) from None
        return again

    def _read_on(self) -> None:
        """Drop the text before the cursor and read at least as many bytes as remain."""
        rest = self._text[self._at :]
        self._file.seek(self._base + len(self._text))
        more = self._file.read(max(self._window_bytes, len(rest)))
        self._base, self._text, self._at = self._base + self._at, rest + more.decode("latin-1"), 0
        self._complete = not more

    def _error(self, fault: str, offset: int) -> DataError:
        met_end = offset >= self._base + len(self._text.rstrip(" \t\n\r")) or fault.startswith("Unterminated string")
        if self._complete and met_end:
            fault = "the file ends before the data does; it may have been cut off"
        return DataError(f"{self._path}, {place(self._path, offset)}: not valid JSON: {fault[0].lower()}{fault[1:]}.")


_TOO_DEEP = f"values are nested more than {DEEPEST} levels deep"


def _too_deep(text: str, start: int, end: int) -> bool:
    """Whether a value is nested more than DEEPEST levels."""
    if text.count("[", start, end) + text.count("{", start, end) <= DEEPEST:
        return False
    depth = 0
    for found in _brackets.finditer(text, start, end):
        bracket = found.group()
        depth += bracket in ("[", "{")
        depth -= bracket in ("]", "}")
        if depth > DEEPEST:
            return True
    return False


def place(path: Path, offset: int) -> str:
    """Format a byte offset as `line 3, column 14`; columns count characters, from 1."""
    line, column = 1, 1
    with path.open("rb") as file:
        while offset > 0 and (chunk := file.read(min(offset, WINDOW_BYTES))):
            offset -= len(chunk)
            above, newline, last = chunk.rpartition(b"\n")
            line += above.count(b"\n") + len(newline)
            column = (1 if newline else column) + len(last.translate(None, delete=_CONTINUATIONS))
    return f"line {line}, column {column}"


_CONTINUATIONS = bytes(range(0x80, 0xC0))
"""The bytes of UTF-8 that don't start a character."""


def member_spans(text: str) -> dict[str, Span]:
    """Return the positions of the values in the text of a JSON object, in characters; the last one of a repeated name.

    The text must have been read by a `Cursor` before, so that it is valid.
    """
    spans: dict[str, Span] = {}
    at = text.index("{") + 1
    while True:
        at = _after_blanks(text, at)
        if text[at] == "}":
            return spans
        name, at = _scan(text, _after_blanks(text, at + 1) if text[at] == "," else at)
        start = _after_blanks(text, text.index(":", at) + 1)
        _, at = _scan(text, start)
        spans[name] = Span(start, at)


def _after_blanks(text: str, at: int) -> int:
    blanks = _blank.match(text, at)
    return blanks.end() if blanks else at
