"""From a request to its fields and its picture: JSON with a data URL, or a form with an upload."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser

from blip2.server import url_fetch
from blip2.server.errors import RequestError, bad
from blip2.server.images import checked_image, from_data_url
from blip2.server.schemas import Given
from blip2.server.settings import Settings

M = TypeVar("M", bound=Given)
T = TypeVar("T")
UPLOAD = "upload:"  # stands in a form's fields for its file
_DECODING = 4  # pictures decoded at a time: each may take a few hundred MB


class Intake:
    """What reads requests, within the limits of the settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._decoding = asyncio.Semaphore(_DECODING)

    async def fields(self, request: Request, shape: type[M]) -> tuple[M, bytes | None]:
        """A request's fields and, from a form, the bytes of its file `image`.

        Raises:
            RequestError: 400 fields that cannot be used; 415 neither JSON nor a form.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        upload = None
        if kind == "multipart/form-data":
            values, upload = await self._form(request)
        elif kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
            try:
                values = json.loads(await request.body())
            except (ValueError, RecursionError):
                raise bad("the body is not valid JSON") from None
        else:
            raise RequestError(415, "send JSON (application/json) or a form (multipart/form-data)")
        try:
            return shape.model_validate(values), upload
        except ValidationError as error:
            raise from_validation(list(error.errors(include_url=False, include_input=False))) from None

    async def image(self, source: str, upload: bytes | None = None, param: str = "image") -> bytes:
        """The checked bytes of the picture that a field names.

        Raises:
            RequestError: 4xx, what is wrong with it.
        """
        if upload is not None and source == UPLOAD:
            return await self.aside(lambda: checked_image(upload, self.settings.max_pixels))
        if source[:8].lower().startswith(("http://", "https://")):
            if not self.settings.url_hosts:
                raise bad("this server fetches no remote images: send the image as a data URL", param, "url_refused")
            limit, seconds = self.settings.max_body, min(20.0, self.settings.timeout)
            hosts = self.settings.url_hosts
            data = await asyncio.to_thread(lambda: url_fetch.fetch(source, hosts, limit=limit, timeout=seconds))
            return await self.aside(lambda: checked_image(data, self.settings.max_pixels))
        return await self.aside(lambda: checked_image(from_data_url(source, param), self.settings.max_pixels))

    async def aside(self, work: Callable[[], T]) -> T:
        """Run work on pictures in a thread, a few at a time."""
        async with self._decoding:
            return await asyncio.to_thread(work)

    async def _form(self, request: Request) -> tuple[dict[str, Any], bytes | None]:
        parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=32, max_part_size=2**20)
        parser.spool_max_size = self.settings.max_body + 1  # uploads stay in memory
        try:
            form = await parser.parse()
        except Exception:  # python-multipart raises its own, Starlette its own
            raise bad("the form cannot be read: send multipart/form-data with one file `image`") from None
        values: dict[str, Any] = {}
        upload = None
        try:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "image":
                        raise bad("the file of a form must be named `image`", "image")
                    values["image"], upload = UPLOAD, await value.read()
                elif name == "history":
                    values[name] = _json(value, name)
                elif value != "":
                    values[name] = value
        finally:
            await form.close()
        return values, upload


def from_validation(errors: list[Any]) -> RequestError:
    """The first of pydantic's errors as a 400."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return bad(message[:500], where[:200] or None, "invalid_value")


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise bad(f"{name}: not valid JSON", name) from None
