"""The page at `/`, and the OpenAPI document with the page at `/docs` made from it; nothing from another origin."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse

from blip2.io.html import environment
from blip2.server.schemas import AskRequest, ErrorBody

_STATIC = Path(__file__).parent / "static"
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
    """Add the page's files, the OpenAPI document and the page made from it."""
    for path, name in (("/", "page.html"), ("/static/page.css", "page.css"), ("/static/page.js", "page.js")):
        app.add_api_route(path, _file(_STATIC / name), include_in_schema=False)

    @cache
    def document() -> dict[str, Any]:
        return _document(app)

    @cache
    def page() -> str:
        return _page(document())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page())

    app.openapi = document  # type: ignore[method-assign]


def _file(path: Path) -> Any:
    async def answer() -> FileResponse:
        return FileResponse(path, headers={"Cache-Control": "no-cache"})

    return answer


def _document(app: FastAPI) -> dict[str, Any]:
    """What FastAPI finds, and the refusals and parts of bodies that it cannot know of."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    parts = document["components"]["schemas"]
    for shape in (AskRequest, ErrorBody):
        schema = shape.model_json_schema(ref_template=_REF)
        parts |= {**schema.pop("$defs"), shape.__name__: schema}
    for unused in ("HTTPValidationError", "ValidationError"):
        parts.pop(unused, None)
    error = {"application/json": {"schema": {"$ref": _REF.format(model="ErrorBody")}}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operation["responses"].pop("422", None)  # FastAPI's own, which is answered as 400
            for status, text in (_ALWAYS | (_POST if method == "post" else _GET.get(path, {}))).items():
                operation["responses"][str(status)] = {"description": text, "content": error}
    return document


def _page(document: dict[str, Any]) -> str:
    operations = [
        {
            "method": method.upper(),
            "path": path,
            "summary": operation.get("summary", ""),
            "kinds": list(operation.get("requestBody", {}).get("content", {})),
            "schema": json.dumps(_schema(operation, document), indent=2),
            "has_body": "requestBody" in operation,
        }
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return environment(_STATIC).get_template("docs.html.j2").render(info=document["info"], operations=operations)


def _schema(operation: dict[str, Any], document: dict[str, Any]) -> Any:
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema
