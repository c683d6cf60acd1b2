"""The page at `/` and the API's documentation at `/docs`: static files of this package, nothing from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from blip2.io.html import environment

_STATIC = Path(__file__).parent / "static"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/static/page.css": ("page.css", "text/css; charset=utf-8"),
    "/static/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def register_routes(app: FastAPI) -> None:
    """Add the page's files, read once, and the documentation made from the OpenAPI document."""
    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, _file((_STATIC / name).read_bytes(), kind), include_in_schema=False)
    docs: list[str] = []

    async def documentation() -> Response:
        if not docs:
            docs.append(_documentation(app.openapi()))
        return Response(docs[0], media_type="text/html; charset=utf-8")

    app.add_api_route("/docs", documentation, include_in_schema=False)


def _file(data: bytes, kind: str) -> Any:
    async def answer() -> Response:
        return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

    return answer


def _documentation(document: dict[str, Any]) -> str:
    template = environment(_STATIC).get_template("docs.html.j2")
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
    return template.render(info=document["info"], operations=operations)


def _schema(operation: dict[str, Any], document: dict[str, Any]) -> Any:
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"].get(name, schema) if name else schema
