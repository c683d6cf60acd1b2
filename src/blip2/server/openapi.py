"""The OpenAPI document: what FastAPI finds, and the answers and parts of bodies that it cannot know of."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from blip2.server.schemas import AskRequest, AttendRequest, CaptionRequest, ErrorBody, Given, SearchRequest

# Bodies that routes read themselves, as JSON or as a form.
_OWN: tuple[type[Given], ...] = (CaptionRequest, AskRequest, AttendRequest, SearchRequest)
_REF = "#/components/schemas/{model}"
_ALWAYS = {401: "the key is missing or wrong", 403: "the host or the page that asks is refused"}
_POST = {
    400: "the request or its image cannot be used",
    404: "no such model, or no index",
    408: "the body did not arrive in time",
    413: "too many bytes or pixels",
    415: "neither JSON nor a form, or an image of another type",
    429: "too many requests wait; Retry-After says when to come again",
    500: "the server failed",
    503: "the index or the disk failed, or the server stops",
    504: "no answer within the time limit",
}
_GET = {
    "/healthz": {503: "the server stops"},
    "/v1/models/{model}": {404: "no such model"},
    "/thumbnails/{image}": {404: "no search has found this image, or it has changed"},
}


def register_routes(app: FastAPI) -> None:
    """Complete the document where the application first makes it."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(make())
        found: dict[str, Any] = make()
        return found

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    parts = document["components"]["schemas"]
    shapes: tuple[type[BaseModel], ...] = (*_OWN, ErrorBody)
    for shape in shapes:
        parts.update(_parts(shape))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answers = operation["responses"]
            answers.pop("422", None)  # FastAPI's own, which is answered as 400
            errors = _ALWAYS | (_POST if method == "post" else _GET.get(path, {}))
            answers.update({str(status): _answer(text) for status, text in errors.items()})
    for unused in ("HTTPValidationError", "ValidationError"):
        parts.pop(unused, None)


def _parts(shape: type[BaseModel]) -> dict[str, Any]:
    """A model's schema and those that it refers to, by name."""
    schema = shape.model_json_schema(ref_template=_REF)
    inner: dict[str, Any] = schema.pop("$defs", {})
    return {**inner, shape.__name__: schema}


def _answer(text: str) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=ErrorBody.__name__)}
    return {"description": text, "content": {"application/json": {"schema": schema}}}
