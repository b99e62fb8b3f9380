"""Bytes are kept, irregularities named, unreadable images refused."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from contradiff.data.decoding import decode_rgb
from contradiff.sources.image_check import CheckedImage, Verify, check_image

each_verify = pytest.mark.parametrize("verify", ["full", "header"])


def picture(height: int = 48, width: int = 80) -> Image.Image:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    planes = [100 + 1.5 * x, 200 - 3 * y, 60 + x + 2 * y]
    noise = rng.normal(scale=12, size=(height, width, 3))
    return Image.fromarray((np.stack(planes, axis=-1) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(image: Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, kind, exif=exif)


def check(content: bytes, *, path: str = "train/n1/a.JPEG", **options: Any) -> CheckedImage:
    return check_image(content, path=path, **({"verify": "full", "resize": None} | options))


IMAGE = picture()
GREY16 = Image.fromarray(np.arange(48 * 80, dtype=np.uint16).reshape(48, 80) * 17)
MPO = encoded(IMAGE, "MPO", save_all=True, append_images=[IMAGE.rotate(180)])
PALETTE = IMAGE.convert("P")
SEVERAL = ("greyscale", "exif_rotated", "png_named_jpeg")
IRREGULAR = {
    "plain": ("a.jpg", encoded(IMAGE, "JPEG"), "jpg", ()),
    "trailing": ("a.jpg", encoded(IMAGE, "JPEG") + b"\0 shot with" * 20, "jpg", ()),
    "webp": ("a.webp", encoded(IMAGE, "WEBP"), "webp", ()),
    "cmyk": ("a.JPEG", encoded(IMAGE.convert("CMYK"), "JPEG"), "jpg", ("cmyk",)),
    "grey16": ("a.png", encoded(GREY16, "PNG"), "png", ("greyscale", "sixteen_bit")),
    "palette": ("a.png", encoded(PALETTE, "PNG"), "png", ("palette",)),
    "clear": ("a.png", encoded(PALETTE, "PNG", transparency=3), "png", ("palette", "alpha")),
    "alpha": ("a.png", encoded(IMAGE.convert("RGBA"), "PNG"), "png", ("alpha",)),
    "upside down": ("a.JPEG", rotated(IMAGE, "JPEG", 3), "jpg", ("exif_rotated",)),
    "rotated png": ("a.png", rotated(IMAGE, "PNG", 6), "png", ("exif_rotated",)),
    "upright": ("a.JPEG", rotated(IMAGE, "JPEG", 1), "jpg", ()),
    "misnamed": ("n02105855_2933.JPEG", encoded(IMAGE, "PNG"), "png", ("png_named_jpeg",)),
    "misnamed too": ("a.png", encoded(IMAGE, "JPEG"), "jpg", ("jpeg_named_png",)),
    "two pictures": ("a.jpg", MPO, "jpg", ("multi_picture",)),
    "several": ("a.JPEG", rotated(IMAGE.convert("L"), "PNG", 8), "png", SEVERAL),
}


@each_verify
@pytest.mark.parametrize("name", IRREGULAR)
def test_bytes_are_kept_and_irregularities_named(name: str, verify: Verify):
    path, *expected = IRREGULAR[name]
    assert list(check(expected[0], path=path, verify=verify)) == expected


@each_verify
@pytest.mark.parametrize(("kind", "suffix"), [("BMP", "bmp"), ("PPM", "ppm"), ("TIFF", "tif")])
def test_formats_that_shards_do_not_have_become_png(kind: str, suffix: str, verify: Verify):
    content = encoded(IMAGE, kind)
    stored, *rest = check(content, path=f"train/n1/a.{suffix}", verify=verify)
    assert rest == ["png", (f"{kind.lower()}_stored_as_png",)]
    assert stored.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(decode_rgb(stored, name="a")), np.asarray(IMAGE))
    with pytest.raises(ValueError, match="not a readable image"):
        check(content[:200], path=f"train/n1/a.{suffix}", verify=verify)


def test_pixels_of_an_unknown_range_are_refused():
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(ValueError, match="mode F have no known range"):
        check(encoded(floats, "TIFF"), path="train/n1/a.tif")


@pytest.mark.parametrize("progressive", [False, True])
def test_truncation_is_noticed_where_a_full_decode_notices_it(progressive: bool):
    """Decoding at an eighth of the size reads all the data."""
    whole = encoded(picture(96, 128), "JPEG", quality=90, progressive=progressive)
    verdicts: list[list[bool]] = []
    for length in range(0, len(whole), 97):
        verdicts.append([])
        for way in (lambda content: decode_rgb(content, name="x"), check):
            try:
                way(whole[:length])
                verdicts[-1].append(True)
            except ValueError:
                verdicts[-1].append(False)
    assert all(expected == found for expected, found in verdicts)
    assert not any(found for _, found in verdicts[: len(verdicts) * 3 // 4])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_header_alone_shows_truncation_too(kind: str):
    whole = encoded(IMAGE, kind)
    for length in range(0, len(whole) - 1, 61):
        with pytest.raises(ValueError, match=r"not a readable image"):
            check(whole[:length], path=f"a.{kind.lower()}", verify="header")


def test_thumbnails_end_is_not_the_images():
    """A truncated JPEG whose EXIF holds a whole one."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = encoded(picture(8, 8), "JPEG")
    whole = encoded(IMAGE, "JPEG", exif=exif)
    assert check(whole, verify="header").content == whole
    with pytest.raises(ValueError, match="no end mark"):
        check(whole[:-300], verify="header")


@each_verify
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "unknown format"),
        (encoded(IMAGE, "GIF"), r"the format is GIF; allowed are \.jpg, \.jpeg, \.png, \.webp"),
        (encoded(IMAGE, "JPEG")[:900], "truncated"),
    ],
)
def test_unreadable_image_is_refused(content: bytes, reason: str, verify: Verify):
    with pytest.raises(ValueError, match=rf"^n1/a\.JPEG: not a readable image \(.*{reason}"):
        check(content, path="n1/a.JPEG", verify=verify)


def test_damaged_png_is_found_by_a_full_decode_alone():
    content = bytearray(encoded(IMAGE, "PNG"))
    content[len(content) // 2] ^= 0x55
    with pytest.raises(ValueError, match="not a readable image"):
        check(bytes(content), path="a.png")
    assert check(bytes(content), path="a.png", verify="header").extension == "png"


@pytest.mark.parametrize("name", ["plain", "misnamed", "webp", "cmyk", "rotated png", "grey16"])
def test_larger_image_is_made_smaller(name: str):
    path, content, extension, irregularities = IRREGULAR[name]
    smaller = check(content, path=path, resize=24)
    assert smaller.irregularities == irregularities
    assert smaller.extension == ("jpg" if extension == "jpg" else "png")
    assert smaller == check(content, path=path, resize=24)
    size = (24, 40) if name == "rotated png" else (40, 24)
    expected = decode_rgb(content, name="x").resize(size, Image.Resampling.BICUBIC)
    with Image.open(io.BytesIO(smaller.content)) as image:
        assert (image.mode, image.size) == ("RGB", size)
        assert "exif" not in image.info
        difference = np.asarray(image).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < (3 if extension == "jpg" else 0.01)


def test_small_image_is_kept_and_a_narrow_one_keeps_its_shape():
    content = IRREGULAR["upside down"][1]
    assert check(content, resize=48).content == content
    smaller = check(encoded(picture(31, 400), "PNG"), path="a.png", resize=8)
    assert Image.open(io.BytesIO(smaller.content)).size == (103, 8)
