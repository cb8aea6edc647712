"""Decoding of image files to RGB of 8 bits."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from data.files import FORMATS, decode_image
from data.limits import BadRow
from tests.data.own_files import good, lines, picture, png, read

GREY = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


def test_unusual_pictures_become_rgb(folder):
    grey, flat = Image.fromarray(picture()[..., 0]), Image.new("P", (4, 3))
    flat.putpalette([10, 20, 30] * 256)
    grey.save(folder / "grey.png")
    flat.save(folder / "palette.png", transparency=bytes([0, 255]))
    turned = Image.fromarray(picture())
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated camera: rows become columns
    turned.save(folder / "turned.jpg", exif=exif)
    rows = [{**good(), "image": name} for name in ("grey.png", "palette.png", "turned.jpg")]
    records = read("jsonl", lines(folder, *rows))
    np.testing.assert_array_equal(records[0].images[0], np.repeat(picture()[..., :1], 3, axis=-1))
    assert (records[1].images[0] == 255).all()
    assert records[2].images[0].shape == (7, 5, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_on_white_as_in_transformers(mode):
    stream, rng = io.BytesIO(), np.random.default_rng(0)
    values = rng.integers(0, 256, (6, 8, {"RGBA": 4, "LA": 2, "P": 1}[mode]), dtype=np.uint8)
    values[0, 0, -1] = 0
    if mode == "P":
        shown = Image.fromarray(values[..., 0], "P")
        shown.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        shown.save(stream, "PNG", transparency=rng.integers(0, 256, 256, dtype=np.uint8).tobytes())
    else:
        Image.fromarray(values, mode).save(stream, "PNG")
    image, theirs = decode_image(stream.getvalue()), convert_to_rgb(Image.open(stream), return_numpy=True)
    np.testing.assert_array_equal(image, theirs)
    opaque = np.asarray(Image.open(stream).convert("RGBA").convert("RGB"))
    assert (image >= opaque).all() and (image > opaque).any()


@pytest.mark.parametrize("written", [False, True])
def test_a_file_that_is_no_picture_is_refused_with_the_formats(tmp_path, written):
    (tmp_path / "text.png").write_bytes(b"no picture")
    with pytest.raises(BadRow) as refused:
        decode_image(tmp_path / "text.png" if written else b"no picture")
    assert str(refused.value).endswith(f"cannot be decoded: it is none of {', '.join(FORMATS)}")
    assert "0x" not in str(refused.value)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("turned", [False, True])
def test_grey_values_of_16_bits_become_8_bits(kind, turned):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3 if turned else 1  # upside down
    about = {"exif": exif} if kind in ("PNG", "TIFF") else {}
    Image.fromarray(GREY).save(stream, kind, **about)
    expected = (GREY // 256)[::-1, ::-1] if turned and about else GREY // 256
    image = decode_image(stream.getvalue())
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=-1))


def test_grey_values_of_other_byte_orders_and_ranges_become_8_bits():
    # Tags of a TIFF: number, kind 3 (16 bits), count 1, value.
    def tiff(order, bits, content):
        tags = {256: 64, 257: 48, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 48, 279: len(content)}
        listed = b"".join(struct.pack(f"{order}HHIHH", number, 3, 1, value, 0) for number, value in tags.items())
        head = struct.pack(f"{order}2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(content))
        return head + content + struct.pack(f"{order}H", len(tags)) + listed + bytes(4)

    upper = np.repeat((GREY // 256)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode_image(tiff(">", 16, GREY.astype(">u2").tobytes())), upper)
    pairs = (GREY >> 4).reshape(-1, 2).astype(int) @ [1 << 12, 1]  # two values of 12 bits in three bytes
    packed = b"".join(int(pair).to_bytes(3, "big") for pair in pairs)
    np.testing.assert_array_equal(decode_image(tiff("<", 12, packed)), upper)
    thousand = GREY.astype(int) * 1000 // 65535
    image = decode_image(b"P5 64 48 1000\n" + thousand.astype(">u2").tobytes())
    assert np.abs(image[..., 0].astype(int) - GREY // 256).max() <= 1


@pytest.mark.parametrize(("number", "kind", "mode"), [(np.int32, "TIFF", "I"), (np.float32, "TIFF", "F")])
def test_pixels_of_32_bits_are_refused(number, kind, mode):
    stream = io.BytesIO()
    Image.fromarray(GREY.astype(number)).save(stream, kind)
    with pytest.raises(BadRow, match=rf"pixels of 32 bits \(mode {mode}\): convert it to 8 bits a channel"):
        decode_image(stream.getvalue())


def test_damaged_tags_of_a_picture_print_nothing(folder):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    before = png(picture())
    after_header = 33
    exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\3\xff\xff\xff\xff\0\0\0\0" * 9)
    (folder / "a.png").write_bytes(before[:after_header] + exif + before[after_header:])
    # In a process of its own: in tests, warnings are errors.
    lines = [
        "from pathlib import Path",
        "from data.files import decode_image",
        "print(decode_image(Path('a.png')).shape)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(5, 7, 3)\n", "")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_a_picture_with_several_frames_is_refused(kind):
    frames, content = [Image.fromarray(picture(seed)) for seed in (1, 2)], io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(BadRow, match=r"image \(bytes\) has several frames or pages: save the one that is meant"):
        decode_image(content.getvalue())
    alone = io.BytesIO()
    frames[0].save(alone, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert decode_image(alone.getvalue()).shape == picture(1).shape
