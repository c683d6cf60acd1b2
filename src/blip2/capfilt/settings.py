"""What decides the result of CapFilt; the same settings give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from blip2.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """What a caption of one image continues.

    Args:
        text: the prompt; None takes the captioner's.
        kept: the end of it that belongs to the caption: fields of the sample and what follows them.
    """

    text: str | None
    kept: str = ""


@dataclass(frozen=True)
class CapFiltSettings:
    """Defaults are the paper's (arXiv 2301.12597, section 4.1: 10 captions, ranked by CLIP, the best two kept).

    Args:
        captioner: what `blip2.load` takes, or a folder or hub id of transformers' BLIP.
        ranker: what `blip2.load` takes (its ITC), or a folder or hub id of transformers' CLIP; None
            is the captioner's own stage 1.
        samples: captions drawn per image by nucleus sampling; 0 only ranks the web text.
        keep: captions kept per image.
        itm_threshold: keep only texts that the ITM head finds matching with at least this
            probability (BLIP's rule is 0.5); None asks no ITM.
        prompt: text that captions continue; None takes the captioner's. `a photo of {label}` takes the text of
            that field of a sample's JSON, which is then part of the caption; a sample without the field is
            captioned with the captioner's own prompt.
        batch: images at a time; captions are seeded by the keys of a batch.
        dtype: of the frozen towers (`fp32`, `bf16`, `fp16`); None picks by hardware.
    """

    captioner: str
    ranker: str | None = None
    samples: int = 10
    keep: int = 2
    itm_threshold: float | None = None
    prompt: str | None = None
    top_p: float = 0.9
    temperature: float = 1.0
    min_tokens: int = 5
    max_tokens: int = 20
    batch: int = 8
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("keep", 1), ("batch", 1), ("seed", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name.replace('_', '-')} is {getattr(self, name)}: it must be {least} or more")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(
                f"min-tokens is {self.min_tokens}: it must be between 0 and max-tokens ({self.max_tokens})"
            )
        _fields(self.prompt)
        if self.itm_threshold is not None and not 0 <= self.itm_threshold <= 1:
            raise ConfigError(f"itm-threshold is {self.itm_threshold}: it must be between 0 and 1")

    def prompt_for(self, entry: dict[str, Any]) -> Prompt:
        """The prompt of a sample, by its JSON object."""
        if self.prompt is None or not (names := _fields(self.prompt)):
            return Prompt(self.prompt)
        values = {name: entry.get(name) for name in names}
        if not all(isinstance(value, str) and value.strip() for value in values.values()):
            return Prompt(None)
        start = self.prompt.index("{")
        return Prompt(self.prompt.format(**values), self.prompt[start:].format(**values))


def _fields(prompt: str | None) -> Sequence[str]:
    """Names of the fields in a prompt.

    Raises:
        ConfigError: braces that are no fields.
    """
    try:
        parts = list(Formatter().parse(prompt or ""))
    except ValueError as error:
        raise ConfigError(f"prompt {prompt!r}: {error}; a field is written {{label}}") from error
    names = [name for _, name, _, _ in parts if name is not None]
    if not all(name.isidentifier() for name in names):
        raise ConfigError(f"prompt {prompt!r}: a field is the name of one in the samples' JSON, as {{label}}")
    return names
