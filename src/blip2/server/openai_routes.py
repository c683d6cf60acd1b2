"""`/v1`: chat completions, embeddings and models as OpenAI's clients expect them.

Shape letters: N inputs, Q queries, E contrastive width.
"""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from blip2.ops.devices import to_list, to_numpy
from blip2.server.errors import bad
from blip2.server.images import view_of
from blip2.server.schemas import TEXT, ChatRequest, Decoding, EmbeddingRequest, ImageUrl, Message, is_data_url
from blip2.server.state import Media, ServedModel, Server
from blip2.server.worker import Generated, Generation, Prompt, Task

# Types of a message's parts, in the chat API and the newer one of responses.
_TEXT_PARTS, _IMAGE_PARTS = ("text", "input_text", "output_text"), ("image_url", "input_image")
_FILM_PARTS = ("video_url", "input_video")  # not OpenAI's: vLLM's and others'
# Earlier turns that are read, and characters of a text in them: the prompt has room for fewer tokens.
_TURNS, _TURN_TEXT = 64, 1000
CHAT_TOKENS = 30  # of an answer where the client names no number
_WORD = re.compile(r"\s*\S+")


def register_routes(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    begun = int(time.time())

    def card(model: ServedModel) -> dict[str, Any]:
        worker = model.worker
        able = {"ask": worker.asks, "match": worker.matches, "judge": worker.judges, "attend": worker.attends}
        images = None if worker.index is None else len(worker.index)
        return {
            "id": model.name,
            "object": "model",
            "created": begun,
            "owned_by": "blip2",
            "blip2": {**able, "indexed_images": images},
        }

    @app.get("/v1/models", tags=["OpenAI"], summary="The models that are served, and what each can do")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(model) for model in server.models]}

    @app.get("/v1/models/{model:path}", tags=["OpenAI"], summary="One model")
    async def one_model(model: str) -> dict[str, Any]:
        return card(server.model(model))

    @app.post(
        "/v1/chat/completions",
        tags=["OpenAI"],
        summary="Ask about an image, several images or a film; multi-turn, streamed on request",
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def chat(request: Request, body: ChatRequest) -> Response:
        model = server.model(body.model)
        media, turns, question = conversation(body.messages)
        view = await server.views(model, media)
        generation = Generation.of(
            Decoding(  # beam search unless a temperature is given
                beams=body.beams,
                max_tokens=body.max_completion_tokens or body.max_tokens or CHAT_TOKENS,
                sample=bool(body.temperature),
                temperature=max(body.temperature or 1.0, 0.01),
                top_p=1.0 if body.top_p is None else max(body.top_p, 1e-3),
                seed=body.seed,
            ),
            server.settings.max_tokens,
            answers=bool(question),
            num=body.n or 1,
            images=1 if view.ndim == 3 else len(view),
        )
        prompt = Prompt(view, question or None, turns)
        generated = await model.run(request, generation, prompt, size=generation.images)
        server.metrics.count_tokens(generated)
        completion = Completion(body, model.name, generated, generation.decoding.max_tokens)
        if body.stream:
            return StreamingResponse(completion.events(), media_type="text/event-stream")
        return JSONResponse(completion.as_dict())

    @app.post("/v1/embeddings", tags=["OpenAI"], summary="Vectors of texts and images (data URLs)")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        model = server.model(body.model)
        if not model.worker.matches:
            raise bad("this model has no stage 1 at hand: embeddings need one", "model")
        vectors, tokens = await _vectors(request, body, model, server)
        if body.dimensions is not None and body.dimensions != vectors[0].shape[-1]:
            raise bad(f"dimensions is {body.dimensions}: this model has {vectors[0].shape[-1]}", "dimensions")
        data = [_embedding(n, vector, body.encoding_format) for n, vector in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


# -- chat -----------------------------------------------------------------------------------------


def conversation(messages: list[Message]) -> tuple[list[Media], tuple[tuple[str, str], ...], str]:
    """The images and films of the last message that has any, the earlier questions and answers about them, and the
    question; "" asks for a caption.

    System messages are left out: the language model of BLIP-2 follows no instructions about its role. So is all that
    came before the last image, and of what came behind it the oldest and the far end of long texts.

    Raises:
        RequestError: 400, no image, no question at the end, or one that is too long.
    """
    messages = [message for message in messages if message.role not in ("system", "developer")]
    if not messages or messages[-1].role != "user":
        raise bad("messages: the last one must be the user's", "messages")
    if any(message.role in ("tool", "function") for message in messages):
        raise bad("messages: this model uses no tools", "messages")
    first = next((n for n in reversed(range(len(messages))) if _images(messages[n])), None)
    if first is None:
        raise bad("messages: none has an image: BLIP-2 answers questions about an image", "messages", "image_missing")
    turns: list[tuple[str, str]] = []
    question = ""
    for message in messages[first:]:
        if message.role == "assistant":
            if question:
                turns.append((question[:_TURN_TEXT], _text(message)[:_TURN_TEXT]))
            question = ""
        else:
            question = f"{question} {_text(message)}".strip()
    if len(question) > TEXT:
        raise bad(f"messages: the question is {len(question)} characters long: at most {TEXT}", "messages")
    _refuse_other_parts(messages[-1])
    return _images(messages[first]), tuple(turns[-_TURNS:]), question


def _images(message: Message) -> list[Media]:
    """The images and films that the user sent in a message, in their order."""
    if message.role != "user" or not isinstance(message.content, list):
        return []
    media = []
    for part in message.content:
        url = part.image_url if part.type in _IMAGE_PARTS else part.video_url if part.type in _FILM_PARTS else None
        if url is not None:
            media.append(Media(url.url if isinstance(url, ImageUrl) else url, part.type in _FILM_PARTS))
    return media


def _text(message: Message) -> str:
    if not isinstance(message.content, list):
        return (message.content or "").strip()
    return " ".join(part.text.strip() for part in message.content if part.type in _TEXT_PARTS and part.text)


def _refuse_other_parts(question: Message) -> None:
    """Refuse parts of the question that the answer would be wrong without."""
    for part in question.content if isinstance(question.content, list) else []:
        given = {_TEXT_PARTS: part.text, _IMAGE_PARTS: part.image_url, _FILM_PARTS: part.video_url}
        if not any(part.type in types and value is not None for types, value in given.items()):
            raise bad(
                f"messages: a part of type {part.type[:40]!r} cannot be used: send text, image_url and video_url",
                "messages",
            )


class Completion:
    """One answer in OpenAI's shapes, at once or in pieces."""

    def __init__(self, request: ChatRequest, model: str, generated: Generated, max_tokens: int) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self.choices: list[tuple[str, str]] = []  # texts and why each ended
        for text, tokens in zip(generated.texts, generated.tokens, strict=True):
            end = min((text.find(stop) for stop in stops if stop and stop in text), default=None)
            reason = "stop" if end is not None or tokens < max_tokens else "length"
            self.choices.append((text if end is None else text[:end].rstrip(), reason))
        total = sum(generated.tokens)
        self.usage = {
            "prompt_tokens": generated.prompt_tokens,
            "completion_tokens": total,
            "total_tokens": generated.prompt_tokens + total,
        }
        self.streams_usage = bool(request.stream_options and request.stream_options.include_usage)

    def as_dict(self) -> dict[str, Any]:
        """`chat.completion`."""
        choices = [
            {
                "index": n,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for n, (text, reason) in enumerate(self.choices)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage}

    def events(self) -> Iterator[str]:
        """`chat.completion.chunk`s as server-sent events, a word each, then `[DONE]`."""
        usage = {"usage": None} if self.streams_usage else {}
        for n, (text, reason) in enumerate(self.choices):
            words = [{"content": word} for word in _WORD.findall(text)]
            for delta in [{"role": "assistant", "content": ""}, *words, {}]:
                choice = {"index": n, "delta": delta, "logprobs": None, "finish_reason": None if delta else reason}
                yield self._event({"choices": [choice], **usage})
        if self.streams_usage:
            yield self._event({"choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    def _event(self, values: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', **values})}\n\n"


# -- embeddings -----------------------------------------------------------------------------------


async def _vectors(
    request: Request, body: EmbeddingRequest, model: ServedModel, server: Server
) -> tuple[list[Tensor], int]:
    """One vector [E] per input (an image's [Q, E] where all are wanted), and the tokens that were read."""
    inputs = [body.input] if isinstance(body.input, str) else body.input
    images = [n for n, text in enumerate(inputs) if is_data_url(text)]
    texts = [n for n in range(len(inputs)) if n not in set(images)]
    if len(images) > server.settings.max_batch:
        raise bad(f"input: at most {server.settings.max_batch} images at a time", "input")
    vectors: dict[int, Tensor] = {}
    tokens = 0
    if images:
        raw = [await server.image(inputs[n], param="input") for n in images]
        views = await server.decode(lambda: [view_of(data, model.spec) for data in raw])
        images_NQE = await model.run(request, Task(model.worker.embed_images), views, size=len(views))
        if body.pooling == "mean":
            images_NQE = F.normalize(images_NQE.mean(dim=1), dim=-1)
        vectors.update(zip(images, images_NQE, strict=True))
        tokens += len(images) * model.worker.queries
    if texts:
        texts_NE, read = await model.run(request, Task(model.worker.embed_texts), [inputs[n] for n in texts])
        vectors.update(zip(texts, texts_NE, strict=True))
        tokens += read
    return [vectors[n] for n in range(len(inputs))], tokens


def _embedding(number: int, vector: Tensor, encoding: str | None) -> dict[str, Any]:
    flat = vector.flatten().contiguous()
    value: Any = to_list(flat)
    if encoding == "base64":
        value = base64.b64encode(to_numpy(flat).astype("<f4").tobytes()).decode()
    shape = {"shape": list(vector.shape)} if vector.dim() > 1 else {}
    return {"object": "embedding", "index": number, "embedding": value, **shape}
