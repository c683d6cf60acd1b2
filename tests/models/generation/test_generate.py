"""Text written after reading every prompt once, against transformers' `generate`: the same ids."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    RecurrentGemmaConfig,
    T5Config,
)

from blip2.configs import DecodingConfig
from blip2.models.generation import generate as generation
from blip2.models.generation import prefill
from blip2.models.generation.prefill import Continuation
from blip2.models.language.model import LanguageModel, language_model_from_config

V = 97
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS: dict[str, Any] = {
    "opt": OPTConfig(
        vocab_size=V,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "phi": PhiConfig(**SIZES),
    "sliding": MistralConfig(**GROUPED, sliding_window=6),
    "gemma2": Gemma2Config(**GROUPED, final_logit_softcapping=5.0, sliding_window=6),
    "t5": T5Config(vocab_size=V, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "bart": BartConfig(
        vocab_size=V,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        forced_eos_token_id=None,
    ),
}
MAIN = ("opt", "llama", "t5")
ENDS = list(range(2, 26))  # a quarter of the vocabulary, so that random models end rows early and unevenly


def build(kind: str, config: Any = None) -> LanguageModel:
    torch.manual_seed(0)
    model = language_model_from_config(copy.deepcopy(config or CONFIGS[kind]))
    with torch.no_grad():  # larger weights than at initialisation, so that positions and order matter
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.15)
    return model


def inputs(model: LanguageModel, seed: int = 0, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Soft prompts, and left-padded text of 1 to 7 tokens."""
    random = torch.Generator().manual_seed(seed)
    mask = (torch.arange(7) >= torch.randint(0, 7, (rows, 1), generator=random)).long()
    ids = torch.randint(26, V, mask.shape, generator=random) * mask
    return torch.randn(rows, 3, model.hidden_size, generator=random), ids, mask


def written(model: LanguageModel, data: tuple[Tensor, Tensor, Tensor], **options: Any) -> Tensor:
    """Ids by us, 1 to 12 of them unless told otherwise."""
    given = {name: options.pop(name) for name in ("end_id", "pad_id", "images_B") if name in options}
    decoding = DecodingConfig(**{"min_tokens": 1, "max_tokens": 12, **options})
    return model.generate(*data, decoding, **{"end_id": ENDS, "pad_id": 1, **given})


def reference(model: LanguageModel, prompt: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """transformers' own, on soft prompts and text joined by hand, row by row."""
    rows = [torch.cat([p, model.embed(i[m.bool()])]) for p, i, m in zip(prompt, ids, mask, strict=True)]
    longest = max(map(len, rows))
    embeds = torch.zeros(len(rows), longest, model.hidden_size)
    joined = torch.zeros(len(rows), longest, dtype=torch.int64)
    for n, row in enumerate(rows):
        place = slice(0, len(row)) if model.encoder_decoder else slice(longest - len(row), longest)
        embeds[n, place], joined[n, place] = row, 1
    with torch.no_grad():
        out = model.model.generate(inputs_embeds=embeds, attention_mask=joined, **options)
    return out[:, 1:] if model.encoder_decoder else out


def both(model: LanguageModel, data: tuple[Tensor, Tensor, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Ids by us and by transformers."""
    theirs = {
        "num_beams": options.get("beams", 5),
        "num_return_sequences": options.get("num", 1),
        "min_new_tokens": options.get("min_tokens", 1),
        "max_new_tokens": options.get("max_tokens", 12),
        "eos_token_id": options.get("end_id", ENDS),
        "pad_token_id": options.get("pad_id", 1),
        "repetition_penalty": options.get("repetition_penalty", 1.0),
        "do_sample": False,
    }
    if theirs["num_beams"] > 1:
        theirs["length_penalty"] = options.get("length_penalty", 1.0)
    return written(model, data, **options), reference(model, *data, **theirs)


def lengths(ids: Tensor, ends: list[int] = ENDS) -> list[int]:
    return [next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in ids.tolist()]


@pytest.fixture(autouse=True)
def _never_by_transformers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Ours must not be transformers' under another name."""
    if "transformers" in request.node.name:
        return

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("went through transformers' generate")

    monkeypatch.setattr("blip2.models.generation.generate._by_transformers", refuse)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_ids_are_those_of_generate(kind: str, beams: int) -> None:
    model = build(kind)
    for seed in range(2):
        ours, theirs = both(model, inputs(model, seed), beams=beams)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": -1.0},
        {"length_penalty": 2.5},
        {"length_penalty": 0.0},
        {"min_tokens": 0},
        {"min_tokens": 6, "max_tokens": 9},
        {"max_tokens": 1},
        {"end_id": 7},
        {"end_id": 7, "min_tokens": 12},
        {"num": 3},
        {"num": 5, "length_penalty": -1.0, "min_tokens": 3},
        {"pad_id": 0},
        {"beams": 1, "pad_id": 0},
        {"beams": 1, "min_tokens": 5},
        {"beams": 3, "end_id": [5, 80, 81]},
    ],
    ids=str,
)
def test_every_setting_means_what_it_means_there(kind: str, options: dict[str, Any]) -> None:
    model = build(kind)
    ours, theirs = both(model, inputs(model, 4), **options)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("beams", [1, 5])
def test_repetition_penalty_counts_all_that_was_written(kind: str, beams: int) -> None:
    """Row by row: in a padded batch `generate` (5.23) leaves out as many new tokens as there is padding."""
    model = build(kind)
    prompt, ids, mask = inputs(model)
    options: dict[str, Any] = {"beams": beams, "repetition_penalty": 3.0, "min_tokens": 12}
    ours = written(model, (prompt, ids, mask), **options)
    plain = written(model, (prompt, ids, mask), beams=beams, min_tokens=12)
    assert ours.tolist() != plain.tolist()
    for n in range(len(ids)):
        row = (prompt[n : n + 1], ids[n : n + 1, mask[n].bool()], mask[n : n + 1, mask[n].bool()])
        _, theirs = both(model, row, **options)
        assert ours[n].tolist() == theirs[0].tolist()


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5, "temperature": 2.0}, {"top_p": 1.0}], ids=str)
def test_samples_are_those_of_generate_from_the_same_seed(kind: str, options: dict[str, Any]) -> None:
    model = build(kind)
    data = inputs(model)
    torch.manual_seed(1)
    ours = written(model, data, sample=True, num=3, **options)
    torch.manual_seed(1)
    theirs = reference(
        model,
        *data,
        do_sample=True,
        num_return_sequences=3,
        min_new_tokens=1,
        max_new_tokens=12,
        eos_token_id=ENDS,
        pad_token_id=1,
        top_k=0,
        **{"top_p": 0.9, "temperature": 1.0, **options},
    )
    assert ours.tolist() == theirs.tolist()
    assert len(set(lengths(ours))) > 2


@pytest.mark.parametrize("kind", [*MAIN, "gpt2", "phi", "sliding", "gemma2"])
def test_questions_about_one_image_share_what_was_read_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    prompt, ids, mask = inputs(model, rows=6)
    images = torch.tensor([0, 0, 1, 0, 1, 2])
    options: dict[str, Any] = {"beams": 3, "max_tokens": 8}
    apart = written(model, (prompt[images], ids, mask), **options)
    read_shapes = []
    read = prefill.read
    monkeypatch.setattr(prefill, "read", lambda m, x, *rest: (read_shapes.append(x.shape[:2]), read(m, x, *rest))[1])
    together = written(model, (prompt[:3], ids, mask), images_B=images, **options)
    assert together.tolist() == apart.tolist()
    if kind in ("opt", "llama", "gpt2", "phi"):
        assert read_shapes == [(3, 3), (6, 7)]  # three images of three soft prompts, then the texts alone
    empty = torch.zeros(6, 0, dtype=torch.int64)
    without_text = written(model, (prompt[:3], empty, empty), images_B=images, **options)
    assert without_text.tolist() == written(model, (prompt[images], empty, empty), **options).tolist()


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("beams", [1, 4])
def test_a_row_is_read_once_and_leaves_when_it_is_done(kind: str, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    data = inputs(model, rows=8)
    rows: list[int] = []
    step = Continuation.step
    monkeypatch.setattr(Continuation, "step", lambda self, tokens: (rows.append(len(tokens)), step(self, tokens))[1])
    heads: list[int] = []
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: heads.append(args[0].shape[:-1].numel()))
    ends = list(range(2, 60))
    out = written(model, data, beams=beams, end_id=ends, length_penalty=-1.0)
    assert heads == [8, *rows]  # the last position alone
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 1
    if beams == 1:
        ended_at = lengths(out, ends)
        assert rows == [sum(n > step for n in ended_at) for step in range(1, max(ended_at))]


def test_beams_move_only_what_is_new() -> None:
    """`WideLayer` against the layer of transformers it stands for, through reordering and leaving."""
    from transformers.cache_utils import DynamicCache

    torch.manual_seed(0)
    read = [torch.randn(2, 3, 4, 5) for _ in range(2)]
    ours, theirs = DynamicCache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*(x.clone() for x in read), 0)
    continuation = Continuation(None, torch.zeros(2, V), ours, None, torch.tensor([4, 4]))
    parents = torch.tensor([0, 0, 0, 1, 1, 1])
    continuation.widen(parents, 3)
    theirs.batch_select_indices(parents)
    start = ours.layers[0].buffers[0].data_ptr()
    for index in ([1, 1, 0, 5, 3, 3], [0, 2, 2, 4, 4, 5]):
        new = [torch.randn(6, 3, 1, 5) for _ in range(2)]
        for got, expected in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(got, expected)
        continuation.reorder(torch.tensor(index))
        theirs.reorder_cache(torch.tensor(index))
        assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
        assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.layers[0].buffers[0].data_ptr() == start
    left = torch.tensor([4, 3, 5])
    continuation.select(left)
    theirs.batch_select_indices(left)
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    assert len(ours.layers[0].keys) == 3


def test_transformers_writes_where_a_model_has_rules_of_its_own() -> None:
    model = build("bart")
    data = inputs(model)
    free, _ = both(model, data, beams=3)
    model.model.generation_config.forced_bos_token_id = 50
    assert not prefill.is_supported(model.model)
    ours, theirs = both(model, data, beams=3)
    assert ours.tolist() == theirs.tolist() != free.tolist()
    assert set(ours[:, 0].tolist()) == {50}


def test_transformers_writes_where_the_cache_cannot_widen() -> None:
    config = RecurrentGemmaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=16,
        lru_width=32,
        attention_window_size=16,
    )
    model = build("recurrent", config)
    prompt, _, _ = inputs(model)
    empty = torch.zeros(5, 0, dtype=torch.int64)
    ours, theirs = both(model, (prompt, empty, empty), beams=1)
    assert ours.tolist() == theirs.tolist()


def test_a_sample_does_not_depend_on_who_has_left() -> None:
    scores = torch.randn(6, V)
    torch.manual_seed(3)
    all_rows = generation._draw(scores, torch.arange(6), 6)
    torch.manual_seed(3)
    left = generation._draw(scores[[1, 4]], torch.tensor([1, 4]), 6)
    assert left.tolist() == all_rows[[1, 4]].tolist()


def test_log_probabilities_a_few_rows_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * 9
    monkeypatch.setattr(generation, "_CACHED", 3 * 40)
    torch.testing.assert_close(generation._log_softmax(logits.clone()), logits.log_softmax(dim=-1), rtol=0, atol=0)
