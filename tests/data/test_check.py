"""The report of `blip2 data check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blip2.data.check import check_collection, format_report
from blip2.errors import DataError


def test_report(tmp_path: Path, jpeg: Callable[..., bytes], write_shard: Callable[..., Path]) -> None:
    images = [
        jpeg(0, 10, 10),
        jpeg(1, 20, 30),
        jpeg(2, 40, 50),
        jpeg(1, 20, 30),
        b"",
        b"no image",
        jpeg(3, 90, 90)[:-900],
    ]
    samples = [
        {"__key__": f"k{n}", "jpg": data, "json": {"captions": ["a cat", "one two three four"], "question": "q?"}}
        for n, data in enumerate(images)
    ]
    samples.append({"__key__": "latin", "jpg": jpeg(), "txt": b"caf\xe9"})
    report = check_collection(str(write_shard(tmp_path / "set.tar", samples)), progress=False)
    assert (report.samples, report.captions, report.questions, report.duplicates) == (4, 8, 4, 1)
    assert report.caption_words == 3.0
    assert report.sides == [(10, 10), (20, 30), (40, 50)]
    assert report.by_reason() == {
        "zero-byte image": 1,
        "not an image": 1,
        "image is truncated": 1,
        "text is not UTF-8": 1,
    }
    text = format_report(report)
    assert "4 usable samples of 4 images, 8 captions of 3.0 words" in text
    assert "10x10 smallest, 20x30 median, 40x50 largest" in text
    for bad in report.bad:
        assert bad.reason in text
        assert bad.key in text


def test_all_bad_is_a_report_and_not_an_error(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    report = check_collection(str(tmp_path), progress=False)
    assert (report.samples, report.sides) == (0, [])
    assert "0 usable samples" in format_report(report)
    assert report.by_reason() == {"no text": 1}


def test_long_lists_are_shortened(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    for n in range(30):
        (tmp_path / f"{n:02d}.jpg").write_bytes(jpeg())
    text = format_report(check_collection(str(tmp_path), progress=False))
    assert "and 10 more" in text


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        check_collection(str(tmp_path / "gone"), progress=False)
