"""PNGs as numbers, against Pillow and against files put together by hand."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from refinetool.errors import DataError, MaskError
from refinetool.formats.png import read_header, read_samples, with_samples
from refinetool.formats.rasters import check_headers, read_values, with_values

GREY, COLOURS, PALETTE = 0, 2, 3


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def packed(values: np.ndarray, depth: int) -> bytes:
    """Rows of a filter byte and `depth` bits a pixel, spelled out as a text of bits."""
    rows = b""
    for row in values:
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return rows


def write_png(path: Path, values: np.ndarray, *, depth: int, colour: int, interlaced: bool = False) -> Path:
    height, width = values.shape
    if interlaced:  # Adam7: seven pictures of every so-manieth pixel
        steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
        pixels = b"".join(packed(values[y::dy, x::dx], depth) for x, y, dx, dy in steps if values[y::dy, x::dx].size)
    else:
        pixels = packed(values, depth)
    squeezed = zlib.compress(pixels)
    pieces = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))]
    if colour == PALETTE:
        pieces.append(chunk(b"PLTE", bytes(range(3 * 2 ** min(depth, 6)))))
        pieces.append(chunk(b"tRNS", b"\0\x80"))
    pieces += [chunk(b"IDAT", squeezed[:5]), chunk(b"IDAT", squeezed[5:])]
    pieces += [chunk(b"tEXt", b"Software\0by hand"), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(pieces))
    return path


def other_chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """Name and body of every chunk but the pixels and the header."""
    data, at, found = path.read_bytes(), 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(name + body),)
        found.append((name, body))
        at += length + 12
    return [(name, body) for name, body in found if name not in (b"IDAT", b"IHDR")]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour", [GREY, PALETTE])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_any_depth_is_read_and_written_back(depth: int, colour: int, interlaced: bool, tmp_path: Path) -> None:
    choose = np.random.default_rng(depth)
    old, new = choose.integers(0, min(2**depth, 64), (2, 9, 13), dtype=np.uint8)
    path = write_png(tmp_path / "old.png", old, depth=depth, colour=colour, interlaced=interlaced)
    read = read_values(path)
    assert read.dtype == np.uint8
    assert np.array_equal(read, old)
    again = tmp_path / "new.png"
    again.write_bytes(with_values(path, new))
    assert np.array_equal(read_values(again), new)
    assert read_header(again) == read_header(path)
    assert other_chunks(again) == other_chunks(path)
    with Image.open(again) as image:
        image.load()
        assert image.mode == {GREY: "1" if depth == 1 else "L", PALETTE: "P"}[colour]


def test_pillows_palette_files_come_back_with_palette_and_texts(tmp_path: Path) -> None:
    texts = PngInfo()
    texts.add_text("source", "voc")
    image = Image.new("P", (5, 3), 2)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(tmp_path / "old.png", pnginfo=texts, transparency=0)
    (tmp_path / "new.png").write_bytes(with_values(tmp_path / "old.png", np.full((3, 5), 1, dtype=np.uint8)))
    with Image.open(tmp_path / "new.png") as new:
        assert (new.mode, new.getpalette(), new.info["source"]) == ("P", image.getpalette()[:12], "voc")
        assert new.convert("RGB").getpixel((0, 0)) == (128, 0, 0)


def test_what_can_not_be_refined_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 26001, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: has 16 bits per pixel; only masks of up to 8"):
        read_values(tmp_path / "deep.png")


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA"])
def test_several_samples_per_pixel_are_read_and_written_back(mode: str, tmp_path: Path) -> None:
    old, new = np.random.default_rng(0).integers(0, 255, (2, 9, 13, len(mode)), dtype=np.uint8)
    Image.fromarray(old, mode).save(tmp_path / "old.png", dpi=(72, 72))
    assert (read_samples(tmp_path / "old.png") == old).all()
    (tmp_path / "new.png").write_bytes(with_samples(tmp_path / "old.png", new))
    with Image.open(tmp_path / "new.png") as image:
        assert (np.asarray(image) == new).all()
    assert read_header(tmp_path / "new.png") == read_header(tmp_path / "old.png")
    assert other_chunks(tmp_path / "new.png") == other_chunks(tmp_path / "old.png")


def test_broken_files_are_told_from_unsupported_ones(tmp_path: Path) -> None:
    good = write_png(tmp_path / "good.png", np.ones((40, 50), dtype=np.uint8), depth=8, colour=GREY)
    data = good.read_bytes()
    broken = {
        "short.png": data[:20],
        "cut.png": data[:60],
        "text.png": b"not a PNG",
        "empty.png": b"",
        "huge.png": data[:16] + struct.pack(">II", 100_000, 100_000) + data[24:],
        "flat.png": data[:16] + struct.pack(">II", 0, 10) + data[24:],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MaskError, match=name):
            read_values(tmp_path / name)
    with pytest.raises(MaskError, match=r"100000 x 100000 pixels"):
        read_values(tmp_path / "huge.png")
    with pytest.raises(MaskError, match=r"gone\.png: can't be read"):
        read_values(tmp_path / "gone.png")
    check_headers([tmp_path / "text.png", good])
    with pytest.raises(MaskError, match=r"text\.png"):
        check_headers([tmp_path / "text.png", tmp_path / "empty.png"])


def test_a_file_cut_off_anywhere_is_broken_and_no_crash(tmp_path: Path) -> None:
    whole = write_png(tmp_path / "a.png", np.array([[0, 255], [255, 0]]), depth=8, colour=GREY).read_bytes()
    end_of_pixels = whole.rindex(b"IDAT")
    for length in range(end_of_pixels):
        (tmp_path / "a.png").write_bytes(whole[:length])
        with pytest.raises(MaskError):
            read_values(tmp_path / "a.png")
