"""Tiny random BLIP-2 models of transformers, saved as the folders that people download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SENTENCES = ["a photo of a dog on the grass", "two cats sleep on a red sofa", "Question: what is it? Answer: a bird\n"]
WIDTH, PATCHES = 32, 4 * 4 + 1


def language_tokenizer(folder: Path, *, front: bool) -> int:
    """A byte-level BPE with `</s>` in front (OPT) or behind (T5); returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    template = "</s> $A" if front else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 2)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return len(fast)


def bert_tokenizer(folder: Path) -> int:
    """A word-level tokenizer with BERT's special tokens and [DEC] as its last word; returns its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for sentence in SENTENCES for word in sentence.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "[DEC]"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[DEC]", **marks)
    fast.save_pretrained(folder)
    return len(fast)


def config(text: Any, words: int, **options: Any) -> Any:
    """A BLIP-2 config of two layers everywhere, with the shapes of a real one."""
    from transformers import Blip2Config

    return Blip2Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "initializer_range": 0.2,
        },
        qformer_config={
            "vocab_size": words,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "encoder_hidden_size": WIDTH,
            "max_position_embeddings": 40,
            "initializer_range": 0.2,
            **options.pop("qformer", {}),
        },
        text_config=text.to_dict(),
        num_query_tokens=5,
        image_text_hidden_size=16,
        **options,
    )


def shake(model: torch.nn.Module) -> None:
    """Random values everywhere: transformers starts queries, biases and positions at zero, norms at one."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale, shift = (0.2, 1.0) if "norm" in name.lower() and name.endswith("weight") else (0.2, 0.0)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + shift)


def opt_config(words: int) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=words + 8,
        hidden_size=20,
        word_embed_proj_dim=20,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
    )


def t5_config(words: int) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=words + 8,
        d_model=20,
        d_kv=5,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def blip_or_clip(kind: str, words: int) -> Any:
    """A captioner (BLIP) or a ranker (CLIP) of two layers, with [CLS] 2, [SEP] 3 and [DEC] last."""
    from transformers import BlipConfig, BlipForConditionalGeneration, CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": words, "max_position_embeddings": 40, "projection_dim": 12}
    vision = {**sizes, "image_size": 56, "patch_size": 14, "projection_dim": 12}
    if kind == "clip":
        text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    text |= {
        "bos_token_id": words - 1,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "encoder_hidden_size": 16,
    }
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=12))


def llama_config(words: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=words + 8,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )


def instruct(kind: str, folder: Path) -> Any:
    """A random InstructBLIP (`instruct-t5`, `instruct-llama`), or that for films (`video-...`), and its tokenizers."""
    import transformers

    family, text = kind.split("-")
    words = language_tokenizer(folder, front=text == "llama")
    asked = bert_tokenizer(folder / "qformer_tokenizer")
    name = "InstructBlip" if family == "instruct" else "InstructBlipVideo"
    base = config(llama_config(words) if text == "llama" else t5_config(words), asked)
    built = getattr(transformers, f"{name}Config")(
        vision_config={k: v for k, v in base.vision_config.to_dict().items() if k != "model_type"},
        qformer_config={k: v for k, v in base.qformer_config.to_dict().items() if k != "model_type"},
        text_config=base.text_config.to_dict(),
        num_query_tokens=5,
        **{"image_token_index" if family == "instruct" else "video_token_index": words},
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(built)
    if text == "t5":  # transformers ties a T5 that is not loaded
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    return model


def save(kind: str, folder: Path) -> tuple[Path, Any]:
    """A random model of a kind, in eval mode, and its folder."""
    from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, OPTConfig

    folder.mkdir(parents=True)
    model: Any
    torch.manual_seed(0)
    if kind in ("blip", "clip"):
        model = blip_or_clip(kind, bert_tokenizer(folder))
    elif kind.startswith(("instruct-", "video-")):
        model = instruct(kind, folder)
    elif kind == "itm":
        words = bert_tokenizer(folder)
        built = config(OPTConfig(), words, qformer={"use_qformer_text_input": True})
        model = Blip2ForImageTextRetrieval(built)
    else:
        words = language_tokenizer(folder, front=kind == "opt")
        text = opt_config(words) if kind == "opt" else t5_config(words)
        built = config(text, 60, image_token_index=words)
        model = Blip2ForConditionalGeneration(built)
        if kind == "t5":  # transformers ties a T5 that is not loaded
            head = model.language_model.lm_head
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    shake(model)
    model.eval().save_pretrained(folder)
    return folder, model
