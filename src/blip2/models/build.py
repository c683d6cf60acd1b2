"""From a run's configuration to its model: towers loaded and frozen, Q-Former initialised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip2.configs import BERT_WORDS, QFormerConfig, RunConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.models import towers
from blip2.models.language.lora import add_lora
from blip2.models.language.model import LanguageModel, load_language_model
from blip2.models.qformer.bert_init import load_bert, text_tensors
from blip2.models.qformer.lora import add_qformer_lora
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import LinearBridge, Stage2
from blip2.models.vision.encoder import VisionEncoder, load_vision_encoder

# [DEC] is appended to the vocabulary of the BERT-type checkpoint.
EXTRA_TOKENS = 1
_QFORMERS = ("blip_2_qformer", "instructblip_qformer", "instructblipvideo_qformer")


def build_qformer(config: QFormerConfig, image_width: int, bert: Any, *, text: bool, head: bool = True) -> QFormer:
    """A freshly initialised Q-Former whose sizes follow a transformers BERT config.

    Args:
        text: with its text branch.
        head: and the prediction head of it.

    Raises:
        ConfigError: its heads do not divide its width.
    """
    width, heads = bert.hidden_size, bert.num_attention_heads
    if width % heads:
        raise ConfigError(f"qformer.init is {config.init!r}: {width} wide, which {heads} heads do not divide")
    return QFormer(
        width=width,
        depth=bert.num_hidden_layers,
        heads=heads,
        inner=bert.intermediate_size,
        positions=bert.max_position_embeddings,
        eps=bert.layer_norm_eps,
        image_width=image_width,
        queries=config.queries,
        cross_every=config.cross_every,
        vocab=bert.vocab_size + EXTRA_TOKENS if text else None,
        head=head,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        text_pool=config.text_pool,
    )


def load_qformer(
    config: QFormerConfig, image_width: int, *, text: bool, head: bool = True, start: bool = True
) -> QFormer:
    """A Q-Former of the sizes of the BERT-type checkpoint `config.init`, by default started from it."""
    bert = bert_config(config.init, weights=start)
    qformer = build_qformer(config, image_width, bert, text=text, head=head)
    if start:
        load_bert(qformer, _bert_state(config.init), config.init)
    return qformer


def build_stage1(config: RunConfig, vision: VisionEncoder | None = None, *, start: bool = True) -> Stage1:
    """Stage-1 model of a run.

    Args:
        vision: a loaded image encoder; None loads the one that the configuration names.
        start: start the Q-Former from BERT; False where a checkpoint is loaded next.
    """
    vision = vision or image_encoder(config)
    qformer = load_qformer(config.qformer, vision.width, text=True, start=start)
    if config.qformer.lock_text:
        qformer.lock_text()
    return Stage1(
        qformer,
        vision,
        embed_dim=config.qformer.embed_dim,
        temperature=config.loss.temperature,
        norm_eps=config.vision.norm_eps,
    )


def build_stage2(
    config: RunConfig,
    vision: VisionEncoder | None = None,
    language_model: LanguageModel | None = None,
    *,
    start: bool = True,
    device: torch.device | str = "cpu",
) -> Stage2:
    """Stage-2 model of a run, with its adapters; arguments as for `build_stage1`.

    Args:
        language_model: a loaded one without adapters; None loads the one that the configuration names.
        device: where the model will run; the caller moves it there.
    """
    vision = vision or image_encoder(config)
    qformer: QFormer | LinearBridge = LinearBridge(vision.width, config.qformer.queries)
    if config.qformer.bridge == "qformer":
        text = config.qformer.instruction is not None
        qformer = load_qformer(config.qformer, vision.width, text=text, head=False, start=start)
    language_model = language_model or load_language_model(config.language, device=device)
    model = Stage2(qformer, language_model, vision, norm_eps=config.vision.norm_eps, places=config.qformer.image_places)
    if config.lora.rank:
        add_lora(language_model, config.lora)
    if config.lora.qformer_rank and isinstance(qformer, QFormer):
        add_qformer_lora(qformer, config.lora.qformer_rank, config.lora.alpha)
    return model


def image_encoder(config: RunConfig) -> VisionEncoder:
    """The image encoder that a run names, frozen unless the run trains it."""
    vision = load_vision_encoder(config.vision)
    if config.vision.train:
        vision.unfreeze()
    return vision


def build(config: RunConfig, *, start: bool = True, device: torch.device | str = "cpu") -> Stage1 | Stage2:
    """The model of a run's stage; initialisation is seeded by `train.seed`, arguments as above."""
    torch.manual_seed(config.train.seed)
    if config.stage == "stage1":
        return build_stage1(config, start=start)
    return build_stage2(config, start=start, device=device)


def bert_config(name: str, *, weights: bool = True) -> Any:
    """BERT config that gives a Q-Former its sizes: of a BERT-type checkpoint, or of a BLIP-2 or InstructBLIP one.

    Args:
        weights: whether its weights are needed too; without them a named model needs no hub.

    Raises:
        CheckpointError: another kind of model.
    """
    if not weights and name in towers.TOWERS:
        return towers.TOWERS[name].config()
    config, _ = towers.load_part_config(name, "qformer_config")
    if config.model_type in _QFORMERS:
        return _bert_of(config)
    if config.model_type != "bert":
        raise CheckpointError(f"{name}: a {config.model_type} checkpoint; the Q-Former starts from a BERT-type one")
    return config


def is_bert(name: str) -> bool:
    """Whether a name has BERT weights to start from; a transformers BLIP-2 checkpoint has only the sizes."""
    return name in towers.TOWERS or towers.load_config(name).model_type == "bert"


def _bert_of(qformer: Any) -> Any:
    """The BERT inside the config of a Q-Former, without [DEC]."""
    from transformers import BertConfig

    rows = qformer.vocab_size
    return BertConfig(
        vocab_size=rows if qformer.model_type == "blip_2_qformer" and rows == BERT_WORDS else rows - EXTRA_TOKENS,
        hidden_size=qformer.hidden_size,
        num_hidden_layers=qformer.num_hidden_layers,
        num_attention_heads=qformer.num_attention_heads,
        intermediate_size=qformer.intermediate_size,
        max_position_embeddings=qformer.max_position_embeddings,
        layer_norm_eps=qformer.layer_norm_eps,
    )


def bert_text(name: str) -> dict[str, Tensor]:
    """A text branch before any training, by the Q-Former's names: that of a BERT-type checkpoint, without [DEC]."""
    return text_tensors(bert_config(name).num_hidden_layers, _bert_state(name), name)


def _bert_state(name: str) -> dict[str, Tensor]:
    """Tensors of a BERT-type checkpoint, its prediction head included where it has one."""
    from transformers import BertForMaskedLM

    source = towers.folder(name)
    if not is_bert(name):
        raise CheckpointError(f"{name}: a BLIP-2 checkpoint: it gives sizes here, and its weights as --init")
    with towers.readable(source):
        model, info = BertForMaskedLM.from_pretrained(source, output_loading_info=True)
    headless = any("cls.predictions.transform" in key for key in info["missing_keys"])
    drop = "cls." if headless else "cls.predictions.decoder."
    return {k: v for k, v in model.state_dict().items() if not k.startswith(drop)}
