"""Seeded damage to valid data sets, for the fuzz test: of bytes, of JSON values, of PNG chunks, and of the folders."""

import json
import os
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 20, 1.5, -0.0, 1e308, 1e-320, 2**31, 2**32, 2**63, 10**30, 10**400),
    *(float("nan"), float("inf"), "", "1", "x" * 300, "../secret.png", "/etc/passwd", "a\0b", "\ud800", "\x1b[31m"),
    *([], {}, [[]], [None], [[1, 2]], [[0, 0, 9, 0, 9, 9]], [[1e9, 0, 9, 0, 9, -1e9]], [[float("nan")] * 6]),
    *({"size": [60, 80], "counts": [4800]}, {"size": [60, 80], "counts": [0, 4800]}, {"size": [80, 60], "counts": "0"}),
    *({"size": [60, 80], "counts": [100, 50, 4650]}, {"size": [1_000_000, 1_000_000], "counts": [0, 10**12]}),
    *({"size": [60, 80], "counts": "QQQQ"}, {"size": [60, 80]}, {"counts": []}, {"size": "60", "counts": {}}),
    *({"size": [60, 80], "counts": [-1, 4801]}, {"size": [2**31, 2], "counts": [0, 2**32]}),
    [[x for n in range(2000) for x in (n % 80, 60 * (n % 2))]],
)
NAMES = ("id", "image_id", "category_id", "segmentation", "area", "bbox", "iscrowd", "file_name", "width", "height")
NAMES += ("score", "info", "coco_url", "segments_info", "images", "annotations", "categories", "refinetool", "size")


def mutate(folder: Path, rng: random.Random) -> None:
    """Damage a data set in one to three places."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        documents = [path for path in files if path.suffix == ".json"]
        pictures = [path for path in files if path.suffix == ".png"]
        if documents and rng.random() < 0.6:
            target = documents[0]
            change = rng.choice((_values, _values, _values, _values, _structure, _bytes))
        elif pictures and rng.random() < 0.7:
            target, change = rng.choice(pictures), rng.choice((_chunks, _chunks, _bytes))
        else:
            target, change = rng.choice(files), rng.choice((_bytes, _place))
        change(target, rng)


def _bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 2, 4, 16, 100))
    match rng.randrange(5):
        case 0:
            for n in range(at, min(at + length, len(data))):
                data[n] = rng.randrange(256)
        case 1:
            del data[at : at + length]
        case 2:
            data[at:at] = rng.randbytes(length)
        case 3:
            data[at:at] = data[at : at + length * 10]
        case _:
            del data[at:]
    path.write_bytes(bytes(data))


def _values(path: Path, rng: random.Random) -> None:
    """Replace, remove, rename or add values of a JSON document."""
    document = _parsed(path)
    holder, name = _some_place(document, rng)
    if holder is None:
        return
    match rng.randrange(6):
        case 0:
            del holder[name]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(name)
        case 2 if isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), holder[name])
        case 3 if isinstance(holder, dict):
            holder[rng.choice(NAMES)] = rng.choice(VALUES)
        case _:
            holder[name] = rng.choice(VALUES)
    path.write_text(json.dumps(document, indent=rng.choice((None, 1))), encoding="utf-8")


def _structure(path: Path, rng: random.Random) -> None:
    """Change the text of a JSON document in ways that a value can't: repeated names, nesting, encodings, blanks."""
    text = path.read_text(encoding="utf-8", errors="replace")
    at = rng.choice([n for n, character in enumerate(text) if character in '{[,:"'] or [0])
    depth = rng.choice((50, 300, 1500, 20_000))
    changed = (
        text[:at] + rng.choice('{}[],:" \n\0é') + text[at:],
        text.replace('"area"', '"id"', 1),
        text.replace('"images"', '"annotations"', 1),
        text.replace('"info"', '"infos"', 1).replace("{", '{"info": ' + "[" * depth + "]" * depth + ", ", 1),
        text.replace('"id"', '"more": ' + '{"a": ' * depth + "1" + "}" * depth + ', "id"', rng.choice((1, -1))),
        "\ufeff" + text,
        text + text,
        text.replace(" ", "\t"),
        text.replace("1", "1" * rng.choice((30, 400, 5000)), 1),
    )
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
    path.write_bytes(rng.choice(changed).encode(encoding, "replace"))


def _chunks(path: Path, rng: random.Random) -> None:
    """Change a chunk of a PNG, with a correct checksum."""
    data = path.read_bytes()
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    if not chunks:
        return _bytes(path, rng)
    n = rng.randrange(len(chunks))
    name, body = chunks[n]
    match rng.randrange(6):
        case 0 if name == b"IHDR" and len(body) == 13:
            width, height = (rng.choice((0, 1, 80, 60, 2**15, 2**31, 2**32 - 1)) for _ in range(2))
            depth, colour, zipped, filtered, interlaced = rng.choices(range(17), k=5)
            header = [width, height, 8, *body[9:13]]
            header = rng.choice(
                (header, [80, 60, depth, colour, zipped, filtered, interlaced], [80, 60, 8, 3, 0, 0, 1])
            )
            chunks[n] = (name, struct.pack(">IIBBBBB", *header))
        case 1:
            del chunks[n]
        case 2:
            chunks.insert(n, chunks[n])
        case 3:
            kinds = (b"pHYs", b"acTL", b"fcTL", b"fdAT", b"tRNS", b"PLTE", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"eXIf")
            chunks.insert(min(n + 1, len(chunks)), (rng.choice(kinds), rng.randbytes(rng.choice((0, 1, 4, 8, 9, 26)))))
        case 4:
            chunks.insert(min(n + 1, len(chunks)), (b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000), 1)))
        case _:
            changed = bytearray(body or b"\0")
            changed[rng.randrange(len(changed))] = rng.randrange(256)
            chunks[n] = (name, bytes(changed))
    path.write_bytes(
        data[:8]
        + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
    )
    return None


def _place(path: Path, rng: random.Random) -> None:
    """Remove a file, put something else in its place, or rename it."""
    secret = path.parent.parent.parent / "secret.png"
    if not secret.exists():
        shutil.copy(path, secret)
    others = (
        "x" * 250 + ".png",
        "\x1b[31m.png",
        os.fsdecode(b"caf\xe9.png"),
        ".hidden.png",
        "=1.png",
        "1.PNG",
        "a b.jpg",
    )
    match rng.randrange(6):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            path.write_bytes(b"")
        case 3:
            path.unlink()
            path.symlink_to(rng.choice((secret, path, Path("1.png"), Path("/dev/null"))))
        case 4:
            path.rename(path.with_name(rng.choice(others)))
        case _:
            shutil.copy(path, path.with_name(rng.choice(others)))


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}


def _some_place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """Return a container in a document and a key in it, which lead on or are a leaf."""
    holder: Any = None
    name: Any = None
    here = document
    while isinstance(here, dict | list) and here:
        holder = here
        name = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        here = holder[name]
        if holder is not document and rng.random() < 0.3:
            break
    return holder, name
