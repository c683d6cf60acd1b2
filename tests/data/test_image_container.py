"""Pixels, and nothing else of a file, decide whether an image can be read and what it shows."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from blip2.data.image_container import ContainerError, take_apart
from blip2.data.images import decode_image

RNG = np.random.default_rng(0)
IMAGE = Image.fromarray(RNG.integers(0, 255, (24, 40, 3), dtype=np.uint8)).resize((80, 48), Image.Resampling.BICUBIC)


def pixel_bytes(data: bytes, kind: str) -> bytes:
    return take_apart(data, kind).pixels


def encoded(kind: str, image: Image.Image = IMAGE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def with_chunk(data: bytes, extra: bytes) -> bytes:
    """A PNG with another chunk behind its header."""
    return data[:33] + extra + data[33:]


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with another segment behind its start."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def orientation(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


JPEG, PNG, WEBP = encoded("JPEG", quality=90), encoded("PNG"), encoded("WEBP", lossless=True)
BOMB = zlib.compress(b" " * 3_000_000)
DIRTY = {
    "png: 3 MB of text, compressed": with_chunk(PNG, chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "png: 3 MB of XMP": with_chunk(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)),
    "png: text with a wrong checksum": with_chunk(PNG, chunk(b"tEXt", b"Title\0a", 1)),
    "png: a profile that is none": with_chunk(PNG, chunk(b"iCCP", b"icc\0\0" + b"not zlib")),
    "png: a profile of 3 MB": with_chunk(PNG, chunk(b"iCCP", b"icc\0\0" + BOMB)),
    "png: a time with a wrong length": with_chunk(PNG, chunk(b"tIME", b"\0")),
    "png: resolution and gamma cut short": with_chunk(PNG, chunk(b"pHYs", b"\0") + chunk(b"gAMA", b"")),
    "png: an unknown chunk": with_chunk(PNG, chunk(b"vpAg", b"x" * 9)),
    "png: Exif that is none": with_chunk(PNG, chunk(b"eXIf", b"nonsense")),
    "png: bytes behind the end": PNG + b"\r\n" + b"PK\x05\x06" + b"\0" * 18,
    "jpeg: a newline behind the end": JPEG + b"\n",
    "jpeg: padding behind the end": JPEG + b"\0" * 5000,
    "jpeg: a film behind the end": JPEG + b"\0\0\0\x18ftypmp42" + RNG.bytes(4000),
    "jpeg: a trailer and a second image": JPEG + b"SEFT" + RNG.bytes(40) + JPEG,
    "jpeg: an archive behind the end": JPEG + b"PK\x05\x06" + b"\0" * 18,
    "jpeg: a profile that is none": with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\x09\x03junk"),
    "jpeg: a page in a comment": with_segment(JPEG, 0xFE, b"<html><script>alert(1)</script>"),
    "jpeg: an MPF index that leads nowhere": with_segment(JPEG, 0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "jpeg: Exif that is none": with_segment(JPEG, 0xE1, b"Exif\0\0nonsense"),
    "jpeg: Photoshop's segment cut short": with_segment(JPEG, 0xED, b"Photoshop 3.0\x008BIM\x03\xed\0"),
    "jpeg: XMP": with_segment(JPEG, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta"),
    "webp: bytes behind the end": WEBP + b"\0" * 33,
}


@pytest.mark.parametrize("name", DIRTY)
def test_pixels_are_read_whatever_lies_beside_them(name: str) -> None:
    kind = name.partition(":")[0].upper()
    clean = {"JPEG": JPEG, "PNG": PNG, "WEBP": WEBP}[kind]
    bare = pixel_bytes(DIRTY[name], kind)
    assert np.array_equal(np.asarray(decode_image(DIRTY[name])), np.asarray(decode_image(clean)))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(bare)).convert("RGB")), np.asarray(decode_image(clean)))
    assert bare == pixel_bytes(clean, kind) or b"Exif" in bare or b"eXIf" in bare


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_stays(kind: str, turn: int) -> None:
    data = encoded(kind, exif=orientation(turn))
    bare = Image.open(io.BytesIO(pixel_bytes(data, kind)))
    assert bare.getexif().get(0x0112, 1) == turn
    assert decode_image(data).size == ((80, 48) if turn < 5 else (48, 80))


def test_transparency_and_palettes_stay() -> None:
    palette = IMAGE.quantize(16)
    for image, options in (
        (palette, {"transparency": 3}),
        (IMAGE.convert("L"), {"transparency": 100}),
        (IMAGE.convert("RGBA"), {}),
        (IMAGE.convert("I;16"), {}),
    ):
        data = encoded("PNG", image, **options)
        bare, before = (Image.open(io.BytesIO(d)) for d in (pixel_bytes(data, "PNG"), data))
        assert np.array_equal(np.asarray(bare.convert("RGBA")), np.asarray(before.convert("RGBA")))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_kinds_of_jpeg(mode: str, options: dict[str, object]) -> None:
    data = encoded("JPEG", IMAGE.convert(mode), comment=b"a comment", **options)
    bare = pixel_bytes(data, "JPEG")
    assert b"a comment" not in bare
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(bare))), np.asarray(Image.open(io.BytesIO(data))))


def test_the_first_of_several_images() -> None:
    other = Image.new("RGB", IMAGE.size, "red")
    mpo = encoded("MPO", save_all=True, append_images=[other], quality=90)
    assert np.array_equal(np.asarray(decode_image(mpo)), np.asarray(decode_image(JPEG)))
    animated = encoded("PNG", save_all=True, append_images=[other])
    assert np.array_equal(np.asarray(decode_image(animated)), np.asarray(IMAGE))


def damaged(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 30
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("kind", "spoil", "reason"),
    [
        *((kind, lambda d: d[: len(d) // 2], "truncated") for kind in ("JPEG", "PNG", "WEBP")),
        *((kind, lambda d: d[:-3], "truncated") for kind in ("JPEG", "PNG", "WEBP")),
        ("JPEG", lambda d: d[:2], "truncated"),
        ("JPEG", lambda d: d[:2] + b"junk" + d[2:], "cannot be decoded"),
        ("PNG", damaged, "checksum"),
    ],
)
def test_what_is_wrong_with_the_pixels_is_said(kind: str, spoil: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(ContainerError, match=reason):
        pixel_bytes(spoil({"JPEG": JPEG, "PNG": PNG, "WEBP": WEBP}[kind]), kind)


def test_what_is_left_out_is_handed_over() -> None:
    for kind, data, metadata in (
        ("JPEG", with_segment(JPEG, 0xFE, b"a comment"), b"a comment"),
        ("PNG", with_chunk(PNG, chunk(b"tEXt", b"a\0b")), b"a\0b"),
    ):
        file = take_apart(data + b"behind", kind)
        assert metadata in file.metadata
        assert file.rest == b"behind"
    assert take_apart(b"BM anything", "BMP").pixels == b"BM anything"


def test_png_text_of_pillow_goes() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a dog " * 1000, zip=True)
    assert pixel_bytes(encoded("PNG", pnginfo=text), "PNG") == PNG


def test_a_marker_after_the_pixels_may_begin_with_several_bytes() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(buffer, "JPEG")
    plain = buffer.getvalue()
    filled = plain[:-2] + b"\xff\xff" + plain[-2:]
    assert take_apart(filled, "JPEG").pixels == take_apart(plain, "JPEG").pixels
