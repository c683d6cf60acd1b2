"""Strict loading, and the few differences that it adapts and reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip2.configs import BERT_WORDS
from blip2.errors import CheckpointError
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.weights.loading import STAGE1_ONLY, Allowed, compare, fill, trained_state


def model(*, words: int = 20, queries: int = 3, width: int = 6) -> Stage1:
    sizes = {"width": 8, "depth": 2, "heads": 2, "inner": 12, "image_width": width, "queries": queries}
    return Stage1(QFormer(**sizes, vocab=words, positions=10), embed_dim=4)


def state(**sizes: int) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in trained_state(model(**sizes)).items()}


def unchanged(target: Stage1, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in trained_state(target).items())


def copy(target: Stage1) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained_state(target).items()}


def test_everything_is_filled() -> None:
    target, given = model(), state()
    report = fill(target, "x", given)
    assert unchanged(target, given)
    assert (report.loaded, report.left_out, report.fresh, report.reshaped) == (len(given), (), (), ())
    assert report.line() == f"{len(given)} tensors from x"


@pytest.mark.parametrize(("words", "rows"), [(21, 20), (19, 19)])
def test_dec_is_adapted_and_reported(words: int, rows: int) -> None:
    target = model(words=words)
    before, given = copy(target), state()
    report = fill(target, "x", given, Allowed(adapt=True))
    table = target.qformer.embeddings.word.weight
    assert torch.equal(table[:rows], given["qformer.embeddings.word.weight"][:rows])
    assert torch.equal(table[rows:], before["qformer.embeddings.word.weight"][rows:])
    how = "1 start fresh" if words > 20 else "the first 19 are used"
    assert report.reshaped == (f"20 words in the checkpoint, {words} here: {how}",)
    assert how in report.line()


@pytest.mark.parametrize("queries", [2, 5])
def test_queries_are_adapted_and_reported(queries: int) -> None:
    target, given = model(queries=queries), state()
    report = fill(target, "x", given, Allowed(adapt=True))
    rows = min(queries, 3)
    assert torch.equal(target.qformer.query_tokens[:rows], given["qformer.query_tokens"][:rows])
    assert report.reshaped[0].startswith(f"3 queries in the checkpoint, {queries} here: ")


@pytest.mark.parametrize("sizes", [{"words": 21}, {"queries": 5}, {"words": 25}])
def test_nothing_is_adapted_unasked(sizes: dict[str, int]) -> None:
    target = model(**sizes)
    before = copy(target)
    with pytest.raises(CheckpointError, match="in the checkpoint and"):
        fill(target, "x", state(), Allowed(adapt="words" in sizes and sizes["words"] == 25))
    assert unchanged(target, before)


def test_another_encoder_names_both_widths() -> None:
    target = model(width=7)
    before = copy(target)
    with pytest.raises(CheckpointError, match="^x: made for an image encoder 6 wide, this model's is 7 wide$"):
        fill(target, "x", state())
    assert unchanged(target, before)


def test_the_vocabulary_of_bert_and_of_a_qformer() -> None:
    """The real numbers: 30,522 words of BERT, and [DEC]."""
    target, given = model(words=BERT_WORDS + 1), state(words=BERT_WORDS)
    report = fill(target, "x", given, Allowed(adapt=True))
    assert report.reshaped == ("30522 words in the checkpoint, 30523 here: 1 start fresh",)
    assert torch.equal(target.qformer.embeddings.word.weight[:BERT_WORDS], given["qformer.embeddings.word.weight"])
    assert torch.equal(target.qformer.head.bias[:BERT_WORDS], given["qformer.head.bias"])


def test_another_language_model_names_both_widths() -> None:
    """As tensors alone: a stage 2 is compared without its language model."""
    own = {"language_proj.weight": torch.zeros(20, 8), "language_proj.bias": torch.zeros(20)}
    given = {"language_proj.weight": torch.zeros(12, 8), "language_proj.bias": torch.zeros(12)}
    with pytest.raises(CheckpointError, match="^x: made for a language model 12 wide, this model's is 20 wide$"):
        compare(own, "x", given, Allowed(adapt=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_are_floats(dtype: torch.dtype) -> None:
    target = model()
    before, given = copy(target), state()
    given["ln_vision.bias"] = torch.zeros(6, dtype=dtype)
    with pytest.raises(CheckpointError, match="x: ln_vision.bias is of type .*, not a float"):
        fill(target, "x", given)
    assert unchanged(target, before)


def test_missing_and_unexpected_are_named() -> None:
    target, given = model(), state()
    before = copy(target)
    value = given.pop("temp")
    with pytest.raises(CheckpointError, match="x: temp is missing"):
        fill(target, "x", given)
    with pytest.raises(CheckpointError, match="x: more has no place"):
        fill(target, "x", {**given, "temp": value, "more": value})
    assert unchanged(target, before)


def test_a_list_allows_by_tensor_and_by_part() -> None:
    target, given = model(), state()
    given.pop("temp")
    report = fill(target, "x", given, Allowed(fresh=("temp",)))
    assert report.fresh == ("temp",)
    with pytest.raises(CheckpointError, match="temperature has no place"):
        fill(target, "x", {**given, "temperature": torch.zeros(1)}, Allowed(left_out=STAGE1_ONLY, fresh=("temp",)))
