"""The Q-Former against a plain one written here: padded, whole masks, keys/values projected anew in every pass.

Everything is in float64, so that a difference is a mistake and not rounding; gradients of all
parameters and of the image features are compared as well as outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.models.qformer.layers import Packing
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.ops.losses import next_token_positions
from blip2.ops.masks import bidirectional_mask, multimodal_causal_mask

Q, D, C, P, V = 3, 8, 6, 5, 13
LENGTHS = [[5, 2, 1, 4], [3], [1], [1, 1, 1], [4, 4]]


def make(**changes: Any) -> QFormer:
    """A small random Q-Former in float64; weights far larger than a fresh one's, so that every term counts."""
    sizes = {"width": D, "depth": 3, "heads": 2, "inner": 12, "image_width": C, "queries": Q, "vocab": V}
    qformer = QFormer(**(sizes | {"positions": 9, "dropout": 0.0, "attention_dropout": 0.0} | changes)).double()
    with torch.no_grad():
        for p in qformer.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return qformer


def images(count: int) -> Tensor:
    return torch.randn(count, P, C, dtype=torch.float64, requires_grad=True)


def texts(lengths: list[int], width: int | None = None) -> tuple[Tensor, Tensor]:
    """Random right-padded ids and their mask; `width` above the longest leaves columns of padding."""
    width = width or max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randint(1, V, mask.shape) * mask, mask


def plain_attention(module: Any, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    heads, (N, L, _) = module.heads, x.shape

    def split(y: Tensor) -> Tensor:
        return y.view(N, y.shape[1], heads, -1).permute(0, 2, 1, 3)

    q, k, v = split(module.query(x)), split(module.key(source)), split(module.value(source))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    context = (scores.softmax(dim=-1) @ v).permute(0, 2, 1, 3).reshape(N, L, -1)
    return module.norm(x + module.output(context))


def unimodal_mask(queries: int, text_mask_BT: Tensor) -> Tensor:
    """ITC: queries see queries, text sees text."""
    batch, length = text_mask_BT.shape
    mask = text_mask_BT.new_zeros(batch, 1, queries + length, queries + length, dtype=torch.bool)
    mask[..., :queries, :queries] = True
    mask[..., queries:, queries:] = text_mask_BT.bool()[:, None, None, :]
    return mask


def plain_feed_forward(module: Any, x: Tensor) -> Tensor:
    return module.norm(x + module.down(F.gelu(module.up(x))))


def plain(
    qformer: Any, build_mask: Callable[[int, Tensor], Tensor], ids: Tensor, mask: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of queries [N, Q, D] and text [N, T, D] of N rows with an image each."""
    words = qformer.embeddings.word(ids) + qformer.embeddings.position(torch.arange(ids.shape[1]))
    queries = qformer.query_tokens.expand(len(ids), -1, -1)
    x = qformer.embedding_norm(torch.cat([queries, words], dim=1))
    visible = build_mask(Q, mask)
    for layer in qformer.layers:
        x = plain_attention(layer.self_attention, x, x, visible)
        query, text = x[:, :Q], x[:, Q:]
        if layer.cross_attention is not None:
            query = plain_attention(layer.cross_attention, query, features, None)
        x = torch.cat([plain_feed_forward(layer.query_ff, query), plain_feed_forward(layer.text_ff, text)], dim=1)
    return x[:, :Q], x[:, Q:]


def plain_logits(qformer: Any, hidden: Tensor) -> Tensor:
    head = qformer.head
    return head.norm(F.gelu(head.dense(hidden))) @ qformer.embeddings.word.weight.t() + head.bias


def assert_equal(fast: Tensor, slow: Tensor, qformer: nn.Module, features: Tensor) -> None:
    """Same outputs, and same gradients of a random weighting of them."""
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)
    weights, inputs = torch.randn_like(fast), [features, *qformer.parameters()]
    names = ["features", *(name for name, _ in qformer.named_parameters())]
    got = torch.autograd.grad((fast * weights).sum(), inputs, allow_unused=True)
    want = torch.autograd.grad((slow * weights).sum(), inputs, allow_unused=True)
    for name, a, b, x in zip(names, got, want, inputs, strict=True):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_encode_queries() -> None:
    qformer, features = make(), images(4)
    ids, mask = texts([2, 2, 2, 2])
    fast, cache = qformer.encode_queries(qformer.project_image(features))
    assert fast.shape == (4, Q, D)
    assert len(cache) == 3
    assert_equal(fast, plain(qformer, unimodal_mask, ids, mask, features)[0], qformer, features)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_encode_text(lengths: list[int]) -> None:
    qformer, features = make(), images(len(lengths))
    ids, mask = texts(lengths)
    slow = plain(qformer, unimodal_mask, ids, mask, features)[1][:, 0]
    assert_equal(qformer.encode_text(ids, mask), slow, qformer, features)


@pytest.mark.parametrize("cross_every", [1, 2, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_encode_pair(lengths: list[int], cross_every: int) -> None:
    qformer, features = make(cross_every=cross_every), images(len(lengths))
    ids, mask = texts(lengths)
    fast = qformer.encode_pair(ids, mask, qformer.project_image(features))
    assert_equal(fast, plain(qformer, bidirectional_mask, ids, mask, features)[0], qformer, features)


@pytest.mark.parametrize(
    ("count", "lengths"), [(3, [5, 2, 1, 4, 3, 3]), (1, [2, 4]), (2, [1, 3, 2, 2, 4, 1]), (2, [3] * 4)]
)
def test_several_texts_for_each_image(count: int, lengths: list[int]) -> None:
    """Row n is paired with image n mod B; the keys and values are not copied, the result is as if."""
    qformer, features = make(), images(count)
    ids, mask = texts(lengths)
    fast = qformer.encode_pair(ids, mask, qformer.project_image(features))
    tiled = features.repeat(len(lengths) // count, 1, 1)
    assert_equal(fast, plain(qformer, bidirectional_mask, ids, mask, tiled)[0], qformer, features)


def test_chosen_images_with_repeats() -> None:
    qformer, features = make(), images(4)
    ids, mask = texts([3, 1, 5, 2])
    index = torch.tensor([2, 0, 2, 3])
    fast = qformer.encode_pair(ids, mask, qformer.project_image(features).select(index))
    assert_equal(fast, plain(qformer, bidirectional_mask, ids, mask, features[index])[0], qformer, features)


@pytest.mark.parametrize("lengths", [lengths for lengths in LENGTHS if max(lengths) > 1])
def test_decode_text(lengths: list[int]) -> None:
    qformer, features = make(), images(len(lengths))
    ids, mask = texts(lengths)
    at, _ = next_token_positions(mask)
    _, cache = qformer.encode_queries(qformer.project_image(features))
    fast = qformer.decode_text(ids, mask, cache, at)
    assert fast.shape == (sum(lengths) - len(lengths), V)
    slow = plain_logits(qformer, plain(qformer, multimodal_causal_mask, ids, mask, features)[1][at])
    assert_equal(fast, slow, qformer, features)


def test_decode_text_only_where_asked() -> None:
    """The first token alone, as generation does at every step; and the last tokens of uneven rows."""
    qformer, features = make(), images(2)
    ids, mask = texts([4, 2])
    _, cache = qformer.encode_queries(qformer.project_image(features))
    everywhere = qformer.decode_text(ids, mask, cache, mask)
    last = torch.tensor([[False, False, False, True], [False, True, False, False]])
    torch.testing.assert_close(qformer.decode_text(ids, mask, cache, last), everywhere[[3, 5]])
    first = torch.tensor([[True], [True]])
    torch.testing.assert_close(qformer.decode_text(ids[:, :1], first, cache, first), everywhere[[0, 4]])


def test_columns_of_padding_change_nothing() -> None:
    qformer, features = make(), images(2)
    ids, mask = texts([3, 2])
    wide, wide_mask = F.pad(ids, (0, 4), value=7), F.pad(mask, (0, 4))
    kv = qformer.project_image(features)
    _, cache = qformer.encode_queries(kv)
    at, wide_at = next_token_positions(mask)[0], next_token_positions(wide_mask)[0]
    assert torch.equal(qformer.encode_text(wide, wide_mask), qformer.encode_text(ids, mask))
    assert torch.equal(qformer.encode_pair(wide, wide_mask, kv), qformer.encode_pair(ids, mask, kv))
    assert torch.equal(qformer.decode_text(wide, wide_mask, cache, wide_at), qformer.decode_text(ids, mask, cache, at))


def test_what_stands_in_the_padding_changes_nothing() -> None:
    qformer, features = make(), images(2)
    ids, mask = texts([4, 2])
    other, kv = ids.masked_fill(~mask, 5), qformer.project_image(features)
    assert torch.equal(qformer.encode_text(other, mask), qformer.encode_text(ids, mask))
    assert torch.equal(qformer.encode_pair(other, mask, kv), qformer.encode_pair(ids, mask, kv))


def test_causal_text_does_not_see_what_comes() -> None:
    qformer, features = make(), images(1)
    ids, mask = texts([5])
    _, cache = qformer.encode_queries(qformer.project_image(features))
    changed = ids.clone()
    changed[0, 3] = ids[0, 3] % (V - 1) + 1
    before, after = (qformer.decode_text(x, mask, cache, mask) for x in (ids, changed))
    torch.testing.assert_close(before[:3], after[:3])
    assert (before[3] - after[3]).abs().max() > 1e-3


def test_packing_packs_and_unpacks() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    packing = Packing(mask)
    x = torch.randn(3, 4, 2)
    assert (packing.length, packing.full) == (3, False)
    packed = packing.pack(x)
    assert torch.equal(packed, torch.cat([x[0, :2], x[1, :1], x[2]])[[0, 1, 2, 3, 4, 5]])
    assert torch.equal(packing.unpack(packed), x[:, :3] * mask[:, :3, None])
    assert torch.equal(packing.first(packed), x[:, 0])


def test_full_packing_is_a_view() -> None:
    packing, x = Packing(torch.ones(2, 3)), torch.randn(2, 3, 4)
    assert packing.full
    assert torch.equal(packing.unpack(packing.pack(x)), x)
    assert torch.equal(packing.first(packing.pack(x)), x[:, 0])


def every_pass(qformer: QFormer, features: Tensor, lengths: list[int], looked_up: bool = False) -> list[Tensor]:
    """Outputs of all passes over text, and gradients of all parameters."""
    torch.manual_seed(3)
    ids, mask = texts(lengths)
    kv = qformer.project_image(features)
    _, cache = qformer.encode_queries(kv)
    at, _ = next_token_positions(mask)
    read = qformer.embed_tokens(ids) if looked_up else ids
    outputs = [
        qformer.encode_text(read, mask),
        qformer.encode_pair(read, mask, kv),
        qformer.decode_text(read, mask, cache, at),
    ]
    weight = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=weight, dtype=x.dtype)).sum() for x in outputs).backward()  # type: ignore[union-attr]
    grads = [p.grad for p in qformer.parameters() if p.grad is not None]
    qformer.zero_grad()
    return [x.detach() for x in outputs] + grads


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_padding_to_a_few_lengths_changes_nothing(
    lengths: list[int], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    qformer, features = make(dropout=dropout), images(len(lengths))
    plain = every_pass(qformer, features, lengths)
    monkeypatch.setattr(QFormer, "_packing", lambda self, mask: Packing(mask, bucketed=True))
    for ours, theirs in zip(every_pass(qformer, features, lengths), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("bucketed", [False, True])
def test_words_looked_up_once_for_all_passes(
    lengths: list[int], bucketed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    qformer, features = make(dropout=0.3), images(len(lengths))
    monkeypatch.setattr(QFormer, "_packing", lambda self, mask: Packing(mask, bucketed))
    plain = every_pass(qformer, features, lengths)
    lookups = []
    qformer.embeddings.word.register_forward_hook(lambda *_: lookups.append(1))  # type: ignore[union-attr]
    for once, apart in zip(every_pass(qformer, features, lengths, looked_up=True), plain, strict=True):
        torch.testing.assert_close(once, apart)
    assert len(lookups) == 1


def test_bucketed_packing_is_padded_and_never_full() -> None:
    packing, x = Packing(torch.ones(2, 3), bucketed=True), torch.randn(2, 3, 4)
    assert (packing.longest, packing.length, packing.full) == (3, 8, False)
    assert torch.equal(packing.pack(x), x.flatten(0, 1))
    assert torch.equal(packing.unpack(packing.pack(x))[:, :3], x)
    assert not packing.unpack(packing.pack(x))[:, 3:].any()
    assert Packing(torch.ones(2, 9), bucketed=True).length == 16


def test_dropout_acts_only_while_training() -> None:
    qformer, features = make(dropout=0.5, attention_dropout=0.5), images(2)
    kv = qformer.project_image(features)
    first, second = (qformer.encode_queries(kv)[0] for _ in range(2))
    assert not torch.equal(first, second)
    qformer.eval()
    assert torch.equal(*(qformer.encode_queries(kv)[0] for _ in range(2)))


def test_queries_alone_need_no_text_branch() -> None:
    """The query side has the same names with and without text, so one loads the other's weights."""
    with_text, without, features = make(), make(vocab=None), images(2)
    state = with_text.state_dict()
    without.load_state_dict({name: state[name] for name in without.state_dict()})
    got, want = (q.encode_queries(q.project_image(features))[0] for q in (without, with_text))
    assert torch.equal(got, want)
    assert not any(part in name for name, _ in without.named_parameters() for part in ("text_ff", "embeddings", "head"))
    with pytest.raises(ValueError, match="without its text branch"):
        without.encode_text(*texts([2]))


def test_wrong_sizes_are_refused_with_both_sides() -> None:
    qformer = make()
    with pytest.raises(ValueError, match="image features are 7 wide, the Q-Former was built for 6"):
        qformer.project_image(torch.zeros(1, P, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="3 texts for 2 images"):
        qformer.encode_pair(*texts([1, 1, 1]), qformer.project_image(images(2)))
    with pytest.raises(ValueError, match="text of 12 tokens, but only 9 positions"):
        qformer.encode_text(*texts([12]))
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        make(heads=3)


def test_initialisation() -> None:
    qformer = QFormer(width=32, depth=2, heads=4, inner=64, image_width=24, queries=64, vocab=500)
    assert qformer.query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert qformer.query_tokens.mean().item() == pytest.approx(0, abs=0.002)
    assert not any(p.any() for name, p in qformer.named_parameters() if name.endswith("bias"))


def test_paper_size_of_stage_1() -> None:
    """186.7M trained parameters (CHECKPOINTS, counted on LAVIS's own): BERT-base, 1408-wide image features."""
    with torch.device("meta"):
        model = Stage1(QFormer(width=768, depth=12, heads=12, inner=3072, image_width=1408, queries=32, vocab=30523))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(186.7, abs=0.05)


@pytest.mark.parametrize(("image_width", "low", "high"), [(1408, 103, 108), (1024, 103, 108)])
def test_paper_size_of_stage_2(image_width: int, low: float, high: float) -> None:
    """Queries only, with the projection to OPT-2.7B's 2560 and the image's LayerNorm."""
    with torch.device("meta"):
        qformer = QFormer(width=768, depth=12, heads=12, inner=3072, image_width=image_width, queries=32, vocab=None)
        parts = [qformer, nn.LayerNorm(image_width), nn.Linear(768, 2560)]
    assert low < sum(p.numel() for part in parts for p in part.parameters()) / 1e6 < high


@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_before_the_projections_folded_into_them(trained: bool) -> None:
    """Keys, values and all gradients as with the norm in its place, whether or not the features want theirs."""
    torch.manual_seed(0)
    qformer, norm = make(), nn.LayerNorm(C, eps=1e-5).double()
    with torch.no_grad():
        norm.weight.add_(0.4 * torch.randn(C))
        norm.bias.add_(torch.randn(C))
    features = images(3).detach().requires_grad_(trained)
    mine, plain = qformer.project_image(features, norm), qformer.project_image(norm(features))
    inputs = [*norm.parameters(), *(features,) * trained]
    inputs += [p for layer in qformer.layers[::2] for p in layer.cross_attention.key.parameters()]
    inputs += [p for layer in qformer.layers[::2] for p in layer.cross_attention.value.parameters()]
    sums = [
        sum((x * torch.arange(x.numel()).view(x.shape).cos()).sum() for kv in image_kv.layers for x in kv)
        for image_kv in (mine, plain)
    ]
    for got, want in zip(*(torch.autograd.grad(s, inputs) for s in sums), strict=True):
        torch.testing.assert_close(got, want)
    for (k, v), (key, value) in zip(mine.layers, plain.layers, strict=True):
        torch.testing.assert_close((k, v), (key, value))
    with torch.no_grad():
        assert torch.equal(qformer.project_image(features, norm).layers[0][0], plain.layers[0][0])


def test_a_folded_norm_asks_for_no_gradient_of_the_features() -> None:
    qformer, norm = make(), nn.LayerNorm(C).double()
    kv = qformer.project_image(images(2).detach(), norm)
    saved, todo = set(), [kv.layers[0][0].grad_fn]
    while todo:
        node = todo.pop()
        saved.add(type(node).__name__)
        todo += [nxt for nxt, _ in node.next_functions if nxt is not None]
    assert not any("LayerNorm" in name for name in saved)
