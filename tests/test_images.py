"""Image files of every kind, read as what they show."""

import math
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from groundwork import images
from groundwork.errors import UserError
from groundwork.images import open_image, read_image
from groundwork.options import FITS

SIZE = 16


def test_huge_images_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "huge.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match=r"huge.png: 40×30 pixels are more than 1,000"):
        read_image(tmp_path / "huge.png", SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "RGB", "I", "I;16", "F", "P", "CMYK"])
def test_the_largest_images_take_less_than_a_gigabyte(tmp_path, mode):
    """Of every kind, turned upright, read in a process of its own."""
    path = tmp_path / "large.tif"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    side = math.isqrt(images.MAX_PIXELS)
    image = Image.new(mode, (side, side), 1)
    image.save(path, exif=exif, compression="tiff_deflate")
    script = f"""
import resource
from groundwork import images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert images.read_image({str(path)!r}, 16).shape == (3, 16, 16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert 1024 * int(process.stdout) < 2**30
    Image.new("1", (side + 1, side + 1)).save(path, compression="tiff_deflate")
    with pytest.raises(UserError, match=r"large.tif: .* pixels are more than 67,108,864"):
        read_image(path, SIZE)


def test_absurd_dimensions_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "absurd.png"
    Image.new("1", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    header = data[12:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + data[24:29]
    data[12:33] = header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"absurd.png"):
        read_image(path, SIZE)


def test_a_single_pixel_and_the_first_of_many_frames(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "one.png")
    assert_looks(tmp_path / "one.png", np.full((SIZE, SIZE, 3), (9, 8, 7)))
    frames = [Image.new("RGB", (5, 5), color) for color in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert_looks(tmp_path / "moving.webp", np.full((SIZE, SIZE, 3), (250, 0, 0)))


def test_the_ending_of_a_name_does_not_matter(tmp_path):
    Image.new("RGB", (5, 5), (1, 2, 3)).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "really.jpg")
    assert_looks(tmp_path / "really.jpg", np.full((SIZE, SIZE, 3), (1, 2, 3)))


def test_what_is_no_file_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(UserError, match=f"{path.name}: it is no file"):
            read_image(path, SIZE)
    with pytest.raises(UserError, match=r"there is no image .*missing.png"):
        read_image(tmp_path / "missing.png", SIZE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.png"
    Image.new("RGB", (5, 5)).save(path)
    path.chmod(0)
    with pytest.raises(UserError, match=r"secret.png.*ermission"):
        read_image(path, SIZE)


# ---------------------------------------------------------------------------------- kinds of images

RGB = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
GRAY = RGB[..., 0]
ALPHA = RGB[..., 1]


def on_white(color, alpha):
    """What `color` (H, W, C) seen through `alpha` (H, W) looks like on white."""
    share = alpha[..., None] / 255
    return color * share + 255 * (1 - share)


def assert_looks(path, expected, tolerance=0):
    image = read_image(path, SIZE)
    assert image.dtype == np.uint8 and image.shape == (3, SIZE, SIZE)
    assert image.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(image.transpose(1, 2, 0), expected, rtol=0, atol=tolerance)


def test_grayscale(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "l.png")
    assert_looks(tmp_path / "l.png", np.stack([GRAY] * 3, -1))


def test_black_and_white(tmp_path):
    Image.fromarray(GRAY > 127).save(tmp_path / "1.png")
    assert_looks(tmp_path / "1.png", np.stack([(GRAY > 127) * 255] * 3, -1))


def test_gray_with_alpha(tmp_path):
    Image.fromarray(np.stack([GRAY, ALPHA], -1), "LA").save(tmp_path / "la.png")
    assert_looks(tmp_path / "la.png", on_white(np.stack([GRAY] * 3, -1), ALPHA), tolerance=1)


def test_color_with_alpha(tmp_path):
    Image.fromarray(np.dstack([RGB, ALPHA]), "RGBA").save(tmp_path / "rgba.png")
    assert_looks(tmp_path / "rgba.png", on_white(RGB, ALPHA), tolerance=1)


def test_palette_with_and_without_transparency(tmp_path):
    palette = np.random.default_rng(4).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GRAY, "P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "p.png")
    expected = palette[GRAY]
    assert_looks(tmp_path / "p.png", expected)
    hidden = int(GRAY[0, 0])
    image.save(tmp_path / "hidden.png", transparency=hidden)
    expected = np.where((hidden == GRAY)[..., None], 255, expected)
    assert_looks(tmp_path / "hidden.png", expected)


def test_transparent_color_of_rgb(tmp_path):
    image = RGB.copy()
    image[2:5] = (10, 20, 30)
    Image.fromarray(image).save(tmp_path / "key.png", transparency=(10, 20, 30))
    image[2:5] = 255
    assert_looks(tmp_path / "key.png", image)


def test_cmyk(tmp_path):
    cmyk = np.zeros((SIZE, SIZE, 4), np.uint8)
    cmyk[:8, :, 0] = 255  # full cyan takes away all red; no ink is white
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    expected = np.full((SIZE, SIZE, 3), 255)
    expected[:8, :, 0] = 0
    assert_looks(tmp_path / "cmyk.jpg", expected, tolerance=3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    deep = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    assert_looks(tmp_path / f"deep.{suffix}", np.stack([deep / 257] * 3, -1), tolerance=0.51)


def test_32_bit_holding_16_bits(tmp_path):
    deep = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.int32)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    assert Image.open(tmp_path / "deep.tif").mode == "I"
    assert_looks(tmp_path / "deep.tif", np.stack([deep / 257] * 3, -1), tolerance=0.51)


@pytest.mark.parametrize("top", [1, 255, 4095, 65535])
@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_the_range_of_wide_pixels_is_the_least_that_holds_them(tmp_path, mode, top):
    """Shares, bytes, cameras' 12 bits and 16 bits, in floats or whole numbers."""
    values = np.linspace(0, top, SIZE * SIZE).reshape(SIZE, SIZE)
    stored = values.astype({"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode])
    Image.fromarray(stored).save(tmp_path / "wide.tif")
    assert Image.open(tmp_path / "wide.tif").mode == mode
    expected = np.stack([stored.astype(float) * 255 / top] * 3, -1)
    assert_looks(tmp_path / "wide.tif", expected, tolerance=0.51)


def test_plain_wide_pixels_are_never_black(tmp_path):
    for value, gray in ((0.5, 128), (1.0, 255), (100.0, 100), (0.0, 0)):
        Image.new("F", (SIZE, SIZE), value).save(tmp_path / "plain.tif")
        assert_looks(tmp_path / "plain.tif", np.full((SIZE, SIZE, 3), gray))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 3.5], "from 0 to 3.5"),  # neither shares nor bytes
        ([-0.5, 1], "from -0.5 to 1"),
        ([0, 70000], "from 0 to 70000"),
        ([0, np.nan], "from nan to nan"),
        ([0, np.inf], "from 0 to inf"),
    ],
)
def test_wide_pixels_that_may_mean_anything_are_refused(tmp_path, values, words):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "heights.tif")
    with pytest.raises(
        UserError, match=r"heights.tif: its pixels' values are (.*): scale"
    ) as error:
        read_image(tmp_path / "heights.tif", SIZE)
    assert words in str(error.value)


needs_avif = pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="no AVIF")


@needs_avif
def test_avif(tmp_path):
    Image.new("RGB", (64, 48), (200, 40, 90)).save(tmp_path / "a.avif", quality=100)
    assert_looks(tmp_path / "a.avif", np.full((SIZE, SIZE, 3), (200, 40, 90)), tolerance=4)
    assert ".avif" in images.endings()


def test_avif_where_pillow_reads_none(tmp_path, monkeypatch):
    known = {k: v for k, v in Image.registered_extensions().items() if v != "AVIF"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf")
    with pytest.raises(UserError, match=r"a.avif: this Pillow reads no AVIF: pip install"):
        read_image(tmp_path / "a.avif", SIZE)
    assert ".avif" not in images.endings()


def test_heic_where_no_package_reads_it(tmp_path, monkeypatch):
    """Whatever the file's name is, by its first bytes."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name, brands in (("a.heic", b"heic\0\0\0\0mif1"), ("b.jpg", b"mif1\0\0\0\0heic")):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp" + brands)
        with pytest.raises(UserError, match=rf"{name}: it is HEIC: pip install pillow-heif"):
            read_image(tmp_path / name, SIZE)
    for contents in (b"", b"\0", b"\0\0\0\x18ftyp", b"\xff\xff\xff\xffftypheic"):
        (tmp_path / "c.heic").write_bytes(contents)
        with pytest.raises(UserError, match=r"cannot read image .*c.heic"):
            read_image(tmp_path / "c.heic", SIZE)


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    heif = pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 40, 90)))
    heif.save(tmp_path / "a.heic", quality=100)
    assert_looks(tmp_path / "a.heic", np.full((SIZE, SIZE, 3), (200, 40, 90)), tolerance=4)
    assert ".heic" in images.endings()


def test_an_address_is_not_fetched():
    for address in ("http://example.org/a.jpg", "HTTPS://x/b.png", "s3://bucket/c.jpg"):
        with pytest.raises(UserError, match=f"{address}: addresses are not fetched"):
            read_image(address, SIZE)


# How the stored rows and columns must be laid out to be seen upright, by the EXIF standard's
# definition of where the stored first row and first column are.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB[:, :10]).save(tmp_path / "turned.png", exif=exif)
    expected = UPRIGHT[orientation](RGB[:, :10])
    upright = images.open_image(tmp_path / "turned.png")
    assert upright.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(upright), expected)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert_looks(tmp_path / "film.gif", np.full((SIZE, SIZE, 3), (255, 0, 0)))


def test_shrinking_squeezes_and_does_not_alias(tmp_path):
    stripes = np.zeros((4 * SIZE, 8 * SIZE), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: without a filter, all or nothing
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert_looks(tmp_path / "stripes.png", np.full((SIZE, SIZE, 3), 127.5), tolerance=20)
    halves = np.repeat([0, 255], 4 * SIZE).astype(np.uint8)[None].repeat(4 * SIZE, 0)
    Image.fromarray(halves).save(tmp_path / "halves.png")
    image = read_image(tmp_path / "halves.png", SIZE)
    assert (image[:, :, :7] == 0).all() and (image[:, :, 9:] == 255).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("shape", [(480, 800), (964, 644), (1026, 1030)])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(
    tmp_path, monkeypatch, shape, orientation, fit
):
    """Its sides divided by what leaves no rest, to 128 pixels or more; the whole's size is told."""
    rng, (height, width), exif = np.random.default_rng(0), shape, Image.Exif()
    exif[0x0112] = orientation
    coarse = Image.fromarray(rng.integers(256, size=(20, 30, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.save(tmp_path / "large.jpg", quality=95, exif=exif)
    whole = open_image(tmp_path / "large.jpg")
    expected = images.square(whole, 64, fit)
    decoded, convert = [], images._convert
    monkeypatch.setattr(images, "_convert", lambda image: decoded.append(image) or convert(image))
    [(found, *size)] = images.read_images([tmp_path / "large.jpg"], 64, 1, fit)
    assert size == [*whole.size] == ([width, height] if orientation == 1 else [height, width])
    scale = {480: 2, 964: 4, 1026: 2}[height]  # what divides both
    assert decoded[0].size == (size[0] // scale, size[1] // scale)
    apart = abs(found.astype(int) - expected)
    assert apart.mean() < 0.6 and np.quantile(apart, 0.999) <= 4
    if fit == "squeeze":
        assert np.array_equal(images.read_image(tmp_path / "large.jpg", 64), found)


@pytest.mark.parametrize("length", range(10))
def test_files_of_a_few_bytes_are_no_images(tmp_path, length):
    path = tmp_path / "few.jpg"
    path.write_bytes(b"a" * length)
    with pytest.raises(UserError, match="cannot read image .*few.jpg: cannot identify"):
        open_image(path)


def test_an_image_far_above_the_bound_is_refused_in_our_words(tmp_path):
    path = tmp_path / "huge.ppm"
    path.write_bytes(b"P6 40000 40000 255\n" + bytes(100))
    with pytest.raises(UserError, match="huge.ppm: more than 67,108,864 pixels, make it smaller"):
        open_image(path)
