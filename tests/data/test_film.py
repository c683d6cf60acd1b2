"""Samples of several images, and films: frames spread evenly, and one line for what cannot be read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2.data import film
from blip2.data.film import drawn, open_sample
from blip2.errors import DataError

needs_av = pytest.mark.skipif(find_spec("av") is None, reason="PyAV is not installed (pip install 'blip2[video]')")


def grey(image: Image.Image) -> int:
    return round(float(np.asarray(image).mean()))


def shades(count: int) -> list[Image.Image]:
    """Plain images, each 10 brighter than the one before."""
    return [Image.new("RGB", (64, 48), (10 * n,) * 3) for n in range(count)]


def write_gif(path: Path, count: int) -> Path:
    first, *rest = shades(count)
    first.save(path, save_all=True, append_images=rest, duration=40)
    return path


def write_video(path: Path, count: int, codec: str = "mpeg4") -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in shades(count):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def test_frames_are_spread_evenly() -> None:
    """As transformers' own example draws them: `np.arange(0, total, total / frames).astype(int)`."""
    for total in (1, 4, 7, 8, 25, 301):
        for frames in (1, 4, 8):
            assert drawn(total, frames) == np.arange(0, total, total / frames).astype(int).tolist()
    assert drawn(12, 4) == [0, 3, 6, 9]
    assert drawn(3, 4) == [0, 0, 1, 2]


def test_a_gif_is_a_film_where_it_moves(tmp_path: Path) -> None:
    moving = write_gif(tmp_path / "moving.gif", 12)
    assert [grey(image) for image in open_sample(moving)] == [0, 30, 60, 90]
    assert [grey(image) for image in open_sample(moving.read_bytes(), 2)] == [0, 60]
    still = write_gif(tmp_path / "still.gif", 1)
    assert [image.size for image in open_sample(still)] == [(64, 48)]


@needs_av
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")])
def test_films(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, 12, codec)
    for source in (path, str(path), path.read_bytes()):
        for frames, want in ((4, [0, 30, 60, 90]), (3, [0, 40, 80])):
            images = open_sample(source, frames)
            assert [image.mode for image in images] == ["RGB"] * frames
            assert [grey(image) for image in images] == pytest.approx(want, abs=4)


@needs_av
def test_a_broken_film_is_one_line(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12)
    for data in (path.read_bytes()[:40], path.read_bytes()[:40] + bytes(500)):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a.mp4: film is truncated or damaged, or of a kind that"):
            open_sample(path)


@needs_av
def test_a_film_may_be_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "MAX_FRAMES", 11)
    for name, codec in (("a.mp4", "mpeg4"), ("a.webm", "libvpx")):  # which says how many frames it has, and which not
        with pytest.raises(DataError, match=rf"{name}: film has (12|more than 11) frames"):
            open_sample(write_video(tmp_path / name, 12, codec))


def test_without_pyav_a_film_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    with pytest.raises(DataError, match=r"a.mp4: films need PyAV: pip install 'blip2\[video\]'"):
        open_sample(tmp_path / "a.mp4")


def test_a_folder_is_a_film_of_its_images(tmp_path: Path) -> None:
    for n, image in enumerate(shades(8)):
        image.save(tmp_path / f"{n:03d}.png")
    assert [grey(image) for image in open_sample(tmp_path)] == [0, 20, 40, 60]
    assert [grey(image) for image in open_sample(str(tmp_path), 8)] == [10 * n for n in range(8)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image in this folder"):
        open_sample(tmp_path / "empty")


def test_several_belong_together_in_their_order(tmp_path: Path) -> None:
    first, second = shades(3)[1:]
    second.save(tmp_path / "b.png")
    moving = write_gif(tmp_path / "c.gif", 8)
    images = open_sample([first, tmp_path / "b.png", moving, moving.read_bytes()], frames=2)
    assert [grey(image) for image in images] == [10, 20, 0, 40, 0, 40]
    with pytest.raises(DataError, match="nowhere.png: No such file"):
        open_sample([first, "nowhere.png"])
    with pytest.raises(DataError, match="a sample without an image"):
        open_sample([])
