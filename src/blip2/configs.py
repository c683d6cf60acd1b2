"""Every configuration of a run, as plain dataclasses that check themselves when created.

Standard library only, so that a recipe can be listed without importing torch. A whole run is one
`RunConfig`; recipes (`blip2.recipes`) return one, the command line overrides its fields by dotted
name (`--optim.lr 2e-4`), and the resolved one is written to `config.yaml` in the run folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from blip2.errors import ConfigError
from blip2.plain import from_dict as from_dict
from blip2.plain import to_dict as to_dict

# Words of BERT's own; a Q-Former's vocabulary of any other size ends in [DEC], the start of captions.
BERT_WORDS = 30_522
STAGES = ("stage1", "stage2")
PRECISIONS = ("auto", "fp32", "bf16")
PARALLEL = ("ddp", "fsdp2")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "sgd")
RESIZES = ("squash", "crop")
BRIDGES = ("qformer", "linear")
TEXT_POOLS = ("cls", "mean")
TEXTS = ("captions", "questions", "both")
# Dev numbers that can choose a run's best checkpoint.
BEST = ("loss", "cider", "accuracy", "recall")
QUANTIZE = ("int8", "nf4")


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}: it must be {allowed}")


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder, frozen in pretraining.

    Args:
        name: `dinov2-s` (embedded), `vitl`, `vitg` (the paper's), a folder, or a hub id.
        layer: block whose output is used, counted as in a Python list (-2: second-last, as the
            paper does for CLIP and ViT-g); None takes the model's own final, normalised output.
        pool: average-pool the patch grid by this factor on each side ([CLS] is kept).
        image_size: side of the square input in pixels; None takes the model's own.
        norm_eps: eps of `ln_vision`, the trained norm behind the encoder: 1e-5 in LAVIS, the
            encoder's own 1e-6 in transformers.
        resize: `squash` scales both sides (as LAVIS and transformers do for BLIP-2), `crop` scales
            the shorter side and takes the centre.
        train: train it too, as the paper's fine-tuning does (`optim.layer_decay` by depth).
        token_drop: share of the patches that a training step hides from the Q-Former, others for every
            image (as arXiv 2212.00794 does inside an encoder): augmentation that cached features can
            have too. 0 hides none.
    """

    name: str = "dinov2-s"
    layer: int | None = None
    pool: int = 1
    image_size: int | None = 224
    resize: str = "squash"
    norm_eps: float = 1e-5
    train: bool = False
    token_drop: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.token_drop < 1, "vision.token_drop", self.token_drop, "in [0, 1)")
        _require(bool(self.name), "vision.name", self.name, "a model name or folder")
        _require(self.pool >= 1, "vision.pool", self.pool, "1 or more")
        _require(self.image_size is None or self.image_size >= 16, "vision.image_size", self.image_size, "at least 16")
        _require(self.resize in RESIZES, "vision.resize", self.resize, f"one of {', '.join(RESIZES)}")
        _require(self.norm_eps > 0, "vision.norm_eps", self.norm_eps, "positive")


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
        text_pool: what of a text ITC compares: `cls`, the output at its first token (the paper), or the
            `mean` over its tokens, which sentence encoders such as MiniLM were trained for.
        lock_text: stage 1: do not train what text alone goes through (LiT, arXiv 2111.07991), so that
            little data cannot spoil a good text encoder; the self-attention is shared with the queries.
        question: stage 2: questions enter the Q-Former beside the queries (section 4.3), through the
            text branch of stage 1; without, the language model alone reads them.
        bridge: `qformer`, or `linear`: no Q-Former, but one linear layer on image tokens averaged
            down to a square of `queries` (the baseline of `blip2 ablate`; stage 2 only).
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
    question: bool = False
    bridge: str = "qformer"

    def __post_init__(self) -> None:
        _require(bool(self.init), "qformer.init", self.init, "a BERT-type checkpoint name or folder")
        _require(self.text_pool in TEXT_POOLS, "qformer.text_pool", self.text_pool, f"one of {', '.join(TEXT_POOLS)}")
        _require(self.bridge in BRIDGES, "qformer.bridge", self.bridge, f"one of {', '.join(BRIDGES)}")
        if self.bridge == "linear":
            _require(not self.question, "qformer.question", self.question, "false with qformer.bridge linear")
            square = math.isqrt(self.queries) ** 2 == self.queries
            _require(square, "qformer.queries", self.queries, "a square (16, 25, ...) with qformer.bridge linear")
        for name in ("queries", "cross_every", "embed_dim"):
            _require(getattr(self, name) >= 1, f"qformer.{name}", getattr(self, name), "1 or more")
        for name in ("dropout", "attention_dropout"):
            _require(0 <= getattr(self, name) < 1, f"qformer.{name}", getattr(self, name), "in [0, 1)")
        _require(self.max_text >= 4, "qformer.max_text", self.max_text, "4 or more")


@dataclass(frozen=True)
class LanguageConfig:
    """The frozen language model of stage 2.

    Args:
        name: `smollm2-135m` (embedded), `opt-2.7b`, `opt-6.7b`, `flan-t5-xl`, `flan-t5-xxl`, a
            folder, or a hub id; decoder-only or encoder-decoder.
        prompt: text between the soft prompts and the caption, part of the input, never of the loss.
        question: template of a question; `{}` is replaced.
        end: text that ends a caption; None takes the model's own end token ("\\n" for OPT).
        max_text: longest caption in tokens, end token included.
        quantize: keep the weights of its linear layers in `int8` (a byte each) or `nf4` (4.5 bits);
            None keeps them in bf16 or fp32.
    """

    name: str = "smollm2-135m"
    prompt: str = "a photo of"
    question: str = "Question: {} Answer:"
    end: str | None = None
    max_text: int = 32
    quantize: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name), "language.name", self.name, "a model name or folder")
        _require("{}" in self.question, "language.question", self.question, "a template with {}")
        _require(self.max_text >= 2, "language.max_text", self.max_text, "2 or more")
        kinds = (None, *QUANTIZE)
        _require(self.quantize in kinds, "language.quantize", self.quantize, f"one of {', '.join(QUANTIZE)}, or null")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (arXiv 2106.09685) on the frozen language model of stage 2.

    Args:
        rank: of the two matrices beside each adapted layer; 0 adds none.
        alpha: their product counts alpha / rank.
        dropout: on the input of the adapters, while training.
        targets: names of the adapted layers, separated by commas (`q_proj,v_proj`), or `all-linear`;
            None takes the attention projections that peft names for the type of language model (all
            linear layers where it names none).
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | None = None

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "positive")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        given = self.targets is None or all(name.strip() for name in self.targets.split(","))
        _require(given, "lora.targets", self.targets, "names of layers, separated by commas, or all-linear")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how.

    Args:
        train, dev: a named set (`flickr8k:train`), tar shards (path, glob or brace range), a folder
            of images with sidecar texts, or a JSONL file; or a weighted mixture (`a.tar*2+b.tar`).
        limit, dev_limit: use only the first N usable images (of each part of a mixture); None uses all.
        texts: what is learned: `captions`, `questions` with their answers, or `both`, every fifth a
            question (stage 2). One of an image's is drawn at each step, and of a question's answers one,
            as often as people gave it. Of an image without questions `both` asks what its captions
            agree on (`blip2.data.asking`).
        texts_per_image: draw so many of an image's texts at each step instead (stage 2). Encoder,
            Q-Former and soft prompts are computed once for all of them.
        clean: captions as LAVIS cleans them, here and in use: lower case, without marks but the comma.
        shots: stage 2: pairs go to the language model in sequences of `shots` + 1, image, text, image,
            text, ..., so that it learns to read examples; 0 gives it one pair at a time.
        augment: random resized crop and horizontal flip (needs the images: with a feature cache
            it takes effect through `cache_views`).
        crop_min: smallest share of the image's area that a random crop keeps.
        cache_features: encode every image once and keep the features on disk (memory-mapped).
        cache_views: views per image in the cache; view 0 is plain, further ones are augmented.
        workers: loader processes; None picks 0 with a feature cache, else the cores but one.
    """

    train: str = "flickr8k:train"
    dev: str | None = "flickr8k:dev"
    limit: int | None = None
    dev_limit: int | None = None
    texts: str = "captions"
    texts_per_image: int = 1
    clean: bool = False
    shots: int = 0
    augment: bool = True
    crop_min: float = 0.5
    cache_features: bool = False
    cache_views: int = 1
    workers: int | None = None

    def __post_init__(self) -> None:
        _require(bool(self.train), "data.train", self.train, "a data set")
        for name in ("limit", "dev_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"data.{name}", value, "1 or more")
        _require(self.texts in TEXTS, "data.texts", self.texts, f"one of {', '.join(TEXTS)}")
        _require(self.texts_per_image >= 1, "data.texts_per_image", self.texts_per_image, "1 or more")
        _require(self.shots >= 0, "data.shots", self.shots, "0 or more")
        _require(0 < self.crop_min <= 1, "data.crop_min", self.crop_min, "in (0, 1]")
        _require(self.cache_views >= 1, "data.cache_views", self.cache_views, "1 or more")
        _require(self.workers is None or self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass(frozen=True)
class LossConfig:
    """Weights and details of the objectives (section 3.2: all three weigh the same).

    Args:
        itc, itm, itg: weights of the stage-1 losses; 0 leaves one out.
        temperature: start of the learned ITC temperature, which divides.
        itc_smoothing, itg_smoothing: label smoothing.
        itm_hardness: negatives are drawn in proportion to softmax(hardness x similarity); 1 is the
            paper's, 0 draws them evenly.
        itm_ramp: steps over which the hardness rises from 0: against hard negatives from the start
            ITM learns nothing for hundreds of steps.
        itc_one_sided: give the gathered side of ITC no gradient, as LAVIS does; False is the
            gradient of the stated loss.
    """

    itc: float = 1.0
    itm: float = 1.0
    itg: float = 1.0
    temperature: float = 0.07
    itc_smoothing: float = 0.1
    itg_smoothing: float = 0.1
    itm_hardness: float = 1.0
    itm_ramp: int = 0
    itc_one_sided: bool = False

    def __post_init__(self) -> None:
        for name in ("itc", "itm", "itg"):
            _require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "0 or more")
        for name in ("itm_hardness", "itm_ramp"):
            _require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "0 or more")
        _require(self.itc + self.itm + self.itg > 0, "loss.itc + itm + itg", 0, "positive")
        _require(self.temperature > 0, "loss.temperature", self.temperature, "positive")
        for name in ("itc_smoothing", "itg_smoothing"):
            _require(0 <= getattr(self, name) < 1, f"loss.{name}", getattr(self, name), "in [0, 1)")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, with linear warm-up and a cosine down to `min_lr`; no decay on 1-D tensors.

    Args:
        name: `adamw` (8 bytes of state a parameter), `adamw8bit` (2, needs torchao), `sgd` (4; the
            first of `betas` is its momentum), or `adafactor` (next to nothing; learning rates are
            relative to the size of a tensor's weights).
        lr, min_lr, warmup_lr: peak, final and first learning rate.
        qformer_scale: of the learning rate of the Q-Former, relative to that of what else trains
            (stage 2: the projection).
        layer_decay: of an image encoder that trains: every block below its last has this times the
            learning rate of the block above it (1 treats all alike).
        warmup: steps of linear warm-up.
        betas, weight_decay: of AdamW; the latter of all.
        clip: largest global gradient norm; None does not clip.
    """

    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup: int = 2000
    qformer_scale: float = 1.0
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float | None = 1.0
    name: str = "adamw"

    def __post_init__(self) -> None:
        _require(self.name in OPTIMIZERS, "optim.name", self.name, f"one of {', '.join(OPTIMIZERS)}")
        _require(self.lr > 0, "optim.lr", self.lr, "positive")
        _require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"between 0 and optim.lr ({self.lr})")
        _require(0 <= self.warmup_lr <= self.lr, "optim.warmup_lr", self.warmup_lr, "between 0 and optim.lr")
        _require(self.qformer_scale >= 0, "optim.qformer_scale", self.qformer_scale, "0 or more")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in (0, 1]")
        _require(self.warmup >= 0, "optim.warmup", self.warmup, "0 or more")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(self.clip is None or self.clip > 0, "optim.clip", self.clip, "positive")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps of the whole run.
        batch: images per optimizer step, over all processes, each with one text
            (`data.texts_per_image`: more).
        accumulate: micro-batches a step is split into; ITC and ITM see one micro-batch at a time.
        precision: `auto` is bf16 autocast where the hardware multiplies it fast (CUDA, CPUs with
            AVX512-BF16 or AMX), else fp32. Weights and optimizer state stay fp32.
        parallel: `ddp` or `fsdp2`, under `torchrun`.
        eval_every, save_every, keep: steps between evaluations and checkpoints; checkpoints kept.
        seed: of initialisation, data order, dropout and negative sampling.
        device: `auto`, `cpu`, `cuda`.
        checkpoint: compute the activations of Q-Former layers and language-model blocks again in the
            backward pass instead of keeping them.
        head_chunk: rows of logits of the output head (ITG, language model) held at a time, each chunk
            computed again in the backward pass; None holds all.
        compile: run Q-Former layers, language-model blocks and the blocks of a frozen image encoder
            compiled; needs a C++ compiler. Texts are padded to one of a few lengths.
    """

    steps: int = 1000
    batch: int = 64
    accumulate: int = 1
    precision: str = "auto"
    parallel: str = "ddp"
    eval_every: int = 100
    save_every: int = 100
    keep: int = 2
    seed: int = 0
    device: str = "auto"
    checkpoint: bool = False
    head_chunk: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        _require(self.head_chunk is None or self.head_chunk >= 1, "train.head_chunk", self.head_chunk, "1 or more")
        for name in ("steps", "batch", "accumulate", "eval_every", "save_every", "keep"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        _require(
            self.batch % self.accumulate == 0, "train.batch", self.batch, f"a multiple of accumulate={self.accumulate}"
        )
        _require(self.seed >= 0, "train.seed", self.seed, "0 or more")
        _require(self.precision in PRECISIONS, "train.precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        _require(self.parallel in PARALLEL, "train.parallel", self.parallel, f"one of {', '.join(PARALLEL)}")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured while training.

    Args:
        images: dev images used for dev loss and recall.
        samples: dev images captioned at every evaluation (the same ones each time).
        beams, min_tokens, max_tokens: how captions are decoded (beams: stage 2 only).
        best: number that is measured at every evaluation and chooses the checkpoint that is kept as
            the run's best, which is then what loads: `loss`, `cider` (captions of all dev images),
            `accuracy` (answers to a question on each), or `recall` (mean R@1 of both directions,
            re-ranked by ITM); None keeps none, and the newest loads.
    """

    images: int = 250
    samples: int = 8
    beams: int = 1
    min_tokens: int = 5
    max_tokens: int = 24
    best: str | None = None

    def __post_init__(self) -> None:
        for name in ("images", "samples"):
            _require(getattr(self, name) >= 0, f"eval.{name}", getattr(self, name), "0 or more")
        _require(self.best in (None, *BEST), "eval.best", self.best, f"one of {', '.join(BEST)}, or null")
        _require(self.beams >= 1, "eval.beams", self.beams, "1 or more")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "eval.min_tokens",
            self.min_tokens,
            "between 0 and eval.max_tokens",
        )


@dataclass(frozen=True)
class DecodingConfig:
    """How text is generated. Defaults are the paper's for captions (appendix, table 8).

    Args:
        beams: width of the beam search; 1 is greedy.
        num: texts returned per image, at most `beams` unless sampling.
        min_tokens, max_tokens: bounds on new tokens.
        length_penalty: exponent of the length a beam's score is divided by.
        repetition_penalty: above 1 makes tokens already written less likely.
        sample: nucleus sampling instead of beam search.
        top_p, temperature: of the sampling.
        rerank: captions: write so many, and return the `num` of them whose ITC similarity with the image
            is highest (needs stage 1); 0 returns what is likeliest.
    """

    beams: int = 5
    num: int = 1
    min_tokens: int = 8
    max_tokens: int = 30
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    sample: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    rerank: int = 0

    def __post_init__(self) -> None:
        for name in ("beams", "num", "max_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens")
        _require(self.sample or self.num <= self.beams, "num", self.num, f"at most beams ({self.beams})")
        _require(self.rerank == 0 or self.rerank >= self.num, "rerank", self.rerank, f"0, or num ({self.num}) or more")
        _require(self.temperature > 0, "temperature", self.temperature, "positive")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Args:
        recipe: name of the recipe it began as.
        stage: `stage1` (representation learning) or `stage2` (generative learning).
        out: run folder; None picks `runs/<recipe>` with `/` replaced by `-`.
        init: run folder or weights file that this run starts from (stage 2: a stage-1 run).
        init_text: stage-1 checkpoint that the text branch comes from (`qformer.question`); None takes
            the stage 1 that `init` began from.
    """

    recipe: str = "custom"
    stage: str = "stage1"
    out: str | None = None
    init: str | None = None
    init_text: str | None = None
    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _require(self.stage in STAGES, "stage", self.stage, f"one of {', '.join(STAGES)}")
        self._check_towers()
        self._check_texts()

    def _check_towers(self) -> None:
        quantize, sharded = self.language.quantize, self.train.parallel == "fsdp2"
        if self.stage == "stage1":
            _require(self.lora.rank == 0, "lora.rank", self.lora.rank, "0 in stage 1, which has no language model")
            _require(quantize is None, "language.quantize", quantize, "null in stage 1, which has no language model")
        _require(not (sharded and quantize), "language.quantize", quantize, "null with train.parallel fsdp2; use ddp")
        whole = self.optim.name in ("adamw", "sgd")
        _require(whole or not sharded, "optim.name", self.optim.name, "adamw or sgd with train.parallel fsdp2")
        _require(not (sharded and self.train.compile), "train.compile", True, "false with train.parallel fsdp2")
        linear = self.qformer.bridge == "linear" and self.vision.token_drop
        _require(
            not linear, "vision.token_drop", self.vision.token_drop, "0 with qformer.bridge linear, which averages all"
        )
        cached = self.vision.train and self.data.cache_features
        _require(not cached, "data.cache_features", True, "false with vision.train: features change as it trains")

    def _check_texts(self) -> None:
        texts, settings, best = self.data.texts, self.qformer, self.eval.best
        asks = texts == "questions"
        self._check_shots()
        if self.stage == "stage1":
            _require(texts == "captions", "data.texts", texts, "captions in stage 1")
            _require(self.data.texts_per_image == 1, "data.texts_per_image", self.data.texts_per_image, "1 in stage 1")
            _require(not settings.question, "qformer.question", True, "false in stage 1")
            _require(settings.bridge == "qformer", "qformer.bridge", settings.bridge, "qformer in stage 1")
        _require(asks or not settings.question, "qformer.question", True, "false unless data.texts is questions")
        used = self.init is not None and settings.question
        _require(self.init_text is None or used, "init_text", self.init_text, "null without init and qformer.question")
        possible = {"stage1": ("loss", "recall"), "stage2": ("loss", "accuracy" if asks else "cider")}[self.stage]
        _require(best in (None, *possible), "eval.best", best, f"one of {', '.join(possible)} here, or null")

    def _check_shots(self) -> None:
        shots, train = self.data.shots, self.train
        _require(shots == 0 or self.stage == "stage2", "data.shots", shots, "0 in stage 1, which has no language model")
        _require(
            shots == 0 or self.data.texts_per_image == 1,
            "data.texts_per_image",
            self.data.texts_per_image,
            "1 with data.shots",
        )
        whole = train.batch % (train.accumulate * (shots + 1)) == 0
        _require(whole, "train.batch", train.batch, f"a multiple of train.accumulate x (data.shots + 1 = {shots + 1})")
