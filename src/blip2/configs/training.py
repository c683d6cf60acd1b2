"""How a run learns: data, objectives, optimizer, the loop, and what it measures of itself on the way."""

from __future__ import annotations

from dataclasses import dataclass

from blip2.configs.checks import BELOW_ONE, POSITIVE, UP_TO_ONE, at_least, check, given, one_of, require

PRECISIONS = ("auto", "fp32", "bf16")
# Dev numbers that can choose a run's best checkpoint.
BEST = ("loss", "cider", "accuracy", "recall")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how.

    Args:
        train, dev: a named set (`flickr8k:train`), tar shards (path, glob or brace range), a folder
            of images with sidecar texts, or a JSONL file; or a weighted mixture (`a.tar*2+b.tar`).
        limit, dev_limit: use only the first N usable images (of each part of a mixture); None uses all.
        texts: what is learned: `captions`, `questions` with their answers, or `both`, where one text in
            five is a question (stage 2). Each step draws one text of an image, and one of a question's
            answers, in proportion to how often people gave it. For an image without questions, `both`
            makes them from what its captions agree on (`blip2.data.question_generation`).
        texts_per_image: texts drawn of each image at each step (stage 2). Image features and soft
            prompts are computed once for all of them.
        clean: clean captions as LAVIS does, in training and in use: lower case, no punctuation but commas.
        shots: stage 2: give the language model sequences of `shots` + 1 pairs (image, text, image,
            text, ...), so that it learns to read examples; 0 gives it one pair at a time.
        augment: random resized crop and horizontal flip; with a feature cache, which holds no images,
            only through `cache_views`.
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
        texts = one_of(("captions", "questions", "both"))
        check(self, "data.", train=given("a data set"), limit=at_least(1), dev_limit=at_least(1), texts=texts)
        check(self, "data.", texts_per_image=at_least(1), shots=at_least(0), crop_min=UP_TO_ONE)
        check(self, "data.", cache_views=at_least(1), workers=at_least(0))


@dataclass(frozen=True)
class LossConfig:
    """Weights and details of the objectives (section 3.2: all three weigh the same).

    Args:
        itc, itm, itg: weights of the stage-1 losses; 0 leaves one out.
        temperature: first value of the learned temperature that ITC's similarities are divided by.
        itc_smoothing, itg_smoothing: label smoothing.
        itm_hardness: negatives are drawn in proportion to softmax(hardness x similarity); 1 is the
            paper's, 0 draws them evenly.
        itm_ramp: steps over which the hardness rises from 0 to `itm_hardness`; with hard negatives from
            the start, ITM learns nothing for hundreds of steps.
        itc_one_sided: no gradient through the gathered side of ITC, as in LAVIS; False is the
            gradient of the loss as stated.
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
        weight, smoothing = at_least(0), BELOW_ONE
        check(self, "loss.", itc=weight, itm=weight, itg=weight, itm_hardness=at_least(0), itm_ramp=at_least(0))
        check(self, "loss.", temperature=POSITIVE, itc_smoothing=smoothing, itg_smoothing=smoothing)
        require(self.itc + self.itm + self.itg > 0, "loss.itc + itm + itg", 0, "positive")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, with linear warm-up and a cosine down to `min_lr`; no decay on 1-D tensors.

    Args:
        name: `adamw` (8 bytes of state a parameter), `adamw8bit` (2, needs torchao), `sgd` (4; the
            first of `betas` is its momentum), or `adafactor` (almost none; its learning rates are
            relative to the size of a tensor's weights).
        lr, min_lr, warmup_lr: peak, final and first learning rate.
        qformer_scale: learning rate of the Q-Former as a multiple of that of the other trained parts
            (stage 2: the projection).
        layer_decay: learning rate of a block of a trained image encoder as a multiple of that of the
            block above it; 1 gives all blocks the same.
        warmup: steps of linear warm-up.
        betas, weight_decay: betas of AdamW; weight decay of every optimizer.
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
        check(self, "optim.", name=one_of(("adamw", "adamw8bit", "adafactor", "sgd")), lr=POSITIVE)
        check(
            self,
            "optim.",
            qformer_scale=at_least(0),
            layer_decay=UP_TO_ONE,
            warmup=at_least(0),
            weight_decay=at_least(0),
            clip=POSITIVE,
        )
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"between 0 and optim.lr ({self.lr})")
        require(0 <= self.warmup_lr <= self.lr, "optim.warmup_lr", self.warmup_lr, "between 0 and optim.lr")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps of the whole run.
        batch: images per optimizer step, over all processes, each with one text
            (`data.texts_per_image`: more).
        accumulate: number of micro-batches in a step; ITC and ITM see one micro-batch at a time.
        precision: `auto` is bf16 autocast where the hardware multiplies it fast (CUDA, CPUs with
            AVX512-BF16 or AMX), else fp32. Weights and optimizer state stay fp32.
        parallel: `ddp` or `fsdp2`, under `torchrun`.
        eval_every, save_every, keep: steps between evaluations and checkpoints; checkpoints kept.
        seed: of initialisation, data order, dropout and negative sampling.
        device: `auto`, `cpu`, `cuda`.
        checkpoint: recompute the activations of Q-Former layers and language-model blocks in the
            backward pass instead of keeping them.
        head_chunk: rows of logits of the output head (ITG, language model) held at a time, each chunk
            recomputed in the backward pass; None holds all.
        early_backward: run the backward pass of a part of the loss as soon as the part is known, so that a step
            holds the activations of one part at a time: in stage 1 ITC with ITG, and each third of ITM; in
            stage 2 the language model's, on up to four pieces of the batch. The gradients are the same, and
            nothing is computed twice. DDP then exchanges them at the end of a step, not during it: with
            memory to spare, False may be faster on several GPUs (not measured). Not with `fsdp2` in stage 2,
            where every piece would gather the language model anew.
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
    early_backward: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("steps", "batch", "accumulate", "eval_every", "save_every", "keep"), at_least(1))
        check(self, "train.", **counts, seed=at_least(0), head_chunk=at_least(1))
        check(self, "train.", precision=one_of(PRECISIONS), parallel=one_of(("ddp", "fsdp2")))
        parts = f"a multiple of accumulate={self.accumulate}"
        require(self.batch % self.accumulate == 0, "train.batch", self.batch, parts)


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
        check(self, "eval.", images=at_least(0), samples=at_least(0), beams=at_least(1), best=one_of(BEST, null=True))
        ordered = 0 <= self.min_tokens <= self.max_tokens
        require(ordered, "eval.min_tokens", self.min_tokens, "between 0 and eval.max_tokens")
