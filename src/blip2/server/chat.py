"""OpenAI's conversations, as BLIP-2 takes them: one image, earlier turns in front of the question."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from blip2.server.errors import bad
from blip2.server.schemas import ChatRequest, ImageUrl, Message
from blip2.server.worker import Written

_PIECE = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Conversation:
    """What is asked.

    Args:
        image: its URL.
        turns: earlier questions and answers about it.
        question: empty where only an image was sent: a caption is wanted.
    """

    image: str
    turns: tuple[tuple[str, str], ...]
    question: str


def conversation(messages: list[Message]) -> Conversation:
    """The last image, the turns since it came, and the question.

    System messages are left out: the language model of BLIP-2 follows no instructions about its role.

    Raises:
        RequestError: 400, no image, several in one message, or no question at the end.
    """
    image, turns, pending = None, [], ""
    spoken = [m for m in messages if m.role not in ("system", "developer")]
    if not spoken or spoken[-1].role != "user":
        raise bad("messages: the last one must be the user's", "messages")
    for message in spoken:
        text, pictures = _parts(message)
        if message.role == "assistant":
            if pending:
                turns.append((pending, text))
            pending = ""
        elif message.role == "user":
            if pictures:
                image, turns, pending = pictures[0], [], ""
            pending = f"{pending} {text}".strip()
        else:
            raise bad("messages: this model uses no tools", "messages")
    if image is None:
        raise bad("messages: none has an image: BLIP-2 speaks about a picture", "messages", "image_missing")
    return Conversation(image, tuple(turns), pending)


def _parts(message: Message) -> tuple[str, list[str]]:
    if message.content is None or isinstance(message.content, str):
        return (message.content or "").strip(), []
    texts, pictures = [], []
    for part in message.content:
        if part.type == "text" and part.text is not None:
            texts.append(part.text.strip())
        elif part.type == "image_url" and part.image_url is not None:
            pictures.append(part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url)
        else:
            raise bad(
                f"messages: a part of type {part.type[:40]!r} cannot be used: send text and image_url", "messages"
            )
    if len(pictures) > 1:
        raise bad("messages: several images in one message: send one at a time", "messages", "too_many_images")
    if pictures and message.role != "user":
        raise bad("messages: images come from the user", "messages")
    return " ".join(texts), pictures


class Completion:
    """One answer in OpenAI's shapes, whole or in pieces."""

    def __init__(self, request: ChatRequest, model: str, written: Written, max_tokens: int) -> None:
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        cut = [_cut(text, stops) for text in written.texts]
        self.texts = [text for text, _ in cut]
        self.ends = [
            "stop" if stopped or tokens < max_tokens else "length"
            for (_, stopped), tokens in zip(cut, written.tokens, strict=True)
        ]
        total = sum(written.tokens)
        self.usage = {
            "prompt_tokens": written.prompt_tokens,
            "completion_tokens": total,
            "total_tokens": written.prompt_tokens + total,
        }
        options = request.stream_options
        self._with_usage = bool(options and options.include_usage)

    def whole(self) -> dict[str, Any]:
        """`chat.completion`."""
        choices = [
            {
                "index": n,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": end,
            }
            for n, (text, end) in enumerate(zip(self.texts, self.ends, strict=True))
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage}

    def events(self) -> Iterator[str]:
        """`chat.completion.chunk`s as server-sent events, a word each, then `[DONE]`."""
        for n, (text, end) in enumerate(zip(self.texts, self.ends, strict=True)):
            yield self._event(n, {"role": "assistant", "content": ""})
            for piece in _PIECE.findall(text):
                yield self._event(n, {"content": piece})
            yield self._event(n, {}, end)
        if self._with_usage:
            yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    def _event(self, index: int, delta: dict[str, Any], end: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": end}
        usage = {"usage": None} if self._with_usage else {}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """A text up to the first of the stops, and whether there was one."""
    at = min((text.find(stop) for stop in stops if stop and stop in text), default=-1)
    return (text[:at].rstrip(), True) if at >= 0 else (text, False)
