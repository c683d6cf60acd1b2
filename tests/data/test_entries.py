"""Texts of samples as data sets write them."""

from __future__ import annotations

import pytest

from blip2.data.entries import lines_of, text_lines


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_lines_end_where_editors_end_them(odd: str) -> None:
    assert text_lines(f"a{odd}b\nc\r\nd\re") == [f"a{odd}b", "c", "d", "e"]
    assert text_lines("a\n\nb\n") == ["a", "", "b"]
    assert text_lines("") == []
    assert lines_of(f"a{odd}b\nc")["captions"] == (f"a{odd}b", "c")
