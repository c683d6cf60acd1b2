"""What decides the result of CapFilt; the same settings give the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

from blip2.errors import ConfigError


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
        prompt: text that captions continue; None takes the captioner's.
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
        if self.itm_threshold is not None and not 0 <= self.itm_threshold <= 1:
            raise ConfigError(f"itm-threshold is {self.itm_threshold}: it must be between 0 and 1")
