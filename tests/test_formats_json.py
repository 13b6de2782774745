"""The walk through JSON text: same values as the standard library, exact spans, through windows of any size."""

import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refinetool.errors import DataError
from refinetool.formats.json_spans import Cursor, Json, Span, member_spans, place

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

NAMES = ["", "a", "segmentation", "ü", "\u2028", "\U0001f600", '"', "\\", "/", "\n", "[{", ",:", "A" * 50]
ATOMS = [*NAMES, None, True, False, 0, 7, -1, 10**17, 0.1, -0.0, 1e16, 1.5e-7, 5e300]


def document(choose: random.Random, depth: int) -> Json:
    """Any JSON value; quicker than hypothesis' own recursive strategies."""
    kind = choose.random()
    if depth == 0 or kind < 0.4:
        return choose.choice(ATOMS)
    if kind < 0.7:
        return [document(choose, depth - 1) for _ in range(choose.randrange(4))]
    return {choose.choice(NAMES): document(choose, depth - 1) for _ in range(choose.randrange(4))}


seeds = st.integers(0, 2**32)
documents = seeds.map(lambda seed: document(random.Random(seed), 4))
lists = seeds.map(lambda seed: [document(random.Random(seed), n % 4) for n in range(seed % 6)])
objects = seeds.map(
    lambda seed: {name: document(random.Random(seed), n % 4) for n, name in enumerate(NAMES[: seed % 9])}
)


def render(value: Json, style: random.Random) -> str:
    """JSON text with blanks, escapes and line breaks of all kinds."""

    def blank() -> str:
        return style.choice(["", "", " ", "\n", "\t ", "\r\n  "])

    if isinstance(value, dict):
        members = (f"{render(k, style)}{blank()}:{blank()}{render(v, style)}{blank()}" for k, v in value.items())
        return "{" + blank() + ("," + blank()).join(members) + "}"
    if isinstance(value, list):
        items = (f"{render(item, style)}{blank()}" for item in value)
        return "[" + blank() + ("," + blank()).join(items) + "]"
    text = json.dumps(value, ensure_ascii=style.random() < 0.5)
    if isinstance(value, str):
        text = text.replace("/", style.choice(["/", r"\/", r"\u002f"]))
    return text


def cursor(data: bytes, window_bytes: int) -> Cursor:
    return Cursor(io.BytesIO(data), Path("x.json"), window_bytes)


def utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")  # lone surrogates can't stand in a file


@given(documents, seeds, st.integers(1, 40))
@example([1, 23, 456], 0, 1)
@example({"ü": "\u2028", "\U0001f600": ["é"]}, 1, 3)
@settings(max_examples=200)
def test_values_and_spans_are_those_of_the_text_whatever_the_window(value: Json, seed: int, window: int) -> None:
    data = b" \n" + utf8(render(value, random.Random(seed))) + b"\n"
    walk = cursor(data, window)
    found, span = walk.value()
    walk.finish()
    assert found == json.loads(data)
    assert data[: span.start].strip() == data[span.end :].strip() == b""


@given(lists, seeds, st.integers(1, 40))
def test_items_come_with_their_own_bytes(value: list[Json], seed: int, window: int) -> None:
    data = utf8(render(value, random.Random(seed)))
    walk = cursor(data, window)
    pieces = [(item, data[start:end]) for item, start, end in walk.items()]
    walk.finish()
    expected = json.loads(data)
    assert [item for item, _ in pieces] == expected
    assert [json.loads(piece) for _, piece in pieces] == expected
    assert all(piece == piece.strip() for _, piece in pieces)


@given(objects, seeds, st.integers(1, 40))
def test_members_can_be_read_or_skipped(value: dict[str, Json], seed: int, window: int) -> None:
    data = utf8(render(value, random.Random(seed)))
    expected = json.loads(data)
    walk, found = cursor(data, window), {}
    for name in walk.members():
        if len(found) % 2:
            span = walk.skip()
            found[name] = json.loads(data[span.start : span.end])
        else:
            found[name], _ = walk.value()
    walk.finish()
    assert found == expected


@given(objects, seeds)
def test_member_spans_cut_out_the_values(value: dict[str, Json], seed: int) -> None:
    text = utf8(render(value, random.Random(seed))).decode()
    expected = json.loads(text)
    assert {name: json.loads(text[span.start : span.end]) for name, span in member_spans(text).items()} == expected


def test_of_a_name_that_stands_twice_the_last_counts() -> None:
    text = '{"a": 1, "a": [2]}'
    assert member_spans(text) == {"a": Span(14, 17)}
    assert json.loads(text) == {"a": [2]}


def test_a_byte_order_mark_is_passed_over() -> None:
    found, span = cursor(b"\xef\xbb\xbf[1]", 4).value()
    assert (found, span) == ([1], Span(3, 6))


def test_a_long_list_is_walked_in_a_small_window() -> None:
    data = b"[" + b", ".join(b'{"n": %d}' % n for n in range(5000)) + b"]"
    walk = cursor(data, 64)
    longest = 0
    for _ in walk.items():
        longest = max(longest, len(walk._text))
    assert longest < 200


@pytest.mark.parametrize(
    ("text", "where", "fault"),
    [
        ('{"a": 1,\n "b": tru}', "line 2, column 7", "expecting value"),
        ('{"a": 1\n "b": 2}', "line 2, column 2", "expected ',' or '}'"),
        ('{"a": [1, 2', "line 1, column 12", "cut off"),
        ('{"a": "text', "line 1, column 7", "cut off"),
        ('{"a"\n\n:', "line 3, column 2", "cut off"),
        ('{"é": "é", x}', "line 1, column 12", "expected a name in double quotes"),
        ('{"a" 1}', "line 1, column 6", "expected ':'"),
        ('{"a": 1} {', "line 1, column 10", "something follows"),
        ('{"a": "\x01"}', "line 1, column 8", "invalid control character"),
        ('{"a": [' + "[" * 100_000, "line 1, column 8", "nested more than"),
        ('{"a": ' + "1" * 5000 + "}", "line 1, column 7", "digits"),
    ],
)
@pytest.mark.parametrize("window", [3, 1 << 20])
def test_faults_are_named_with_line_and_column(text: str, where: str, fault: str, window: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with path.open("rb") as file, pytest.raises(DataError, match=fault) as raised:
        walk = Cursor(file, path, window)
        for _ in walk.members():
            if walk.peek() == "[":
                for _ in walk.items():
                    pass
            else:
                walk.value()
        walk.finish()
    assert str(raised.value).startswith(f"{path}, {where}: not valid JSON: ")


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes('["ok",\n "caf\xe9"]'.encode("latin-1"))
    with (
        path.open("rb") as file,
        pytest.raises(DataError, match="line 2, column 6: not valid JSON: text that is not UTF"),
    ):
        list(Cursor(file, path, 1 << 20).items())


def test_places_count_lines_and_characters(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("äö\nü1", encoding="utf-8")
    assert place(path, 0) == "line 1, column 1"
    assert place(path, 4) == "line 1, column 3"
    assert place(path, 7) == "line 2, column 2"
