"""The server's own routes: /caption, /ask, /search, /attend, thumbnails, health and figures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from blip2.configs import DecodingConfig
from blip2.data.collection import BadSampleError, printable
from blip2.search.query import read
from blip2.server.errors import RequestError, bad
from blip2.server.images import thumbnail
from blip2.server.schemas import (
    AskRequest,
    AskResponse,
    AttendRequest,
    Caption,
    CaptionRequest,
    CaptionResponse,
    Decoding,
    Given,
    SearchHit,
    SearchRequest,
    SearchResponse,
)
from blip2.server.state import Server
from blip2.server.worker import Kind, Prompt, Query, Write, Written

# Decoding as the paper has it where a request does not say: (min_tokens, max_tokens, length_penalty).
_CAPTION, _ANSWER = (8, 30, 1.0), (1, 10, -1.0)


def register_routes(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    _add_text(app, server)
    _add_search(app, server)

    @app.get("/healthz", tags=["server"], summary="Whether the model takes requests")
    async def healthz(response: Response) -> dict[str, str]:
        alive = all(each.batcher.alive for each in server.all)
        response.status_code = 200 if alive else 503
        return {"status": "ok" if alive else "stopping", "model": server.name}

    @app.get(
        "/metrics",
        tags=["server"],
        summary="Figures in Prometheus' format",
        responses={200: {"content": {"text/plain": {}}}},
        response_class=Response,
    )
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=server.metrics.content_type)


def _add_text(app: FastAPI, server: Server) -> None:
    @app.post("/caption", tags=["blip2"], summary="Captions of an image", openapi_extra=_body(CaptionRequest))
    async def caption(request: Request) -> CaptionResponse:
        asked, upload = await server.intake.fields(request, CaptionRequest)
        here = server.of(asked.model)
        kind = _write(asked, _CAPTION, here, num=asked.num, scored=True)
        view = await here.view(asked.image, upload)
        written = await here.run(request, kind, Prompt(view, asked.prompt))
        _count(server, written)
        nothing = [None] * len(written.texts)
        told = zip(written.texts, written.scores or nothing, written.itc_scores or nothing, strict=True)
        captions = [Caption(text=text, score=score, similarity=itc_scores) for text, score, itc_scores in told]
        return CaptionResponse(model=here.name, captions=captions)

    @app.post(
        "/ask",
        tags=["blip2"],
        summary="A question about an image, perhaps after others",
        openapi_extra=_body(AskRequest),
    )
    async def ask(request: Request) -> AskResponse:
        asked, upload = await server.intake.fields(request, AskRequest)
        if not asked.question.strip():
            raise bad("question: it is empty", "question")
        here = server.of(asked.model)
        kind = _write(asked, _ANSWER, here, asks=True)
        turns = tuple((turn.question.strip(), turn.answer) for turn in asked.history)
        view = await here.view(asked.image, upload)
        written = await here.run(request, kind, Prompt(view, asked.question, turns))
        _count(server, written)
        return AskResponse(model=here.name, question=asked.question, answer=written.texts[0])

    @app.post(
        "/attend", tags=["blip2"], summary="Where the queries look, and what the scores with a text depend on",
        openapi_extra=_body(AttendRequest),
    )  # fmt: skip
    async def attend(request: Request) -> dict[str, Any]:
        asked, upload = await server.intake.fields(request, AttendRequest)
        data = await server.picture(asked.image, upload)
        text = (asked.text or "").strip() or None
        here = server.of(asked.model)
        found: dict[str, Any] = await here.run(request, Kind("attend", here.alone()), Query(text, data))
        return found


def _add_search(app: FastAPI, server: Server) -> None:
    @app.post("/search", tags=["blip2"], summary="Search the server's index", openapi_extra=_body(SearchRequest))
    async def search(request: Request) -> SearchResponse:
        asked, upload = await server.intake.fields(request, SearchRequest)
        here = server.searching
        index = here.worker.index
        if index is None:
            raise RequestError(404, "this server has no index: start it with --index INDEX", code="no_index")
        text = (asked.text or "").strip() or None
        if text is None and not asked.image:
            raise bad("nothing to search for: give a text, an image, or both", "text")
        data = await server.picture(asked.image, upload) if asked.image else None
        query = Query(text, data, asked.k, asked.rerank, asked.within)
        hits = await here.run(request, Kind("search", here.alone()), query)
        found = [
            SearchHit(
                id=image,
                name=printable(Path(hit.path).name if hit.row.size < 0 else hit.key),
                score=hit.score,
                parts=hit.parts,
                captions=[printable(text) for text in hit.captions],
                state=hit.state,
                thumbnail=f"/thumbnails/{image}" if hit.state == "ok" else None,
            )
            for image, hit in zip(server.show(hits), hits, strict=True)
        ]
        return SearchResponse(hits=found, images=len(index))

    @app.get(
        "/thumbnails/{image}",
        tags=["blip2"],
        summary="A small JPEG of an image that a search has found",
        responses={200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
    )
    async def thumbnails(image: str) -> Response:
        row = server.shown(image)
        data, state = await asyncio.to_thread(read, row)
        if data is None:
            raise RequestError(404, f"this image is {state} since it was indexed", code=state)
        try:
            small = await server.intake.aside(lambda: thumbnail(data))
        except BadSampleError:
            raise RequestError(404, "this image cannot be decoded any more", code="changed") from None
        return Response(small, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})


def _write(
    asked: Decoding,
    defaults: tuple[int, int, float],
    server: Server,
    *,
    num: int = 1,
    asks: bool = False,
    scored: bool = False,
) -> Write:
    shortest, longest, penalty = defaults
    most = min(asked.max_tokens or longest, server.settings.max_tokens)
    least = shortest if asked.min_tokens is None else asked.min_tokens
    decoding = DecodingConfig(
        beams=max(asked.beams, num),
        num=num,
        min_tokens=min(least, most),
        max_tokens=most,
        length_penalty=penalty if asked.length_penalty is None else asked.length_penalty,
        repetition_penalty=asked.repetition_penalty,
        sample=asked.sample,
        top_p=asked.top_p,
        temperature=asked.temperature,
    )
    seeded = asked.sample and asked.seed is not None
    seed, alone = (asked.seed, server.alone()) if seeded else (None, 0)
    return Write(decoding, asks, scored, seed, alone)


def _count(server: Server, written: Written) -> None:
    server.metrics.tokens.labels("prompt").inc(written.prompt_tokens)
    server.metrics.tokens.labels("completion").inc(sum(written.tokens))


def _body(shape: type[Given]) -> dict[str, Any]:
    """OpenAPI's description of a body that is JSON, or a form whose `image` is a file."""
    schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    fields = dict(schema["properties"])
    fields["image"] = {"type": "string", "format": "binary"}
    form = {**schema, "properties": fields}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
