"""Every image of a folder is found once, and what is no image is counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image, features

from blip2.data.folders import read_folder
from blip2.data.image_files import find_images, images_below, keys_below, text_beside, text_to_write
from blip2.data.image_formats import suffixes
from blip2.data.images import open_image
from blip2.errors import DataError


def image(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path, **options)
    return path


def below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in images_below(folder).paths]


@pytest.mark.parametrize(
    "name",
    [
        *("a.jpg", "a.JPEG", "a.jfif", "a.jpe", "a.png", "a.apng", "a.webp", "a.gif", "a.bmp", "a.tif", "a.tiff"),
        *("a.dib", "a.ppm", "a.tga", "a.ico"),
        pytest.param(
            "a.jp2", marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow lacks JPEG 2000")
        ),
        pytest.param("a.avif", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow lacks AVIF")),
    ],
)
def test_what_can_be_decoded_alone_is_found_in_a_folder(tmp_path: Path, name: str) -> None:
    formats = {".apng": "PNG", ".dib": "DIB"}
    path = image(tmp_path / name, format=formats.get(Path(name).suffix))
    path.with_suffix(".txt").write_text("a red image")
    assert open_image(path).size[0] >= 8
    assert below(tmp_path) == [name]
    assert [sample.captions for sample in read_folder(tmp_path).samples] == [("a red image",)]


def test_linked_folders_and_files_are_followed_once(tmp_path: Path) -> None:
    album = tmp_path / "album"
    image(album / "real" / "a.png")
    image(tmp_path / "elsewhere" / "b.png")
    image(tmp_path / "elsewhere" / "deeper" / "c.png")
    (album / "linked").symlink_to(tmp_path / "elsewhere")
    (album / "again").symlink_to(album / "real")
    (album / "loop").symlink_to(album)
    (tmp_path / "elsewhere" / "back").symlink_to(album)
    (album / "d.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (album / "broken.png").symlink_to(tmp_path / "gone.png")
    assert below(album) == ["d.png", "linked/b.png", "linked/deeper/c.png", "real/a.png"]
    assert images_below(album).ignored == {"broken link": 1}
    assert below(album / "linked") == ["b.png", "back/d.png", "back/real/a.png", "deeper/c.png"]


def test_folders_of_tools_are_left_out_and_told(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    tools = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", "deep/.git", "$RECYCLE.BIN")
    for tool in tools:
        image(tmp_path / tool / "copy.jpg")
    for name in ("film.mp4", "film.MP4", "notes.pdf", "phone.heic", "README", ".DS_Store", "._a.jpg", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a.txt", "a.json"):
        (tmp_path / name).write_text("{}")
    files = find_images([str(tmp_path)])
    assert [path.name for path in files.paths] == ["a.jpg"]
    assert files.ignored == {
        **{".mp4": 2, ".pdf": 1, ".heic": 1, "without a suffix": 1},
        **{
            f"in {tool}": 1
            for tool in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", ".git", "$RECYCLE.BIN")
        },
    }
    assert files.note().startswith("11 other files not read: 2 .mp4, 1 ")
    assert find_images([str(tmp_path / "a.jpg")]).note() == ""
    assert below(tmp_path / ".thumbnails") == ["copy.jpg"]  # named by somebody who wants it


def test_a_folder_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no image in this folder \(1 other files not read: 1 .heic\)"):
        find_images([str(tmp_path)])


def test_images_of_one_stem_are_two(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b/a.png", "c.jpg"):
        image(tmp_path / name)
    (tmp_path / "a.txt").write_text("of both")
    (tmp_path / "a.png.txt").write_text("of one")
    (tmp_path / "c.txt").write_text("of c")
    paths = images_below(tmp_path).paths
    assert keys_below(tmp_path, paths) == ["a.jpg", "a.png", "b/a", "c"]
    assert [text_beside(path).name for path in paths] == ["a.txt", "a.png.txt", "a.txt", "c.txt"]
    assert [text_to_write(path).name for path in paths] == ["a.jpg.txt", "a.png.txt", "a.txt", "c.txt"]
    samples = read_folder(tmp_path).samples
    assert [(s.image_id, *s.captions) for s in samples] == [("a.jpg", "of both"), ("a.png", "of one"), ("c", "of c")]


def test_unreadable_names_are_keys_all_the_same(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png")
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        path.rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert keys_below(tmp_path, images_below(tmp_path).paths) == ["caf\ufffd"]


def test_every_suffix_is_lower_case_and_has_a_dot() -> None:
    assert {".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= suffixes()
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in suffixes())
    assert not {".eps", ".pdf", ".svg"} & suffixes()
