"""`/v1`: chat completions, embeddings and models as OpenAI's clients expect them.

Shape letters: N inputs, Q queries, E contrastive width.
"""

from __future__ import annotations

import base64
import time
from typing import Any

import torch.nn.functional as F
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from blip2.configs import DecodingConfig
from blip2.ops.devices import to_list, to_numpy
from blip2.server.chat import Completion, conversation
from blip2.server.errors import bad
from blip2.server.images import view_of
from blip2.server.schemas import ChatRequest, EmbeddingRequest
from blip2.server.state import Server
from blip2.server.worker import Kind, Prompt, Write

CHAT_TOKENS = 30  # of an answer where the client names no number


def register_routes(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    begun = int(time.time())

    def card(here: Server) -> dict[str, Any]:
        worker = here.worker
        able = {"ask": worker.asks, "match": worker.matches, "judge": worker.judges, "attend": worker.attends}
        images = None if worker.index is None else len(worker.index)
        return {
            "id": here.name,
            "object": "model",
            "created": begun,
            "owned_by": "blip2",
            "blip2": {**able, "indexed_images": images},
        }

    @app.get("/v1/models", tags=["OpenAI"], summary="The model that is served, and what it can do")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(each) for each in server.all]}

    @app.get("/v1/models/{model:path}", tags=["OpenAI"], summary="One model")
    async def one_model(model: str) -> dict[str, Any]:
        return card(server.of(model))

    @app.post(
        "/v1/chat/completions",
        tags=["OpenAI"],
        summary="Ask about an image; multi-turn, streamed on request",
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def chat(request: Request, body: ChatRequest) -> Response:
        here = server.of(body.model)
        talk = conversation(body.messages)
        kind = _kind(body, bool(talk.question), here)
        item = Prompt(await here.view(talk.image, param="messages"), talk.question or None, talk.turns)
        written = await here.run(request, kind, item)
        server.metrics.tokens.labels("prompt").inc(written.prompt_tokens)
        server.metrics.tokens.labels("completion").inc(sum(written.tokens))
        completion = Completion(body, here.name, written, kind.decoding.max_tokens)
        if body.stream:
            return StreamingResponse(completion.events(), media_type="text/event-stream")
        return JSONResponse(completion.whole())

    @app.post("/v1/embeddings", tags=["OpenAI"], summary="Vectors of texts and images (data URLs)")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        here = server.of(body.model)
        if not here.worker.matches:
            raise bad("this model has no stage 1 at hand: embeddings need one", "model")
        inputs = [body.input] if isinstance(body.input, str) else body.input
        vectors, tokens = await _vectors(request, inputs, body, here)
        if body.dimensions is not None and body.dimensions != vectors[0].shape[-1]:
            raise bad(f"dimensions is {body.dimensions}: this model has {vectors[0].shape[-1]}", "dimensions")
        data = [_entry(n, vector, body.encoding_format) for n, vector in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": here.name, "usage": usage})


async def _vectors(
    request: Request, inputs: list[str], body: EmbeddingRequest, server: Server
) -> tuple[list[Tensor], int]:
    """One vector [E] per input (an image's [Q, E] where all are wanted), and the tokens that were read."""
    pictures = [n for n, given in enumerate(inputs) if _is_image(given)]
    if len(pictures) > server.settings.max_batch:
        raise bad(f"input: at most {server.settings.max_batch} images at a time", "input")
    if any(not given.strip() or (n not in pictures and len(given) > 4000) for n, given in enumerate(inputs)):
        raise bad("input: texts must have 1 to 4000 characters", "input")
    texts = [n for n in range(len(inputs)) if n not in set(pictures)]
    out: dict[int, Tensor] = {}
    tokens = 0
    if pictures:
        raw = [await server.intake.image(inputs[n], param="input") for n in pictures]
        views = await server.intake.aside(lambda: [view_of(data, server.spec) for data in raw])
        found_NQE = await server.run(request, Kind("images"), views, size=len(views))
        if body.pooling == "mean":
            found_NQE = F.normalize(found_NQE.mean(dim=1), dim=-1)
        out.update(zip(pictures, found_NQE, strict=True))
        tokens += len(pictures) * server.worker._queries
    if texts:
        found_NE, read = await server.run(request, Kind("texts"), [inputs[n] for n in texts])
        out.update(zip(texts, found_NE, strict=True))
        tokens += read
    return [out[n] for n in range(len(inputs))], tokens


def _is_image(given: str) -> bool:
    return given[:11].lower() == "data:image/" or given[:8].lower().startswith(("http://", "https://"))


def _entry(number: int, vector: Tensor, encoding: str | None) -> dict[str, Any]:
    flat = vector.flatten().contiguous()
    value: Any = to_list(flat)
    if encoding == "base64":
        value = base64.b64encode(to_numpy(flat).astype("<f4").tobytes()).decode()
    shape = {"shape": list(vector.shape)} if vector.dim() > 1 else {}
    return {"object": "embedding", "index": number, "embedding": value, **shape}


def _kind(body: ChatRequest, asks: bool, server: Server) -> Write:
    """How to write: beam search unless a temperature is given; answers as the paper's for VQA, but longer."""
    wanted = body.max_completion_tokens or body.max_tokens or CHAT_TOKENS
    longest = min(wanted, server.settings.max_tokens)
    num = body.n or 1
    drawn = bool(body.temperature)
    decoding = DecodingConfig(
        beams=max(body.beams, num),
        num=num,
        min_tokens=min(1 if asks else 8, longest),
        max_tokens=longest,
        length_penalty=-1.0 if asks else 1.0,
        sample=drawn,
        temperature=max(body.temperature or 1.0, 0.01),
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-3),
    )
    seeded = drawn and body.seed is not None
    return Write(decoding, asks, seed=body.seed if seeded else None, alone=server.alone() if seeded else 0)
