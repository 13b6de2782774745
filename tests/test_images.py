"""Reading images: every mode as RGB, EXIF as the annotations have it, and one sentence for whatever is wrong."""

import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from refinetool.errors import ImageError
from refinetool.images import read_image
from refinetool.records import Size

SIZE = (24, 32)
MANY = 10**9


@pytest.fixture
def picture() -> np.ndarray:
    """uint8 (24, 32, 3): smooth enough for JPEG, different in every corner and channel."""
    y, x = np.indices(SIZE)
    return np.stack([8 * x, 10 * y, 255 - 4 * x - 5 * y], axis=2).astype(np.uint8)


def refused(path: Path, size: Size = SIZE, max_pixels: int = MANY) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_image(path, size=size, max_pixels=max_pixels)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return caught.value


def write_header(path: Path, width: int, height: int) -> Path:
    """A PNG that claims a size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


# --- what can be read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_rgb_comes_back_as_it_is(picture: np.ndarray, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture).save(path)
    image = read_image(path, size=SIZE, max_pixels=MANY)
    np.testing.assert_array_equal(image, picture)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable


def test_jpeg_pixels_are_those_of_opencv(picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture).save(path, quality=90)
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert bgr is not None
    np.testing.assert_array_equal(read_image(path, size=SIZE, max_pixels=MANY), bgr[..., ::-1])


def test_the_content_counts_not_the_suffix(picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture).save(path, format="PNG")
    np.testing.assert_array_equal(read_image(path, size=SIZE, max_pixels=MANY), picture)


def test_gray_becomes_three_equal_channels(picture: np.ndarray, tmp_path: Path) -> None:
    gray = picture[..., 0]
    Image.fromarray(gray).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png", size=SIZE, max_pixels=MANY), np.repeat(gray[..., None], 3, axis=2)
    )


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_16_bits_the_upper_8_count(tmp_path: Path, suffix: str) -> None:
    deep = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), deep)
    np.testing.assert_array_equal(read_image(path, size=SIZE, max_pixels=MANY)[..., 1], deep >> 8)


def test_of_16_bit_colours_the_upper_8_count(picture: np.ndarray, tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1].astype(np.uint16) * 256 + 77)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", size=SIZE, max_pixels=MANY), picture)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped(picture: np.ndarray, tmp_path: Path, alpha: int) -> None:
    rgba = np.dstack([picture, np.full(SIZE, alpha, dtype=np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", size=SIZE, max_pixels=MANY), picture)
    Image.fromarray(rgba).convert("LA").save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", size=SIZE, max_pixels=MANY).shape == (*SIZE, 3)


@pytest.mark.parametrize(
    ("suffix", "transparency"), [("png", None), ("png", 2), ("png", bytes([0, 128, 255, 7])), ("gif", None), ("gif", 2)]
)
def test_a_palette_is_looked_up(tmp_path: Path, suffix: str, transparency) -> None:
    indices = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE) % 4
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [5, 5, 250]], dtype=np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / f"a.{suffix}", **options)
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}", size=SIZE, max_pixels=MANY), colours[indices])


def test_print_colours_become_rgb(picture: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    image = read_image(tmp_path / "a.jpg", size=SIZE, max_pixels=MANY)
    assert np.abs(image.astype(int) - picture).mean() < 6


# --- orientation


def turned(picture: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of stored pixels, by the EXIF standard's table of where row 0 and column 0 lie."""
    return {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.swapaxes(0, 1),  # row 0 is the left side, column 0 the top
        6: picture.swapaxes(0, 1)[:, ::-1],  # row 0 is the right side, column 0 the top
        7: picture.swapaxes(0, 1)[::-1, ::-1],  # row 0 is the right side, column 0 the bottom
        8: picture.swapaxes(0, 1)[::-1],  # row 0 is the left side, column 0 the bottom
    }[orientation]


def save_with_orientation(path: Path, picture: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_stored_pixels_are_taken_as_they_are_if_their_size_is_the_annotated_one(
    picture: np.ndarray, tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = save_with_orientation(tmp_path / f"a.{suffix}", picture, orientation)
    image = read_image(path, size=SIZE, max_pixels=MANY)
    assert np.abs(image.astype(int) - picture).max() <= (0 if suffix == "png" else 24)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pixels_are_turned_if_only_then_their_size_is_the_annotated_one(
    picture: np.ndarray, tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = save_with_orientation(tmp_path / f"a.{suffix}", picture, orientation)
    image = read_image(path, size=SIZE[::-1], max_pixels=MANY)
    assert np.abs(image.astype(int) - turned(picture, orientation)).max() <= (0 if suffix == "png" else 24)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_an_image_that_no_turn_brings_to_the_annotated_size_is_refused(
    picture: np.ndarray, tmp_path: Path, orientation: int
) -> None:
    path = save_with_orientation(tmp_path / "a.png", picture, orientation)
    error = refused(path, size=SIZE[::-1])
    assert error.reason == "size-mismatch"


def test_another_size_is_refused_with_both_sizes(picture: np.ndarray, tmp_path: Path) -> None:
    path = save_with_orientation(tmp_path / "a.png", picture, 6)
    error = refused(path, size=(480, 1640))
    assert error.reason == "size-mismatch"
    assert "measures 32 x 24" in str(error)
    assert "say 1,640 x 480" in str(error)


# --- what can't be read


def test_a_missing_image(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere" / "a.png").reason == "image-missing"


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    assert refused(tmp_path).reason == "image-unreadable"


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_something_else_is_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    error = refused(tmp_path / "a.jpg")
    assert error.reason == "image-unreadable"
    assert "known format" in str(error)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "tif", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_refused_in_silence(
    tmp_path: Path, suffix: str, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert refused(path, size=(64, 64)).reason == "image-unreadable"
    assert capfd.readouterr().err == ""


def test_damage_within_a_jpeg_makes_no_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(noise).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 30] = bytes(range(30))
    path.write_bytes(data)
    assert read_image(path, size=(64, 64), max_pixels=MANY).shape == (64, 64, 3)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_32_bits_are_refused(tmp_path: Path, mode: str) -> None:
    values = np.full(SIZE, 100_000, dtype=np.float32 if mode == "F" else np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    error = refused(tmp_path / "a.tif")
    assert error.reason == "image-unreadable"
    assert "expected 8 or 16" in str(error)


def test_an_absurd_size_is_refused_undecoded(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.png", 100_000, 100_000)
    error = refused(path, size=(100_000, 100_000), max_pixels=178_956_970)
    assert error.reason == "image-too-large"
    assert "100,000 x 100,000" in str(error)
    assert "178,956,970" in str(error)


def test_the_limit_is_ours_not_pillow_s(picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    assert refused(path, max_pixels=SIZE[0] * SIZE[1] - 1).reason == "image-too-large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow alone would refuse the picture
    np.testing.assert_array_equal(read_image(path, size=SIZE, max_pixels=SIZE[0] * SIZE[1]), picture)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_threads_read_side_by_side(picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    before = Image.MAX_IMAGE_PIXELS
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(read_image(path, size=SIZE, max_pixels=MANY))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert all((image == picture).all() for image in found)
    assert before == Image.MAX_IMAGE_PIXELS
