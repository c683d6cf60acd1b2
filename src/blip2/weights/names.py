"""What LAVIS and transformers call our tensors, both ways, and how their shapes differ.

Each table lists (our module or tensor, theirs); a module stands for its weight and its bias. What a
format has no place for, and what it holds besides, is named here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from blip2.errors import CheckpointError
from blip2.weights.lazy_tensors import Tensors

# Ours that transformers has no place for: they travel in a file of our own beside its weights.
HF_WITHOUT = ("temp", "qformer.head.")
# transformers' tensors that are not trained: those of the frozen towers, and buffers of older versions.
HF_TOWERS = ("vision_model.", "language_model.")
HF_IGNORED = ("embeddings.position_ids", "qformer.embeddings.position_ids")

# LAVIS tensors that we do not read: buffers, tied copies, language-model weights that its runner lets through.
LAVIS_IGNORED = (
    "Qformer.bert.embeddings.position_ids",
    "Qformer.cls.predictions.decoder.weight",
    "Qformer.cls.predictions.decoder.bias",
    "opt_model.",
    "t5_model.",
    "llm_model.",
)
LAVIS_VISION = "visual_encoder."
LAVIS_PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")
# What only LAVIS's other models have, and whose they are.
LAVIS_OTHERS = {"unet.": "BLIP-Diffusion"}


def depth_of(names: Iterable[str]) -> int:
    """Number of Q-Former layers among tensor names of any of the formats."""
    # counted, not the highest: one stray name must not make a table of a billion layers
    return len({m[1] for name in names if (m := re.search(r"(?:qformer\.layers|encoder\.layer)\.(\d+)\.", name))})


def huggingface(depth: int, *, instruct: bool = False) -> dict[str, str]:
    """Our tensor names to those of `Blip2ForConditionalGeneration` and `Blip2ForImageTextRetrieval`.

    Args:
        instruct: of `InstructBlipForConditionalGeneration` and its variant for films instead.
    """
    embeddings = "qformer.embeddings" if instruct else "embeddings"
    modules = [
        ("ln_vision", "vision_model.post_layernorm"),
        ("qformer.embedding_norm", "qformer.embeddings.layernorm" if instruct else "qformer.layernorm"),
        *_layers(depth, "qformer.encoder.layer", "attention"),
        ("vision_proj", "vision_projection"),
        ("text_proj", "text_projection"),
        ("itm_head", "itm_head"),
        ("language_proj", "language_projection"),
    ]
    tensors = [
        ("qformer.query_tokens", "query_tokens"),
        ("qformer.embeddings.word.weight", f"{embeddings}.word_embeddings.weight"),
        ("qformer.embeddings.position.weight", f"{embeddings}.position_embeddings.weight"),
    ]
    return dict([*tensors, *_both(modules)])


def huggingface_qformer(depth: int) -> dict[str, str]:
    """Our tensor names to those of a bare `Blip2QFormerModel`."""
    theirs_by_ours = huggingface(depth).items()
    return {ours: theirs.removeprefix("qformer.") for ours, theirs in theirs_by_ours if theirs.startswith("qformer.")}


def lavis(depth: int, projection: str = "opt_proj") -> dict[str, str]:
    """Our tensor names to those of `blip2_qformer`, `blip2_opt`, `blip2_t5` and `blip2_*_instruct` of LAVIS.

    Args:
        projection: `opt_proj`, `t5_proj` or (InstructBLIP with Vicuna) `llm_proj`.
    """
    modules = [
        ("ln_vision", "ln_vision"),
        ("qformer.embedding_norm", "Qformer.bert.embeddings.LayerNorm"),
        *_layers(depth, "Qformer.bert.encoder.layer", "self"),
        ("qformer.head.dense", "Qformer.cls.predictions.transform.dense"),
        ("qformer.head.norm", "Qformer.cls.predictions.transform.LayerNorm"),
        ("vision_proj", "vision_proj"),
        ("text_proj", "text_proj"),
        ("itm_head", "itm_head"),
        ("language_proj", projection),
    ]
    tensors = [
        ("qformer.query_tokens", "query_tokens"),
        ("temp", "temp"),
        ("qformer.embeddings.word.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
        ("qformer.embeddings.position.weight", "Qformer.bert.embeddings.position_embeddings.weight"),
        ("qformer.head.bias", "Qformer.cls.predictions.bias"),
    ]
    return dict([*tensors, *_both(modules)])


def eva(depth: int) -> dict[str, str]:
    """Tensor names of `Blip2VisionModel` to those of LAVIS's EVA ViT-g, but for the bias of q, k, v.

    transformers keeps one bias cat(q, 0, v); EVA keeps `q_bias` and `v_bias` and has none for k.
    """
    modules = [("embeddings.patch_embedding", "visual_encoder.patch_embed.proj")]
    for n in range(depth):
        ours, theirs = f"encoder.layers.{n}", f"visual_encoder.blocks.{n}"
        modules += [
            (f"{ours}.layer_norm1", f"{theirs}.norm1"),
            (f"{ours}.self_attn.projection", f"{theirs}.attn.proj"),
            (f"{ours}.layer_norm2", f"{theirs}.norm2"),
            (f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
            (f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
        ]
    tensors = [
        ("embeddings.class_embedding", "visual_encoder.cls_token"),
        ("embeddings.position_embedding", "visual_encoder.pos_embed"),
        *(
            (f"encoder.layers.{n}.self_attn.qkv.weight", f"visual_encoder.blocks.{n}.attn.qkv.weight")
            for n in range(depth)
        ),
    ]
    return dict([*tensors, *_both(modules)])


def listed(name: str, entries: Iterable[str]) -> bool:
    """Whether a list names this tensor, or (with a dot at the end) the part it is of."""
    return any(name.startswith(entry) if entry.endswith(".") else name == entry for entry in entries)


def renamed(theirs: Tensors, theirs_by_ours: Mapping[str, str], ignored: tuple[str, ...], source: str) -> Tensors:
    """Their tensors under our names.

    Args:
        theirs_by_ours: our names to theirs.
        ignored: names, and parts with a dot at the end, that are left out.
        source: file or folder, for messages.

    Raises:
        CheckpointError: a tensor is neither in the table nor ignored.
    """
    ours_by_theirs = {their: ours for ours, their in theirs_by_ours.items()}
    unknown = [name for name in theirs if name not in ours_by_theirs and not listed(name, ignored)]
    if unknown:
        raise CheckpointError(f"{source}: {unknown[0]} is no tensor of BLIP-2 ({len(unknown)} such)")
    return {ours_by_theirs[name]: lazy for name, lazy in theirs.items() if name in ours_by_theirs}


def without_batch_axis(tensors: Tensors) -> Tensors:
    """Query tokens as [Q, D]: both formats keep [1, Q, D]."""
    queries = tensors.get("qformer.query_tokens")
    if queries is not None and len(queries.shape) == 3:
        tensors["qformer.query_tokens"] = queries.reshaped(*queries.shape[1:])
    return tensors


def _layers(depth: int, theirs: str, inner: str) -> list[tuple[str, str]]:
    """Modules of the Q-Former's layers; `inner` is what holds q, k and v inside an attention."""
    pairs = []
    for n in range(depth):
        for our_attention, their_attention in (("self_attention", "attention"), ("cross_attention", "crossattention")):
            ours, other = f"qformer.layers.{n}.{our_attention}", f"{theirs}.{n}.{their_attention}"
            pairs += [(f"{ours}.{part}", f"{other}.{inner}.{part}") for part in ("query", "key", "value")]
            pairs += [(f"{ours}.output", f"{other}.output.dense"), (f"{ours}.norm", f"{other}.output.LayerNorm")]
        for our_ff, suffix in (("query_ff", "_query"), ("text_ff", "")):
            ours, other = f"qformer.layers.{n}.{our_ff}", f"{theirs}.{n}"
            pairs += [
                (f"{ours}.up", f"{other}.intermediate{suffix}.dense"),
                (f"{ours}.down", f"{other}.output{suffix}.dense"),
                (f"{ours}.norm", f"{other}.output{suffix}.LayerNorm"),
            ]
    return pairs


def _both(modules: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in modules for kind in ("weight", "bias")]
