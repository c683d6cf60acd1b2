"""A whole run, what its parts demand of each other, and configurations as the plain dicts of YAML and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from blip2.configs.checks import check, one_of, require
from blip2.configs.model import LanguageConfig, LoraConfig, QFormerConfig, VisionConfig
from blip2.configs.training import DataConfig, EvalConfig, LossConfig, OptimConfig, TrainConfig
from blip2.errors import ConfigError


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Args:
        recipe: name of the recipe it began as.
        stage: `stage1` (representation learning) or `stage2` (generative learning).
        out: run folder; None picks `runs/<recipe>` with `/` replaced by `-`.
        init: run folder or weights file that this run starts from (stage 2: a stage-1 run).
        init_text: stage-1 checkpoint that the text branch comes from (`qformer.instruction`); None takes
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
        check(self, stage=one_of(("stage1", "stage2")))
        train, shots, reads = self.train, self.data.shots, self.qformer.instruction
        stage1, several, asks = self.stage == "stage1", self.data.texts_per_image > 1, self.data.texts == "questions"
        quantized, linear = self.language.quantize is not None, self.qformer.bridge == "linear"
        sharded, steps = train.parallel == "fsdp2", train.accumulate * (shots + 1)
        best = ("loss", "recall") if stage1 else ("loss", "accuracy" if asks else "cider")
        without = "in stage 1, which has no language model"
        refused = {
            f"lora.rank: 0 {without}": stage1 and self.lora.rank > 0,
            "lora.qformer_rank: 0 in stage 1 and with qformer.bridge linear": (stage1 or linear)
            and self.lora.qformer_rank > 0,
            f"language.quantize: null {without}": stage1 and quantized,
            "language.quantize: null with train.parallel fsdp2; use ddp": sharded and quantized,
            "optim.name: adamw or sgd with train.parallel fsdp2": sharded and self.optim.name not in ("adamw", "sgd"),
            "train.compile: false with train.parallel fsdp2": sharded and train.compile,
            "vision.token_drop: 0 with qformer.bridge linear, which averages all": linear
            and self.vision.token_drop > 0,
            "data.cache_features: false with vision.train: features change as it trains": self.vision.train
            and self.data.cache_features,
            f"data.shots: 0 {without}": stage1 and shots > 0,
            "data.texts_per_image: 1 with data.shots": shots > 0 and several,
            f"train.batch: a multiple of train.accumulate x (data.shots + 1 = {shots + 1})": train.batch % steps > 0,
            "data.texts: captions in stage 1": stage1 and self.data.texts != "captions",
            "data.texts_per_image: 1 in stage 1": stage1 and several,
            "qformer.instruction: null in stage 1": stage1 and reads is not None,
            "qformer.bridge: qformer in stage 1": stage1 and linear,
            "qformer.instruction: prompt or null unless data.texts is questions": reads == "question" and not asks,
            "init_text: null without init and qformer.instruction": self.init_text is not None
            and not (self.init is not None and reads is not None),
            f"eval.best: one of {', '.join(best)} here, or null": self.eval.best not in (None, *best),
        }
        for rule, broken in refused.items():
            name, _, allowed = rule.partition(": ")
            require(not broken, name, functools.reduce(getattr, name.split("."), self), allowed)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config, ready for YAML or JSON (tuples become lists)."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def flat(config: Any) -> dict[str, Any]:
    """Every setting of a config by its dotted name (`optim.lr`)."""
    out: dict[str, Any] = {}
    for name, value in vars(config).items():
        nested = flat(value) if dataclasses.is_dataclass(value) else {}
        out |= {f"{name}.{key}": setting for key, setting in nested.items()} or {name: value}
    return out


def from_dict(kind: type[Any], values: dict[str, Any], where: str = "config") -> Any:
    """Build config class `kind` from a nested dict, as YAML or JSON give it.

    Raises:
        ConfigError: an unknown key, a value of another type, or one that the class refuses; `where`
            names the file.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: not a group of settings")
    values = _of_today(kind, values)
    hints = get_type_hints(kind)
    unknown = sorted(set(map(str, values)) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown setting {unknown[0]!r}; known: {', '.join(hints)}")
    return kind(**{name: _read(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _of_today(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings of earlier versions under their names and values of today."""
    if kind is not QFormerConfig or not isinstance(values.get("question"), bool):
        return values
    rest = {name: value for name, value in values.items() if name != "question"}
    return {"instruction": "question" if values["question"] else None, **rest}


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _read(hint: Any, value: Any, where: str) -> Any:
    """A plain value as the type of its setting; YAML reads 3e-4 as a text, which is a number here."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return from_dict(cast(type, hint), value, where)
        raise ConfigError(f"{where} is {value!r}: it must be a group of settings")
    if isinstance(hint, UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(get_args(hint)):
            return tuple(_read(part, x, where) for part, x in zip(get_args(hint), value, strict=True))
        raise ConfigError(f"{where} is {value!r}: it must be a list of {len(get_args(hint))} numbers")
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}: it must be {_WORDS[hint]}")
