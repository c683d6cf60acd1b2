"""The server's own routes: /caption, /ask, /search, /attend, thumbnails, health and figures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import generate_latest

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
    Given,
    SearchHit,
    SearchRequest,
    SearchResponse,
)
from blip2.server.state import Server
from blip2.server.worker import Generation, Prompt, Task


def register_routes(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    _add_text(app, server)
    _add_search(app, server)

    @app.get("/healthz", tags=["server"], summary="Whether the model takes requests")
    async def healthz(response: Response) -> dict[str, str]:
        alive = all(model.batcher.alive for model in server.models)
        response.status_code = 200 if alive else 503
        return {"status": "ok" if alive else "stopping", "model": server.models[0].name}

    @app.get(
        "/metrics",
        tags=["server"],
        summary="Figures in Prometheus' format",
        responses={200: {"content": {"text/plain": {}}}},
        response_class=Response,
    )
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_text(app: FastAPI, server: Server) -> None:
    @app.post("/caption", tags=["blip2"], summary="Captions of an image", openapi_extra=_body(CaptionRequest))
    async def caption(request: Request) -> CaptionResponse:
        fields, upload = await server.fields(request, CaptionRequest)
        model = server.model(fields.model)
        generation = Generation.of(fields, server.settings.max_tokens, num=fields.num, scored=True)
        view = await server.view(model, fields.image, upload)
        generated = await model.run(request, generation, Prompt(view, fields.prompt))
        server.metrics.count_tokens(generated)
        nothing = [None] * len(generated.texts)
        scored = zip(generated.texts, generated.scores or nothing, generated.itc_scores or nothing, strict=True)
        captions = [Caption(text=text, score=score, similarity=similarity) for text, score, similarity in scored]
        return CaptionResponse(model=model.name, captions=captions)

    @app.post(
        "/ask",
        tags=["blip2"],
        summary="A question about an image, perhaps after others",
        openapi_extra=_body(AskRequest),
    )
    async def ask(request: Request) -> AskResponse:
        fields, upload = await server.fields(request, AskRequest)
        if not fields.question.strip():
            raise bad("question: it is empty", "question")
        model = server.model(fields.model)
        generation = Generation.of(fields, server.settings.max_tokens, answers=True)
        turns = tuple((turn.question.strip(), turn.answer) for turn in fields.history)
        view = await server.view(model, fields.image, upload)
        generated = await model.run(request, generation, Prompt(view, fields.question, turns))
        server.metrics.count_tokens(generated)
        return AskResponse(model=model.name, question=fields.question, answer=generated.texts[0])

    @app.post(
        "/attend", tags=["blip2"], summary="Where the queries look, and what the scores with a text depend on",
        openapi_extra=_body(AttendRequest),
    )  # fmt: skip
    async def attend(request: Request) -> dict[str, Any]:
        fields, upload = await server.fields(request, AttendRequest)
        model = server.model(fields.model)
        image = await server.decodable(model, fields.image, upload)
        text = (fields.text or "").strip() or None
        maps: dict[str, Any] = await model.run(request, Task(model.worker.attend, alone=object()), (text, image))
        return maps


def _add_search(app: FastAPI, server: Server) -> None:
    @app.post("/search", tags=["blip2"], summary="Search the server's index", openapi_extra=_body(SearchRequest))
    async def search(request: Request) -> SearchResponse:
        fields, upload = await server.fields(request, SearchRequest)
        model = next((model for model in server.models if model.worker.index is not None), None)
        if model is None or model.worker.index is None:
            raise RequestError(404, "this server has no index: start it with --index INDEX", code="no_index")
        fields.text = (fields.text or "").strip() or None
        if fields.text is None and not fields.image:
            raise bad("nothing to search for: give a text, an image, or both", "text")
        image = await server.decodable(model, fields.image, upload) if fields.image else None
        hits = await model.run(request, Task(model.worker.search, alone=object()), (fields, image))
        server.allow_thumbnails(hits)
        shown = [
            SearchHit(
                id=hit.row.digest,
                name=printable(Path(hit.path).name if hit.row.size < 0 else hit.key),
                score=hit.score,
                parts=hit.parts,
                captions=[printable(text) for text in hit.captions],
                state=hit.state,
                thumbnail=f"/thumbnails/{hit.row.digest}" if hit.state == "ok" else None,
            )
            for hit in hits
        ]
        return SearchResponse(hits=shown, images=len(model.worker.index))

    @app.get(
        "/thumbnails/{image}",
        tags=["blip2"],
        summary="A small JPEG of an image that a search has found",
        responses={200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
    )
    async def thumbnails(image: str) -> Response:
        data, state = await asyncio.to_thread(read, server.row(image))
        if data is None:
            raise RequestError(404, f"this image is {state} since it was indexed", code=state)
        try:
            small = await server.decode(lambda: thumbnail(data))
        except BadSampleError:
            raise RequestError(404, "this image cannot be decoded any more", code="changed") from None
        return Response(small, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})


def _body(shape: type[Given]) -> dict[str, Any]:
    """OpenAPI's description of a body that is JSON, or a form whose `image` is a file."""
    schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    form = {**schema, "properties": {**schema["properties"], "image": {"type": "string", "format": "binary"}}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
