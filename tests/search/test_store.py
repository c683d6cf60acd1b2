"""The files of an index: whole after any step, compacted without a change, refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blip2.errors import DataError, RunError
from blip2.search import segments
from blip2.search import store as module
from blip2.search.segments import Batch, Row
from blip2.search.store import ModelId, Store

MODEL = ModelId("tiny", "abc", queries=3, width=8)


def batch(start: int, count: int, captions: int = 1) -> Batch:
    """`count` images with keys from `start` on, each with `captions` captions."""
    rng = np.random.default_rng(start)
    rows = [
        Row(f"k{n}", f"/photos/{n}.jpg", f"{n:032x}", captions=tuple(f"c{n}.{i}" for i in range(captions)))
        for n in range(start, start + count)
    ]
    vectors = rng.normal(size=(count, 3, 8)).astype(np.float16)
    return Batch(rows, vectors, rng.normal(size=(count * captions, 8)).astype(np.float16))


def contents(store: Store) -> dict[str, tuple[bytes, tuple[str, ...], bytes]]:
    """Everything that counts, by key."""
    entries = {}
    for image, row in store.items():
        segment = store.by_serial[image >> 32]
        captions = np.asarray(segment.caption_vectors)[segment.owners == image & 0xFFFFFFFF].tobytes()
        entries[row.key] = store.vectors(np.array([image])).tobytes(), row.captions, captions
    return entries


def filled(path: Path) -> Store:
    store = Store.create(path, MODEL, "exact", "data")
    with store.writing():
        for n in range(4):
            store.change(batch(10 * n, 10, captions=n % 3))
    return store


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    filled(tmp_path / "i")
    store, added = Store(tmp_path / "i"), [batch(10 * n, 10, captions=n % 3) for n in range(4)]
    assert len(store) == 40
    assert [row for _, row in store.items()] == [row for part in added for row in part.rows]
    images = np.array([image for image, _ in store.items()])
    np.testing.assert_array_equal(store.vectors(images), np.concatenate([part.vectors for part in added]))
    assert store.row(int(images[17])) == added[1].rows[7]


def test_compaction_changes_nothing_but_files(tmp_path: Path) -> None:
    store = filled(tmp_path / "i")
    with store.writing():
        store.change(remove=[image for image, row in store.items() if int(row.key[1:]) % 3 == 0])
        before = contents(store)
        assert len(before) == 26
        store.compact()
    assert contents(store) == before == contents(Store(tmp_path / "i"))
    assert len(store.segments) == 1
    assert store.manifest.removed == {}
    assert [p.name for p in (tmp_path / "i" / "segments").iterdir()] == ["000005"]


def test_full_segments_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL", 20)
    store = filled(tmp_path / "i")
    with store.writing():
        store.compact()
        assert [s.count for s in store.segments] == [10, 10, 10, 10]  # half full is full enough
        store.change(batch(100, 4))
        store.change(batch(200, 5))
        store.compact()
    assert [s.count for s in store.segments] == [10, 10, 10, 10, 9]


def test_removing_everything_leaves_a_whole_empty_index(tmp_path: Path) -> None:
    store = filled(tmp_path / "i")
    with store.writing():
        store.change(remove=[image for image, _ in store.items()])
    assert len(Store(tmp_path / "i")) == 0
    assert Store(tmp_path / "i").segments == []


def test_adding_and_removing_are_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at any rename or write, the index is as it was before the step or as it is after it."""
    store = filled(tmp_path / "i")
    before = contents(store)
    first = next(image for image, _ in store.items())
    after = {**{k: v for k, v in before.items() if k != "k0"}, **dict.fromkeys(f"k{n}" for n in range(50, 53))}
    calls = 0
    write = Path.write_bytes
    for stop in range(1, 20):
        calls = 0

        def failing(path: Path, data: bytes, stop: int = stop) -> int:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise OSError(28, "No space left on device")
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", failing)
        fresh = Store(tmp_path / "i")
        with fresh.writing():
            if stop == 8:
                fresh.change(batch(50, 3), [first])
                break
            with pytest.raises(RunError, match="No space left on device"):
                fresh.change(batch(50, 3), [first])
        assert contents(Store(tmp_path / "i")) == before
    assert calls == 7  # six files of the segment, then the manifest
    assert contents(Store(tmp_path / "i")).keys() == after.keys()


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    store = filled(tmp_path / "i")
    for name in (".000005.tmp-1f2e3d4c", "000005", "000099"):
        (tmp_path / "i" / "segments" / name).mkdir()
        (tmp_path / "i" / "segments" / name / "vectors.f16").write_bytes(b"half")
    before = contents(Store(tmp_path / "i"))
    with store.writing():
        store.change(batch(60, 2))
    assert set(contents(Store(tmp_path / "i"))) == {*before, "k60", "k61"}
    assert len(list((tmp_path / "i" / "segments").iterdir())) == 5


def test_a_second_writer_is_refused_and_a_late_one_sees_the_first(tmp_path: Path) -> None:
    first, second = filled(tmp_path / "i"), Store(tmp_path / "i")
    with first.writing():
        with pytest.raises(RunError, match="another process"), second.writing():
            pass
        first.change(batch(70, 1))
    with second.writing():
        second.change(batch(80, 1))
    assert {"k70", "k80"} <= set(contents(Store(tmp_path / "i")))


def test_a_reader_goes_on_while_segments_are_replaced(tmp_path: Path) -> None:
    store = filled(tmp_path / "i")
    reader = Store(tmp_path / "i")
    assert reader.current() is reader
    before = contents(reader)
    with store.writing():
        store.change(remove=[next(image for image, _ in store.items())])
        store.compact()
    assert contents(reader) == before
    assert contents(reader.current()) == contents(store)
    assert len(store) == 39


def test_a_creation_that_was_killed_can_be_done_again(tmp_path: Path) -> None:
    Store.create(tmp_path / "i", MODEL, "exact", None)
    (tmp_path / "i" / "manifest.json").rename(tmp_path / "i" / ".manifest.json.tmp-1f2e3d4c")
    assert len(Store.create(tmp_path / "i", MODEL, "faiss", None, exact_below=7)) == 0
    assert Store(tmp_path / "i").manifest.engine == {"name": "faiss", "exact_below": 7}


def test_ids_of_other_times_find_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path / "i")
    images = np.array([image for image, _ in store.items()])
    with store.writing():
        store.change(remove=images[:3].tolist())
        assert store.living(images).tolist() == images[3:].tolist()
        store.compact()
    assert store.living(images).tolist() == []


@pytest.mark.parametrize("name", ["vectors.f16", "rows.jsonl", "hashes.u8", "rows.u64", "owners.u32", "captions.f16"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_segment_is_named(tmp_path: Path, name: str, damage: str) -> None:
    filled(tmp_path / "i")
    file = tmp_path / "i" / "segments" / "000002" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    with pytest.raises(DataError, match="000002: segment is damaged") as error:
        Store(tmp_path / "i")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vectors.f16", "rows.jsonl", "hashes.u8", "rows.u64", "captions.f16"])
def test_a_file_of_another_index_is_refused_by_its_ends(tmp_path: Path, name: str) -> None:
    """Of the same size and form; compaction and removing keep the seals right."""
    store = filled(tmp_path / "i")
    file = tmp_path / "i" / "segments" / "000002" / name
    good = file.read_bytes()
    file.write_bytes(good[:1] + bytes(len(good) - 2) + good[-1:])
    with pytest.raises(DataError, match=r"000002: segment is damaged \(.*\): put the file back"):
        store.current()
    file.write_bytes(good)
    with store.writing():
        store.change(remove=[next(image for image, _ in store.items())])
        store.compact()
    assert set(store.manifest.seals) == set(store.manifest.segments) == {5}
    assert contents(Store(tmp_path / "i")) == contents(store)


def test_the_check_reports_a_byte_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_ENDS", 16)
    filled(tmp_path / "i")
    file = tmp_path / "i" / "segments" / "000002" / "vectors.f16"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert [segment.intact() for segment in Store(tmp_path / "i").segments] == [True, False, True, True]


def test_an_index_without_seals_is_read(tmp_path: Path) -> None:
    """They came later than the format."""
    before = contents(filled(tmp_path / "i"))
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    del manifest["seals"]
    (tmp_path / "i" / "manifest.json").write_text(json.dumps(manifest))
    store = Store(tmp_path / "i")
    assert contents(store) == before
    assert all(segment.intact() for segment in store.segments)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 9}', '{"format": 1, "model": 3}'])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    filled(tmp_path / "i")
    (tmp_path / "i" / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"build (the index|it) again"):
        Store(tmp_path / "i")


def test_no_index_and_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no index here"):
        Store(tmp_path / "nothing")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="is no index"):
        Store.create(tmp_path, MODEL, "exact", None)


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "i", MODEL, "exact", None)
    odd = b"/photos/\xff.jpg".decode("utf-8", "surrogateescape")
    one = batch(0, 1, captions=0)
    with store.writing():
        store.change(Batch([Row("k", odd, "0" * 32)], one.vectors, one.caption_vectors))
    assert next(Store(tmp_path / "i").items())[1].path == odd
    json.loads((tmp_path / "i" / "manifest.json").read_text())
