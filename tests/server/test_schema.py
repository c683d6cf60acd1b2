"""What the OpenAPI document promises, held against a real server by schemathesis: no 5xx, no undocumented answer."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2.inference import Blip2
from blip2.search.build import Builder, list_samples
from blip2.search.model_id import identify
from blip2.search.query import Index
from blip2.search.store import Store

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (make setup)")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402  (schemathesis brings it along)
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

EXAMPLES = int(os.environ.get("BLIP2_SCHEMA_EXAMPLES", "15"))
PATIENT = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# A document cannot say which text is an image, nor that numbers may come as text, as they do in forms.
NOT_MEANT = [openapi_checks.positive_data_acceptance, openapi_checks.negative_data_rejection]
pytestmark = pytest.mark.slow


def picture() -> str:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


URL = picture()


@pytest.fixture(scope="module")
def api(both: Blip2, listening: Any) -> Iterator[Any]:
    """The document of a server over a tiny random model."""
    with listening(both) as (address, _, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.fixture
def search_api(stage1_only: Blip2, listening: Any, photos: Path, tmp_path: Path) -> Iterator[Any]:
    """The document of a server with an index."""
    store = Store.create(tmp_path / "index", identify(stage1_only, "tiny"), "exact", "data")
    Builder(store, stage1_only, progress=False).add(list_samples([str(photos)]).samples)
    with listening(stage1_only, index=Index(store, stage1_only)) as (address, _, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


def with_pictures(value: Any, key: str = "") -> Any:
    """A body whose images are a real one, so that the rest of it reaches the model."""
    if isinstance(value, dict):
        return {name: with_pictures(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_pictures(inner, key) for inner in value]
    if isinstance(value, str) and key in ("image", "url"):
        return URL
    return "blip2" if isinstance(value, str) and key == "model" else value


def failures(operations: Any, prepare: Callable[[Any], None] = lambda case: None) -> dict[str, str]:
    """What is wrong, by operation; each is sent requests that fit its document, then such as do not."""
    wrong = {}
    for result in operations:
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @PATIENT
            def ask(case: Any) -> None:
                prepare(case)
                case.call_and_validate(timeout=120, excluded_checks=NOT_MEANT)

            try:
                ask()
            except Unsatisfiable:  # there is no wrong request to a route without parameters
                continue
            except (Exception, BaseExceptionGroup) as error:
                wrong[f"{mode} {operation.label}"] = "\n".join(
                    [str(error), *map(str, getattr(error, "exceptions", []))]
                )
    return wrong


def use_pictures(case: Any) -> None:
    if case.media_type == "application/json":
        case.body = with_pictures(case.body)


def test_every_answer_is_documented(api: Any) -> None:
    assert failures(api.get_all_operations()) == {}


def test_bodies_that_reach_the_model(api: Any) -> None:
    assert failures(api.include(method="POST").get_all_operations(), use_pictures) == {}


def test_searches(search_api: Any) -> None:
    operations = search_api.include(path_regex="^/(search|thumbnails)").get_all_operations()
    assert failures(operations, use_pictures) == {}


def test_the_document_is_complete(both: Blip2, serve: Any) -> None:
    """Every reference leads somewhere, and no answer is promised that is not given."""
    document = serve().get("/openapi.json").json()
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in document["components"]["schemas"]
    assert "422" not in text
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert {"200", "401", "403"} <= set(operation["responses"]), path
            assert ("429" in operation["responses"]) == (method == "post")
