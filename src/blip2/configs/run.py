"""A whole run, and what its parts demand of each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip2.configs.checks import require
from blip2.configs.data import DataConfig
from blip2.configs.model import LanguageConfig, LoraConfig, QFormerConfig, VisionConfig
from blip2.configs.training import EvalConfig, LossConfig, OptimConfig, TrainConfig

STAGES = ("stage1", "stage2")


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
        require(self.stage in STAGES, "stage", self.stage, f"one of {', '.join(STAGES)}")
        self._check_towers()
        self._check_texts()

    def _check_towers(self) -> None:
        quantize, sharded = self.language.quantize, self.train.parallel == "fsdp2"
        if self.stage == "stage1":
            require(self.lora.rank == 0, "lora.rank", self.lora.rank, "0 in stage 1, which has no language model")
            require(quantize is None, "language.quantize", quantize, "null in stage 1, which has no language model")
        require(not (sharded and quantize), "language.quantize", quantize, "null with train.parallel fsdp2; use ddp")
        whole = self.optim.name in ("adamw", "sgd")
        require(whole or not sharded, "optim.name", self.optim.name, "adamw or sgd with train.parallel fsdp2")
        require(not (sharded and self.train.compile), "train.compile", True, "false with train.parallel fsdp2")
        linear = self.qformer.bridge == "linear" and self.vision.token_drop
        require(
            not linear, "vision.token_drop", self.vision.token_drop, "0 with qformer.bridge linear, which averages all"
        )
        cached = self.vision.train and self.data.cache_features
        require(not cached, "data.cache_features", True, "false with vision.train: features change as it trains")

    def _check_texts(self) -> None:
        texts, settings, best = self.data.texts, self.qformer, self.eval.best
        asks = texts == "questions"
        self._check_shots()
        if self.stage == "stage1":
            require(texts == "captions", "data.texts", texts, "captions in stage 1")
            require(self.data.texts_per_image == 1, "data.texts_per_image", self.data.texts_per_image, "1 in stage 1")
            require(not settings.question, "qformer.question", True, "false in stage 1")
            require(settings.bridge == "qformer", "qformer.bridge", settings.bridge, "qformer in stage 1")
        require(asks or not settings.question, "qformer.question", True, "false unless data.texts is questions")
        used = self.init is not None and settings.question
        require(self.init_text is None or used, "init_text", self.init_text, "null without init and qformer.question")
        possible = {"stage1": ("loss", "recall"), "stage2": ("loss", "accuracy" if asks else "cider")}[self.stage]
        require(best in (None, *possible), "eval.best", best, f"one of {', '.join(possible)} here, or null")

    def _check_shots(self) -> None:
        shots, train = self.data.shots, self.train
        require(shots == 0 or self.stage == "stage2", "data.shots", shots, "0 in stage 1, which has no language model")
        require(
            shots == 0 or self.data.texts_per_image == 1,
            "data.texts_per_image",
            self.data.texts_per_image,
            "1 with data.shots",
        )
        whole = train.batch % (train.accumulate * (shots + 1)) == 0
        require(whole, "train.batch", train.batch, f"a multiple of train.accumulate x (data.shots + 1 = {shots + 1})")
