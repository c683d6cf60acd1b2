"""Engines against brute force in numpy, on synthetic clustered vectors."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2.errors import DataError
from blip2.search import engines
from blip2.search.check import check
from blip2.search.query import Index, combined
from blip2.search.scores import exact_top
from blip2.search.segments import Batch, Row
from blip2.search.store import ModelId, Store

QUERIES, WIDTH = 6, 32
needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="faiss-cpu is not installed (extra: search)")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clustered(images: int, seed: int = 0) -> np.ndarray:
    """[images, Q, E] unit vectors around 40 centres; an image's vectors are of several of them."""
    rng = np.random.default_rng(seed)
    centres = unit(np.random.default_rng(99).normal(size=(40, WIDTH)))
    chosen = centres[rng.integers(0, 40, (images, QUERIES))]
    return unit(chosen + 0.12 * rng.normal(size=chosen.shape)).astype(np.float16)


def store_of(path: Path, vectors: np.ndarray, engine: dict[str, object], parts: int = 3) -> Store:
    store = Store.create(path, ModelId("tiny", "abc", QUERIES, WIDTH), str(engine["name"]), None)
    numbers = np.array_split(np.arange(len(vectors)), parts)
    with store.writing():
        store.note_engine(dict(engine))
        for part in numbers:
            rows = [Row(f"k{n}", f"/{n}.jpg", f"{n:032x}") for n in part]
            store.change(Batch(rows, vectors[part], np.empty((0, WIDTH), np.float16)))
        engines.Engine(store).update(store, progress=False)
    return store


def brute(vectors: np.ndarray, query: np.ndarray, count: int) -> tuple[list[str], np.ndarray]:
    """The best by reading everything: plain numpy in float64."""
    dots = vectors.astype(np.float64) @ query.astype(np.float64).T
    scores = dots.max(axis=1).mean(axis=1)
    order = np.argsort(-scores, kind="stable")[:count]
    return [f"k{n}" for n in order], scores[order]


def keys(store: Store, ids: np.ndarray) -> list[str]:
    return [store.row(int(image)).key for image in ids]


@pytest.mark.parametrize("rows", [1, QUERIES])
def test_exact_search_is_brute_force(tmp_path: Path, rows: int) -> None:
    vectors = clustered(1300)
    store = store_of(tmp_path / "i", vectors, {"name": "exact"})
    for seed in range(5):
        query = unit(np.random.default_rng(seed).normal(size=(rows, WIDTH))).astype(np.float32)
        ids, scores = exact_top(store, store.segments, torch.from_numpy(query), 25)
        expected, right = brute(vectors, query, 25)
        assert keys(store, ids) == expected
        np.testing.assert_allclose(scores, right, atol=2e-6)


def test_exact_search_leaves_out_removed_images(tmp_path: Path) -> None:
    vectors = clustered(60)
    store = store_of(tmp_path / "i", vectors, {"name": "exact"})
    query = torch.from_numpy(vectors[17, :1].astype(np.float32))
    best, _ = exact_top(store, store.segments, query, 60)
    with store.writing():
        store.change(remove=best[:5].tolist())
    again, _ = exact_top(store, store.segments, query, 60)
    assert again.tolist() == best[5:].tolist()


def test_equal_scores_come_in_the_order_of_adding(tmp_path: Path) -> None:
    vectors = np.repeat(clustered(1), 30, axis=0)
    store = store_of(tmp_path / "i", vectors, {"name": "exact"})
    ids, _ = exact_top(store, store.segments, torch.from_numpy(vectors[0].astype(np.float32)), 30)
    assert keys(store, ids) == [f"k{n}" for n in range(30)]


@needs_faiss
@pytest.mark.parametrize("rows", [1, QUERIES])
def test_ivf_recall_on_clusters(tmp_path: Path, rows: int) -> None:
    """The scores are exact whatever the codes say, and 99 of 100 of the best ten are recalls."""
    vectors = clustered(3000)
    store = store_of(tmp_path / "i", vectors, {"name": "faiss", "exact_below": 500})
    index = Index(store)
    assert index.engine.covered() == set(store.by_serial)
    recalls = []
    for seed in range(60):
        query = clustered(1, seed=1000 + seed)[0, :rows].astype(np.float32)
        ids, scores = index.nearest(torch.from_numpy(query), 10)
        expected, right = brute(vectors, query, 10)
        recalls.append(len(set(keys(store, ids)) & set(expected)) / 10)
        numbers = [int(key[1:]) for key in keys(store, ids)]
        dots = vectors[numbers].astype(np.float64) @ query.astype(np.float64).T
        np.testing.assert_allclose(scores, dots.max(axis=1).mean(axis=1), atol=2e-6)
        assert scores[0] == pytest.approx(right[0], abs=1e-3)
    assert np.mean(recalls) >= 0.99
    assert check(index)["recall"] >= 0.99


@needs_faiss
def test_what_comes_after_training_is_found_at_once_and_covered_later(tmp_path: Path) -> None:
    vectors = clustered(2400)
    store = store_of(tmp_path / "i", vectors[:2000], {"name": "faiss", "exact_below": 500})
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "i" / "engine").iterdir()}
    with store.writing():
        for start, stop in ((2000, 2050), (2050, 2400)):
            rows = [Row(f"k{n}", f"/{n}.jpg", f"{n:032x}") for n in range(start, stop)]
            store.change(Batch(rows, vectors[start:stop], np.empty((0, WIDTH), np.float16)))
            engines.Engine(store).update(store, progress=False)
            index = Index(Store(tmp_path / "i"))
            bare = set(store.by_serial) - index.engine.covered()
            assert len(bare) == (1 if stop == 2050 else 0)
            query = torch.from_numpy(vectors[stop - 1, 2:3].astype(np.float32))
            assert keys(store, index.nearest(query, 1)[0]) == [f"k{stop - 1}"]
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "i" / "engine").iterdir()}
    assert files.items() < after.items()  # nothing was trained or coded again


@needs_faiss
def test_removed_images_are_not_found_through_their_codes(tmp_path: Path) -> None:
    vectors = clustered(1500)
    store = store_of(tmp_path / "i", vectors, {"name": "faiss", "exact_below": 500})
    query = torch.from_numpy(vectors[700, :1].astype(np.float32))
    first, _ = Index(store).nearest(query, 20)
    with store.writing():
        store.change(remove=first[:7].tolist())
        store.compact()
        engines.Engine(store).update(store, progress=False)
    index = Index(Store(tmp_path / "i"))
    expected = [int(k[1:]) for k in brute(vectors, query.numpy(), 20)[0]][7:]
    assert [int(k[1:]) for k in keys(index.store, index.nearest(query, 13)[0])] == expected


@needs_faiss
def test_a_lost_engine_is_made_again(tmp_path: Path) -> None:
    store = store_of(tmp_path / "i", clustered(900), {"name": "faiss", "exact_below": 500})
    for path in (tmp_path / "i" / "engine").iterdir():
        path.unlink()
    with store.writing():
        engines.Engine(store).update(store, progress=False)
    assert check(Index(Store(tmp_path / "i")))["recall"] > 0.95


@needs_faiss
@pytest.mark.parametrize("how", ["cut", "other"])
def test_a_replaced_engine_file_is_an_error_and_made_again(tmp_path: Path, how: str) -> None:
    vectors = clustered(900)
    store = store_of(tmp_path / "i", vectors, {"name": "faiss", "exact_below": 500})
    index, query = Index(store), torch.from_numpy(vectors[3, :1].astype(np.float32))
    index.nearest(query, 10)
    file = next((tmp_path / "i" / "engine").glob("shard-*"))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    index.refresh()
    with pytest.raises(DataError, match=r"FAISS cannot read it.*`blip2 index add`") as error:
        index.nearest(query, 10)
    assert "\n" not in str(error.value)
    with store.writing():
        engines.Engine(store).update(store, progress=False)
    index.refresh()
    assert check(index)["recall"] > 0.95
    assert keys(store, index.nearest(query, 1)[0]) == ["k3"]


def test_without_faiss_every_vector_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "has_faiss", lambda: False)
    vectors = clustered(800)
    store = store_of(tmp_path / "i", vectors, {"name": "faiss", "exact_below": 500})
    assert "pip install faiss-cpu" in capsys.readouterr().err
    query = vectors[3, :1].astype(np.float32)
    ids, _ = Index(store).nearest(torch.from_numpy(query), 10)
    assert keys(store, ids) == brute(vectors, query, 10)[0]


def test_an_index_of_lancedb_is_searched_exactly_until_faiss_takes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LanceDB was an engine of earlier versions; its table is deleted when FAISS's files are written."""
    vectors = clustered(800)
    store = store_of(tmp_path / "i", vectors, {"name": "exact"})
    with store.writing():
        segments = [segment.serial for segment in store.segments]
        store.note_engine({"name": "lancedb", "uri": None, "exact_below": 500, "segments": segments})
    (tmp_path / "i" / "engine" / "lance").mkdir(parents=True)
    index, query = Index(Store(tmp_path / "i")), vectors[3, :1].astype(np.float32)
    err = capsys.readouterr().err
    assert (err.count("\n"), "lancedb is not supported any more: faiss takes its place" in err) == (1, True)
    assert index.engine.covered() == set()
    assert keys(store, index.nearest(torch.from_numpy(query), 10)[0]) == brute(vectors, query, 10)[0]
    with store.writing():
        engines.Engine(store).update(store, progress=False)
    index, err = Index(Store(tmp_path / "i")), capsys.readouterr().err
    assert index.store.manifest.engine["name"] == "faiss"
    assert index.engine.covered() == (set(store.by_serial) if find_spec("faiss") else set())
    assert keys(store, index.nearest(torch.from_numpy(query), 1)[0]) == ["k3"]
    assert not (tmp_path / "i" / "engine" / "lance").exists()


def test_scores_of_several_kinds_are_standardised() -> None:
    text = np.array([0.1, 0.2, 0.3], np.float32)
    image = np.array([900.0, 100.0, -np.inf], np.float32)
    first, second = (np.array(x) for x in ([-1.0, 0, 1], [800.0, 0, 0]))
    second = (second - second.mean()) / second.std()
    np.testing.assert_allclose(combined([text, image]), (first / first.std() + second) / 2, rtol=1e-4)
    assert combined([text]) is text
