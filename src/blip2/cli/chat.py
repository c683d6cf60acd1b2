"""`blip2 chat`: questions about an image, several together or a film, one after the other, in a terminal or a pipe."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blip2.cli.options import Commands, add_beams, add_frames, add_model
from blip2.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from blip2.configs import DecodingConfig
    from blip2.inference import Blip2

TURNS = 6  # earlier questions that the language model still sees
_HELP = "Ask about the image; /caption, /forget the conversation, /quit or Ctrl-D."


def add_parser(commands: Commands) -> None:
    """`blip2 chat`."""
    chat = commands.add_parser("chat", help="ask about an image, several images or a film, question after question")
    chat.add_argument("image", nargs="+", help="image, film (.mp4, .webm, .gif) or folder of frames; several in order")
    add_frames(chat)
    add_beams(chat)
    chat.add_argument("--max-tokens", type=int, default=20, help="of an answer (default: %(default)s)")
    chat.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none (default: %(default)s)")
    add_model(chat)
    chat.set_defaults(run=run)


class Chat:
    """A conversation about one image: each question follows the earlier ones and their answers.

    Raises:
        ConfigError: the model has no language model.
    """

    def __init__(self, model: Blip2, features_1PC: Tensor, decoding: DecodingConfig) -> None:
        if model.stage2 is None:
            raise ConfigError("this run is stage 1 and has no language model: chat needs a stage-2 run")
        self.model, self.features_1PC, self.decoding = model, features_1PC, decoding
        self.turns: list[tuple[str, str]] = []

    def ask(self, question: str) -> str:
        """The answer, which later questions see."""
        answer = self.model.generate(self.features_1PC, [self.prompt(question)], self.decoding)[0][0].strip()
        self.turns.append((question.strip(), answer))
        return answer

    def prompt(self, question: str) -> str:
        """Earlier questions and answers in the run's own form, and the new question (LAVIS's form of chat)."""
        form = self.model.config.language.question
        earlier = [f"{form.format(q)} {a.rstrip('.')}." for q, a in self.turns[-TURNS:]]
        return " ".join([*earlier, form.format(question.strip())])


def run(options: argparse.Namespace) -> int:
    """Read questions from standard input until it ends."""
    from blip2.configs import DecodingConfig
    from blip2.data.film import FRAMES, open_sample
    from blip2.inference.loading import load_model

    open_sample(options.image, options.frames or FRAMES)  # what cannot be read is said before a model is loaded
    model, _ = load_model(options)
    model.frames = options.frames or model.frames
    decoding = DecodingConfig(
        beams=options.beams, min_tokens=1, max_tokens=options.max_tokens, repetition_penalty=options.repetition_penalty
    )
    _, features = next(model.sample_batches([options.image]))
    chat = Chat(model, features, decoding)
    if sys.stdin.isatty():
        print(_HELP, file=sys.stderr)
    for line in _lines():
        if line == "/quit":
            break
        if line == "/forget":
            chat.turns.clear()
        elif line == "/caption":
            print(model.caption_features(chat.features_1PC, None, DecodingConfig())[0][0], flush=True)
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            print(chat.ask(line), flush=True)
    return 0


def _lines() -> Iterator[str]:
    """Lines from a terminal, with editing and history, or from a pipe."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # which gives `input` a history
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
