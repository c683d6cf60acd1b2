"""What a model consists of: image encoder, Q-Former, language model and its adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blip2.configs.checks import BELOW_ONE, POSITIVE, at_least, check, given, one_of, require

# Words of BERT's own; a Q-Former's vocabulary of any other size ends in [DEC], the start of captions.
BERT_WORDS = 30_522
QUANTIZE = ("int8", "nf4")
# transformers' models of an image encoder, a Q-Former and a language model.
BLIP2_TYPES = ("blip-2", "instructblip", "instructblipvideo")
# What of a request a Q-Former reads beside its queries.
INSTRUCTIONS = ("prompt", "question")


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder, frozen in pretraining.

    Args:
        name: `dinov2-s`, `efficientnet-lite2` (embedded), `vitl`, `vitg` (the paper's), a folder, or a hub id.
        layer: block whose output is used, counted as in a Python list (-2: second-last, as the
            paper does for CLIP and ViT-g); None takes the model's own final, normalised output.
        pool: average-pool the patch grid by this factor on each side ([CLS] is kept).
        image_size: side of the square input in pixels; None takes the model's own.
        norm_eps: eps of `ln_vision`, the trained layer norm after the encoder: 1e-5 in LAVIS, 1e-6
            (the encoder's own) in transformers.
        resize: `squash` scales both sides (as LAVIS and transformers do for BLIP-2), `crop` scales
            the shorter side and takes the centre.
        frames: images that a film is drawn as, spread evenly over it; None: 4, as in transformers' InstructBlipVideo,
            whose models set it.
        train: train the encoder as well, as the paper's fine-tuning does (`optim.layer_decay`).
        token_drop: share of the patches hidden from the Q-Former in training, drawn anew for every image
            (arXiv 2212.00794 does it inside the encoder); it augments cached features as well. 0 hides none.
    """

    name: str = "dinov2-s"
    layer: int | None = None
    pool: int = 1
    image_size: int | None = 224
    resize: str = "squash"
    norm_eps: float = 1e-5
    frames: int | None = None
    train: bool = False
    token_drop: float = 0.0

    def __post_init__(self) -> None:
        check(self, "vision.", name=given("a model name or folder"), pool=at_least(1), image_size=at_least(16))
        check(self, "vision.", frames=at_least(1))
        check(self, "vision.", resize=one_of(("squash", "crop")), norm_eps=POSITIVE, token_drop=BELOW_ONE)


@dataclass(frozen=True)
class QFormerConfig:
    """The Querying Transformer (arXiv 2301.12597, section 3.1).

    Args:
        init: BERT-type checkpoint that gives sizes, weights and tokenizer: `minilm-l6` (embedded),
            `bert-base` (the paper's), a folder, or a hub id.
        queries: number of learned query tokens.
        cross_every: cross-attention to the image in layers 0, N, 2N, ...
        embed_dim: width of the contrastive space.
        dropout: on embeddings and on every sublayer's output, while training.
        attention_dropout: on attention weights, while training.
        max_text: longest text in tokens, [CLS] and [SEP] included.
        text_pool: the text embedding of ITC: `cls`, the output at the first token (the paper), or the
            `mean` over all tokens, which sentence encoders such as MiniLM were trained with.
        lock_text: stage 1: freeze the text branch (LiT, arXiv 2111.07991), so that little data cannot
            spoil a good text encoder; its self-attention, which the queries share, stays frozen as well.
        instruction: stage 2: what the Q-Former reads beside the queries, through the text branch of stage 1: the
            `prompt`, as the language model reads it (InstructBLIP, arXiv 2305.06500), or the bare `question`
            without its template (BLIP-2's VQA, section 4.3); None: only the language model reads text.
        image_places: stage 2: learned marks for the place of an image in a sample of several, for up to so many images,
            added to its soft prompts; 0 has none.
        bridge: `qformer`, or `linear`: one linear layer on image tokens averaged down to a square of
            `queries`, without a Q-Former (the baseline of `blip2 ablate`; stage 2 only).
    """

    init: str = "minilm-l6"
    queries: int = 32
    cross_every: int = 2
    embed_dim: int = 256
    dropout: float = 0.1
    attention_dropout: float = 0.0
    max_text: int = 32
    text_pool: str = "cls"
    lock_text: bool = False
    instruction: str | None = None
    image_places: int = 0
    bridge: str = "qformer"

    def __post_init__(self) -> None:
        check(
            self,
            "qformer.",
            init=given("a BERT-type checkpoint name or folder"),
            queries=at_least(1),
            max_text=at_least(4),
            image_places=at_least(0),
        )
        check(
            self,
            "qformer.",
            cross_every=at_least(1),
            embed_dim=at_least(1),
            dropout=BELOW_ONE,
            attention_dropout=BELOW_ONE,
        )
        check(self, "qformer.", text_pool=one_of(("cls", "mean")), bridge=one_of(("qformer", "linear")))
        check(self, "qformer.", instruction=one_of(INSTRUCTIONS, null=True))
        if self.bridge == "linear":
            none = self.instruction is None
            require(none, "qformer.instruction", self.instruction, "null with qformer.bridge linear")
            square = math.isqrt(self.queries) ** 2 == self.queries
            require(square, "qformer.queries", self.queries, "a square (16, 25, ...) with qformer.bridge linear")


@dataclass(frozen=True)
class LanguageConfig:
    """The frozen language model of stage 2.

    Args:
        name: `smollm2-135m` (embedded), `opt-2.7b`, `opt-6.7b`, `flan-t5-xl`, `flan-t5-xxl`, a
            folder, or a hub id; decoder-only or encoder-decoder.
        prompt: text between the soft prompts and the caption, part of the input, never of the loss.
        question: template of a question; `{}` is replaced.
        image_mark: text in front of the soft prompts of each image in a sample of several, with its number for `{}`
            (`Image {}:`); None has none.
        start: text of the special token in front of every prompt of a decoder-only model, in place of the
            tokenizer's own (`</s>` for LAVIS's Vicuna).
        end: text that ends a caption; None takes the model's own end token ("\\n" for OPT).
        max_text: longest caption in tokens, end token included.
        quantize: keep the weights of its linear layers in `int8` (a byte each) or `nf4` (4.5 bits);
            None keeps them in bf16 or fp32.
    """

    name: str = "smollm2-135m"
    prompt: str = "a photo of"
    question: str = "Question: {} Answer:"
    image_mark: str | None = None
    start: str | None = None
    end: str | None = None
    max_text: int = 32
    quantize: str | None = None

    def __post_init__(self) -> None:
        quantize = one_of(QUANTIZE, null=True)
        check(self, "language.", name=given("a model name or folder"), max_text=at_least(2), quantize=quantize)
        require("{}" in self.question, "language.question", self.question, "a template with {}")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (arXiv 2106.09685) on the frozen language model of stage 2, and on its Q-Former.

    Args:
        rank: of the two matrices beside each adapted layer; 0 adds none.
        alpha: their product is scaled by alpha / rank.
        dropout: on the input of the adapters, while training.
        targets: names of the adapted layers, separated by commas (`q_proj,v_proj`), or `all-linear`;
            None takes the attention projections that peft names for the type of language model (all
            linear layers where it names none).
        qformer_rank: of adapters on all linear layers of the Q-Former, whose own weights are then frozen but for the
            queries; 0 trains the Q-Former itself. `dropout` and `targets` are not theirs.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | None = None
    qformer_rank: int = 0

    def __post_init__(self) -> None:
        check(self, "lora.", rank=at_least(0), qformer_rank=at_least(0), alpha=POSITIVE, dropout=BELOW_ONE)
        named = self.targets is None or all(name.strip() for name in self.targets.split(","))
        require(named, "lora.targets", self.targets, "names of layers, separated by commas, or all-linear")
