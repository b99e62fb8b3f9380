"""Against Pillow's own exif_transpose and convert."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from contradiff.data.decoding import decode_rgb, orientation_of
from contradiff.data.transforms import decode


def picture(height: int = 24, width: int = 40) -> Image.Image:
    """Smooth and coloured; no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [100 + 2.5 * x, 200 - 3 * y, 60 + x + 2 * y]
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(value: object, kind: str = "JPEG", image: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return encoded(image or picture(), kind, exif=exif)


def pillows(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def ours(content: bytes) -> np.ndarray:
    """Both ways to the pixels, which agree."""
    picture = np.asarray(decode_rgb(content, name="x"))
    np.testing.assert_array_equal(decode(content, name="x").permute(1, 2, 0).numpy(), picture)
    return picture


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation: int, kind: str):
    content = with_orientation(orientation, kind)
    np.testing.assert_array_equal(ours(content), pillows(content))
    assert ours(content).shape == ((24, 40, 3) if orientation <= 4 else (40, 24, 3))


@pytest.mark.parametrize("value", [0, 9, 77])
def test_senseless_orientation_is_none(value: int):
    content = with_orientation(value)
    np.testing.assert_array_equal(ours(content), pillows(encoded(picture(), "JPEG")))


def test_damaged_exif_is_none():
    whole = with_orientation(6)
    damaged = whole.replace(b"Exif\0\0MM\0*", b"Exif\0\0MX\xff\xff")
    assert damaged != whole
    with Image.open(io.BytesIO(damaged)) as image:
        assert orientation_of(image) == 1
    assert ours(damaged).shape == (24, 40, 3)


@pytest.mark.parametrize("is_marked", [True, False])
def test_inverted_cmyk_becomes_rgb(is_marked: bool):
    """As Photoshop writes it, and Pillow: with Adobe's marker and without it."""
    content = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    start = content.index(b"\xff\xee\0\x0eAdobe")
    if not is_marked:
        content = content[:start] + content[start + 16 :]
    np.testing.assert_array_equal(ours(content), pillows(content))
    difference = ours(content).astype(int) - np.asarray(picture())
    assert np.abs(difference).mean() < 3  # the picture itself, not its negative


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow, of its own way
@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "P with alpha", "P of bytes"])
def test_every_mode_becomes_rgb(mode: str):
    if mode == "P with alpha":
        content = encoded(picture().convert("P"), "PNG", transparency=3)
    elif mode == "P of bytes":
        content = encoded(picture().convert("P"), "PNG", transparency=bytes(range(256)))
    else:
        image = picture().convert(mode)
        if "A" in mode:  # hidden colours are shown, as by torchvision's loader
            image.putalpha(0)
        content = encoded(image, "PNG")
    np.testing.assert_array_equal(ours(content), pillows(content))


def test_sixteen_bits_become_eight():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    shown = ours(encoded(Image.fromarray(values), "PNG"))
    assert shown.dtype == np.uint8
    assert shown[..., 1].flatten().tolist() == list(range(256))


TRUNCATED = encoded(picture(64, 64), "JPEG")[:700]


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "empty file"), (b"no image", "unknown format"), (TRUNCATED, "image file is truncated")],
)
def test_unreadable_image_is_named(content: bytes, fault: str):
    with pytest.raises(ValueError, match=rf"^n01_5: not a readable image \([^/]*{fault}"):
        decode(content, name="n01_5")
