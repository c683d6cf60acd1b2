"""Frozen models by name: the embedded ones, and the paper's.

Each knows its transformers config in code, so that a run can be estimated without a hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2.models import bundled_towers


@dataclass(frozen=True)
class Tower:
    """A named model.

    Args:
        kind: `vision`, `bert` or `language`.
        source: hub id, or function that returns the folder of an embedded model.
        config: builds its transformers config, offline.
        overrides: settings that BLIP-2 changes in the published config.
    """

    kind: str
    source: str | Callable[[], Path]
    config: Callable[[], Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)


def folder(name: str) -> str:
    """What `from_pretrained` takes for a tower's name; any other name (folder, hub id) unchanged.

    An embedded model is converted into the cache folder on first use.

    Raises:
        CheckpointError: an embedded model is not installed.
    """
    tower = TOWERS.get(name)
    if tower is None:
        return name
    return tower.source if isinstance(tower.source, str) else str(tower.source())


def overrides(name: str) -> dict[str, Any]:
    """Settings that BLIP-2 changes in a tower's published config; empty for any other name."""
    return dict(TOWERS[name].overrides) if name in TOWERS else {}


def _dinov2_s() -> Any:
    from transformers import Dinov2Config

    return Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)


def _clip_vit_l() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )


def _eva_vit_g() -> Any:
    from transformers import Blip2VisionConfig

    return Blip2VisionConfig()


def _minilm_l6() -> Any:
    from transformers import BertConfig

    return BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def _bert_base() -> Any:
    from transformers import BertConfig

    return BertConfig()


def _smollm2_135m() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )


def _opt(width: int, layers: int) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import OPTConfig

        return OPTConfig(
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=32,
            vocab_size=50272,
        )

    return build


def _flan_t5(width: int, inner: int, heads: int) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import T5Config

        return T5Config(
            vocab_size=32128,
            d_model=width,
            d_kv=64,
            d_ff=inner,
            num_layers=24,
            num_decoder_layers=24,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            **_EXACT_GELU,
        )

    return build


# LAVIS runs FlanT5 with the exact GELU, and its checkpoints were trained so.
_EXACT_GELU = {"dense_act_fn": "gelu"}

TOWERS: dict[str, Tower] = {
    "dinov2-s": Tower("vision", bundled_towers.dinov2_folder, _dinov2_s),
    "vitl": Tower("vision", "openai/clip-vit-large-patch14", _clip_vit_l),
    "vitg": Tower("vision", "Salesforce/blip2-opt-2.7b", _eva_vit_g),
    "minilm-l6": Tower("bert", bundled_towers.minilm_folder, _minilm_l6),
    "bert-base": Tower("bert", "google-bert/bert-base-uncased", _bert_base),
    "smollm2-135m": Tower("language", bundled_towers.smollm2_folder, _smollm2_135m),
    "opt-2.7b": Tower("language", "facebook/opt-2.7b", _opt(2560, 32)),
    "opt-6.7b": Tower("language", "facebook/opt-6.7b", _opt(4096, 32)),
    "flan-t5-xl": Tower("language", "google/flan-t5-xl", _flan_t5(2048, 5120, 32), _EXACT_GELU),
    "flan-t5-xxl": Tower("language", "google/flan-t5-xxl", _flan_t5(4096, 10240, 64), _EXACT_GELU),
}
