"""How text is generated, in evaluation and in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blip2.configs.checks import POSITIVE, UP_TO_ONE, at_least, check, require


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

    @classmethod
    def for_answers(cls, **options: Any) -> DecodingConfig:
        """The paper's for VQA: beam 5, length penalty -1, 1 to 10 tokens; `options` replace single fields."""
        return cls(**{"min_tokens": 1, "max_tokens": 10, "length_penalty": -1.0, **options})

    def __post_init__(self) -> None:
        check(self, beams=at_least(1), num=at_least(1), max_tokens=at_least(1), temperature=POSITIVE, top_p=UP_TO_ONE)
        require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "between 0 and max_tokens")
        require(self.sample or self.num <= self.beams, "num", self.num, f"at most beams ({self.beams})")
        require(self.rerank == 0 or self.rerank >= self.num, "rerank", self.rerank, f"0, or num ({self.num}) or more")
