"""What uploads are refused: hostile, broken and mistaken pictures, and nothing that a camera makes."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip2.data.image_container import take_apart
from blip2.data.images import ImageSpec, plain_view
from blip2.server.errors import RequestError
from blip2.server.images import checked_image, from_data_url, view_of

LIMIT = 50_000_000
SPEC = ImageSpec(56, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
KINDS = ("JPEG", "PNG", "WEBP")


def encoded(kind: str, seed: int = 0, **options: object) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((64, 48), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def refused(data: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        view_of(checked_image(data, LIMIT), SPEC)
    assert 400 <= caught.value.status < 500
    return caught.value


def status_of(data: bytes) -> int:
    """200 where a picture is taken, else the status of its refusal; any other error is the test's."""
    try:
        return 200 if view_of(checked_image(data, LIMIT), SPEC).isfinite().all() else 500
    except RequestError as error:
        return error.status


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_head(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("a.txt", "hello")
    return buffer.getvalue()


def jpeg_with_comment(comment: bytes) -> bytes:
    data = encoded("JPEG")
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + data[2:]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"comment": b"taken in the snow"}),
        ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
        ("PNG", {}),
        ("PNG", {"compress_level": 0}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_real_images_pass_with_all_their_pixels(kind: str, options: dict[str, object]) -> None:
    data = encoded(kind, **options)
    pixels = checked_image(data, LIMIT)
    assert pixels == take_apart(data, kind).pixels
    assert view_of(pixels, SPEC).shape == (3, 56, 56)
    assert torch.equal(view_of(pixels, SPEC), plain_view(Image.open(io.BytesIO(data)).convert("RGB"), SPEC))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rest",
    [
        *(b"\n", b"\r\n", bytes(9000), b"\xff\xd9", b"MPF", b"SEFH\x6b\0\0\0SEFT"),
        b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40,
    ],
)
def test_what_phones_and_cameras_write_behind_an_image_is_dropped(kind: str, rest: bytes) -> None:
    data = encoded(kind)
    assert checked_image(data + rest, LIMIT) == take_apart(data, kind).pixels


def test_metadata_does_not_decide() -> None:
    data = encoded("PNG")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 3_000_000))
    wrong = chunk(b"tEXt", b"Title\0a")[:-1] + b"\0"
    profile = chunk(b"iCCP", b"icc\0\0not zlib")
    for extra in (bomb, wrong, profile):
        assert checked_image(data[:33] + extra + data[33:], LIMIT) == data


def test_photographs_pass(flickr8k: Path) -> None:
    import tarfile

    with tarfile.open(sorted(flickr8k.glob("dev-*.tar"))[0]) as shard:
        pictures = [shard.extractfile(m).read() for m in shard.getmembers() if m.name.endswith(".jpg")][:40]
    assert pictures
    for data in pictures:
        assert checked_image(data, LIMIT) == take_apart(data, "JPEG").pixels


def test_a_picture_of_several_pictures_passes() -> None:
    buffer = io.BytesIO()
    first, second = (Image.open(io.BytesIO(encoded("JPEG", seed))) for seed in (0, 1))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert checked_image(buffer.getvalue() + b"\0" * 7, LIMIT)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"hello", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", 415),
        (b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY a 'b'>]><svg/>", 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415),
        (b"%PDF-1.7\n", 415),
        (b"GIF89a" + bytes(40), 415),
        (b"BM" + bytes(60), 415),
        (b"II*\0" + bytes(60), 415),
        (archive(), 415),
        (b"\xff\xd8\xff", 400),
        (b"\x89PNG\r\n\x1a\n", 400),
        (b"RIFF\x04\0\0\0WEBP", 400),
        (b"RIFF\xff\xff\xff\xffWEBPVP8 ", 400),
        (png_head(50_000, 50_000) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""), 413),
        (png_head(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b"") + chunk(b"IEND", b""), 413),
        (png_head(40_000, 1) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""), 413),
        (png_head(0, 10) + chunk(b"IEND", b""), 400),
        (png_head(10, 10) + chunk(b"IEND", b""), 400),
        (png_head(10, 10) + chunk(b"IDAT", b"not zlib") + chunk(b"IEND", b""), 400),
        (encoded("PNG")[:-12] + chunk(b"tEXt", b"a\0<script>alert(1)</script>") + chunk(b"IEND", b""), 400),
        (jpeg_with_comment(b"<html><body onload=alert(1)>"), 400),
        (jpeg_with_comment(b"*/=alert(1)/*<?php system($_GET[0]);"), 400),
        (jpeg_with_comment(b"%PDF-1.4 1 0 obj"), 400),
        *[(encoded(kind) + archive(), 400) for kind in KINDS],
        *[(encoded(kind) + b"<script>alert(1)</script>", 400) for kind in KINDS],
        *[(encoded(kind) + b"%PDF-1.7", 400) for kind in KINDS],
        *[(encoded(kind) + b"\0MZ\x90", 400) for kind in KINDS],
    ],
)
def test_hostile_pictures_are_refused(data: bytes, status: int) -> None:
    assert refused(data).status == status


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999])
def test_truncated_pictures_are_refused(kind: str, part: float) -> None:
    data = encoded(kind)
    refused(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(25))
def test_mutations_are_decoded_or_refused(kind: str, seed: int, mutations: Any) -> None:
    """Never another error than a 4xx."""
    accepted = 0
    for data in mutations(encoded(kind, seed), seed):
        status = status_of(data)
        assert status == 200 or 400 <= status < 500
        accepted += status == 200
    assert accepted < 4  # all four whole would mean that nothing is looked at


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("", 400),
        ("dog.jpg", 400),
        ("/etc/passwd", 400),
        ("file:///etc/passwd", 400),
        ("data:image/jpeg,plain", 400),
        ("data:image/jpeg;base64", 400),
        ("data:image/jpeg;base64,@@@@", 400),
        ("data:image/jpeg;base64,AAAAA", 400),
        ("data:image/svg+xml;base64,PHN2Zy8+", 415),
        ("data:text/html;base64,PHN2Zy8+", 415),
        ("data:image/jpeg;base64,\u00e9\u00e9\u00e9\u00e9", 400),
    ],
)
def test_data_urls_that_are_none(url: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        from_data_url(url)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "url",
    [
        *("data:image/png;charset=x;base64,AAH7_w==", "data:image/png;base64,AAH7/w", "DATA:IMAGE/PNG;BASE64,AAH7/w=="),
        *(" data:image/png;base64,AAH7/w==\n", "data:image/png;base64,AA\r\nH7\n/w==", "data:;base64, AAH7 /w =="),
        *("data:image/jpeg;name=my dog.jpg;base64,AAH7/w==", "data:image/jpeg;base64;name=a,AAH7/w=="),
        *("data:image/jpeg;base64,AAH7%2Fw%3D%3D", "data:image/jpeg; base64,AAH7_w"),
    ],
)
def test_a_data_url_gives_its_bytes(url: str) -> None:
    assert from_data_url(url) == b"\x00\x01\xfb\xff"
