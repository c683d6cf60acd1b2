"""What is written is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip2.errors import RunError, os_error_as
from blip2.io.atomic import replacing, write_bytes, write_json, write_json_lines, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in ({"a": [1, "ä"]}, {"b": None}):
        write_json(path, value)
        assert json.loads(path.read_text("utf-8")) == value
    write_json_lines(path, [{"a": "ä"}, 2])
    assert path.read_bytes() == '{"a": "ä"}\n2\n'.encode()
    write_text(path, "one\ntwo \udc80")
    assert path.read_bytes() == b"one\ntwo ?"
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path: Path, folder: bool, sync: bool) -> None:
    path = tmp_path / "a"

    def write(temporary: Path, text: str) -> None:
        if folder:
            (temporary / "in").mkdir(parents=True)
            temporary = temporary / "in" / "file"
        temporary.write_text(text)

    with replacing(path, sync=sync) as temporary:
        write(temporary, "first")
        assert not path.exists()
    with pytest.raises(KeyError), replacing(path, sync=sync) as temporary:  # noqa: PT012
        write(temporary, "second")
        raise KeyError
    assert (path / "in" / "file" if folder else path).read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"), replacing(tmp_path / "a") as temporary:
        temporary.mkdir()
    with pytest.raises(RunError, match="^a page: Is a directory$"), os_error_as(RunError, "a page"):
        write_text(tmp_path / "a", "a page")
    assert names(tmp_path / "a") == ["mine"]
    assert names(tmp_path) == ["a"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "n" * 250 + ".txt"])
def test_names_as_long_as_a_file_system_takes(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "whole")
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text("utf-8") == "whole"
