"""lmms-eval drives a blip2 model: `lmms_eval --model blip2 --model_args pretrained=runs/s2 --tasks ...`.

lmms-eval finds `manifest` through an entry point of this package, so that installing both is all it
takes. It is imported by lmms-eval alone, and is the one module here that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from blip2.configs import DecodingConfig
from blip2.errors import ConfigError
from blip2.inference import Blip2, load
from blip2.ops.devices import to_list

# lmms-eval's names of generation settings; those that are not here (`until`, `do_sample`) are read apart.
_SETTINGS = {"max_new_tokens": "max_tokens", "num_beams": "beams", "top_p": "top_p", "temperature": "temperature"}
# What a task asks for when it does not say how much: answers are short.
_LENGTH = 64


def manifest() -> ModelManifest:
    """What lmms-eval's registry wants to know."""
    return ModelManifest("blip2", simple_class_path="blip2.evaluation.lmms_eval.Blip2Lmms")


class Blip2Lmms(lmms):  # type: ignore[misc]
    """A blip2 model behind lmms-eval's interface; one image per request.

    Args:
        pretrained: whatever `blip2.load` takes.
        device, dtype, quantize: as `blip2.load`.
        batch_size: requests that go through the model together.
        template: `none` gives the model a task's prompt as it is, `question` puts it into the run's
            own question template, as the paper asks.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str | None = None,
        quantize: str | None = None,
        batch_size: int | str = 1,
        template: str = "none",
        **unknown: Any,
    ) -> None:
        super().__init__()
        names = [name for name, value in unknown.items() if value is not None and name != "max_batch_size"]
        if names:
            raise ConfigError(
                f"--model_args {names[0]} is unknown: pretrained, device, dtype, quantize, template are known"
            )
        if template not in ("none", "question"):
            raise ConfigError(f"--model_args template is {template!r}: it must be none or question")
        if device == "cuda" and not torch.cuda.is_available():
            device = "auto"
        self.model: Blip2 = load(pretrained, device=device, dtype=dtype, quantize=quantize)
        self.model.batch = self.batch_size = int(batch_size)
        self.template = template

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Texts written after each request's prompt, cut at the first of its stop texts."""
        groups: dict[str, list[int]] = {}  # requests with the same settings are decoded together
        for n, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(n)
        answers = [""] * len(requests)
        for members in groups.values():
            decoding, until = decoding_of(requests[members[0]].args[1])
            for chunk in tqdm(list(_chunks(members, self.batch_size)), desc="blip2", disable=self.rank > 0):
                images, prompts, questions = zip(*(self._inputs(requests[n].args) for n in chunk), strict=True)
                texts = self.model.generate(self.model.features(images), list(prompts), decoding, questions=questions)
                for n, (best, *_) in zip(chunk, texts, strict=True):
                    answers[n] = cut(best, until)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability of each continuation, whether greedy decoding would write it)."""
        out: list[tuple[float, bool]] = []
        for chunk in _chunks(list(range(len(requests))), self.batch_size):
            parts = [self._inputs(requests[n].args) for n in chunk]
            continuations = [self._continuation(requests[n].args) for n in chunk]
            images, prompts, questions = (list(part) for part in zip(*parts, strict=True))
            features = self.model.features(images)
            likely = to_list(self.model.log_likelihood(features, prompts, continuations, questions=questions))
            greedy = self.model.generate(features, prompts, DecodingConfig(beams=1, min_tokens=0), questions=questions)
            out += [(v, texts[0] == text) for v, texts, text in zip(likely, greedy, continuations, strict=True)]
        return out

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: BLIP-2 is trained on one image and one text at a time."""
        raise ConfigError("BLIP-2 answers one question about one image: tasks of several rounds are not for it")

    def _inputs(self, arguments: tuple[Any, ...]) -> tuple[Any, str, str]:
        """(image, prompt, bare question) of a request."""
        context, _, to_visual, number, task, split = arguments
        images = to_visual(self.task_dict[task][split][number])
        if len(images) != 1:
            raise ConfigError(f"{task}: request {number} has {len(images)} images, and BLIP-2 sees one")
        question = context.replace("<image>", "").strip()
        prompt = self.model.config.language.question.format(question) if self.template == "question" else question
        return images[0], prompt, question

    def _continuation(self, arguments: tuple[Any, ...]) -> str:
        _, continuation, _, number, task, split = arguments
        text = continuation if isinstance(continuation, str) else continuation(self.task_dict[task][split][number])
        return str(text).strip()


def decoding_of(settings: dict[str, Any]) -> tuple[DecodingConfig, list[str]]:
    """How a task wants its text, and where it ends."""
    options = {ours: settings[theirs] for theirs, ours in _SETTINGS.items() if settings.get(theirs) is not None}
    sample = bool(settings.get("do_sample")) and options.get("temperature", 1.0) > 0
    if not sample:
        options.pop("temperature", None)
        options.pop("top_p", None)
    until = settings.get("until") or []
    defaults = {"beams": 1, "min_tokens": 0, "max_tokens": _LENGTH, "sample": sample}
    return DecodingConfig(**{**defaults, **options}), [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of its stop texts."""
    ends = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(ends)].strip() if ends else text


def _chunks(positions: list[int], size: int) -> Iterable[list[int]]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]
