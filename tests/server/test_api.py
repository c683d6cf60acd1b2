"""The API over a tiny random model: OpenAI's client, the server's own routes, and what they refuse."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blip2.inference import Blip2

Serve = Callable[..., Any]


def encoded(seed: int = 0, kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((64, 48), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def url(seed: int = 0) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(encoded(seed)).decode()}"


def user(text: str | None = None, image: str | None = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    parts += [{"type": "text", "text": text}] if text else []
    return {"role": "user", "content": parts}


def assert_refused(answer: Any, status: int | None = None) -> dict[str, Any]:
    assert 400 <= answer.status_code < 500, answer.text
    assert status is None or answer.status_code == status
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@contextmanager
def held(app: Any) -> Iterator[list[int]]:
    """The model does not answer inside; gives the sizes of the batches that it has begun."""
    gate, batcher, begun = threading.Event(), app.state.server.models[0].batcher, []
    run = batcher._run

    def waiting(kind: Any, items: Any) -> Any:
        begun.append(len(items))
        gate.wait(60)
        return run(kind, items)

    batcher._run = waiting
    try:
        yield begun
    finally:
        gate.set()
        batcher._run = run


# -- OpenAI --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai(both: Blip2, listening: Any) -> Iterator[Any]:
    """OpenAI's client of a real server that asks for a key."""
    package = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    with listening(both, api_key="secret") as (address, _, _):
        yield package.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)


def test_openai_chat_answers_as_the_model(openai: Any, both: Blip2) -> None:
    answer = openai.chat.completions.create(
        model="tiny", messages=[user("what is it?", url())], max_tokens=10, temperature=0
    )
    assert answer.choices[0].message.content == both.ask([encoded()], ["what is it?"])[0]
    usage = answer.usage
    prompt = both.config.language.question.format("what is it?")
    assert usage.prompt_tokens == 5 + int(both.language_tokenizer.prompts([prompt])[1].sum())
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens > 0


def test_openai_stream_gives_the_same_text_in_pieces(openai: Any) -> None:
    given = {"model": "tiny", "messages": [user(image=url(1))], "max_tokens": 20}
    whole = openai.chat.completions.create(**given)
    chunks = list(openai.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_openai_follow_up_is_folded_into_the_prompt(openai: Any, both: Blip2) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        user("what?", url()),
        {"role": "assistant", "content": "a bird"},
        user("where?"),
    ]
    answer = openai.chat.completions.create(model="tiny", messages=messages, max_tokens=10)
    ask = both.config.language.question.format
    prompt = f"{ask('what?')} a bird. {ask('where?')}"
    from blip2.configs import DecodingConfig

    decoding = DecodingConfig(min_tokens=1, max_tokens=10, length_penalty=-1.0)
    expected = both.generate(both.features([encoded()]), [prompt], decoding, questions=["where?"])
    assert answer.choices[0].message.content == expected[0][0]


def test_openai_embeddings_of_texts_and_images(openai: Any, both: Blip2) -> None:
    response = openai.embeddings.create(model="tiny", input=["a dog", url(), "two cats"])  # base64 on the wire
    vectors = torch.tensor([entry.embedding for entry in response.data])
    image = F.normalize(both.embed_images([encoded()]).mean(dim=1), dim=-1)
    expected = torch.cat([both.embed_texts(["a dog"]), image, both.embed_texts(["two cats"])])
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    every = openai.embeddings.create(model="tiny", input=url(), extra_body={"pooling": "all"}, encoding_format="float")
    torch.testing.assert_close(
        torch.tensor(every.data[0].embedding).view(every.data[0].shape), both.embed_images([encoded()])[0]
    )


def test_openai_models_and_errors(openai: Any) -> None:
    import openai as package

    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").owned_by == "blip2"
    with pytest.raises(package.NotFoundError):
        openai.chat.completions.create(model="gpt-4o", messages=[user("what?", url())])
    with pytest.raises(package.BadRequestError, match="none has an image"):
        openai.chat.completions.create(model="tiny", messages=[user("what?")])
    with pytest.raises(package.AuthenticationError):
        openai.with_options(api_key="wrong").models.list()


def test_seeded_samples_repeat(serve: Serve) -> None:
    client = serve()
    given = {"model": "tiny", "messages": [user("what?", url())], "temperature": 1.0, "n": 3}
    answers = [client.post("/v1/chat/completions", json={**given, "seed": seed}).json() for seed in (1, 1, 2)]
    texts = [[choice["message"]["content"] for choice in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1] != texts[2]


# -- the server's own routes -----------------------------------------------------------------------------


def test_caption_by_form_and_by_json(serve: Serve, both: Blip2) -> None:
    client = serve()
    by_json = client.post("/caption", json={"image": url(), "num": 3}).json()["captions"]
    form = {"files": {"image": ("a.jpg", encoded(), "image/jpeg")}, "data": {"num": "3"}}
    assert client.post("/caption", **form).json()["captions"] == by_json
    assert [c["text"] for c in by_json] == both.caption([encoded()], num=3)[0]
    scores = both.match([encoded()] * 3, [c["text"] for c in by_json])
    np.testing.assert_allclose([c["score"] for c in by_json], scores, atol=1e-5)
    itc_scores = both.similarity([encoded()], [c["text"] for c in by_json])[0]
    np.testing.assert_allclose([c["similarity"] for c in by_json], itc_scores, atol=1e-5)


def test_what_was_never_learned_is_not_shown(serve: Serve, both: Blip2, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probability of an ITM head at its random start would mean nothing."""
    config = both.config
    never = dataclasses.replace(config, loss=dataclasses.replace(config.loss, itm=0.0))
    monkeypatch.setattr(both, "_stage1_config", never)
    client = serve()
    assert client.get("/v1/models").json()["data"][0]["blip2"]["judge"] is False
    caption = client.post("/caption", json={"image": url(), "num": 2}).json()["captions"][0]
    assert caption["score"] is None
    assert -1 <= caption["similarity"] <= 1
    maps = client.post("/attend", json={"image": url(), "text": "a dog"}).json()
    assert maps["itm"] is maps["itm_map"] is None
    assert maps["itc_map"] is not None


def test_ask_with_history(serve: Serve, both: Blip2) -> None:
    client = serve()
    assert (
        client.post("/ask", json={"image": url(), "question": "what?"}).json()["answer"]
        == both.ask([encoded()], ["what?"])[0]
    )
    history = [{"question": "what?", "answer": "a bird"}]
    by_json = client.post("/ask", json={"image": url(), "question": "where?", "history": history})
    form = {"files": {"image": encoded()}, "data": {"question": "where?", "history": json.dumps(history)}}
    assert client.post("/ask", **form).json() == by_json.json()


def test_history_without_room_loses_its_oldest_turns(serve: Serve) -> None:
    client = serve()
    turns = [{"question": "what is it?", "answer": "a dog on the grass"}] * 40
    answer = client.post("/ask", json={"image": url(), "question": "where?", "history": turns})
    assert answer.status_code == 200
    refused = client.post("/ask", json={"image": url(), "question": "where is it? " * 100})
    assert assert_refused(refused, 400)["code"] == "context_length_exceeded"


def test_attend_gives_maps_over_the_patches(serve: Serve, both: Blip2) -> None:
    answer = serve().post("/attend", json={"image": url(), "text": "a dog"}).json()
    attention = both.attend(encoded(), "a dog")
    np.testing.assert_allclose(answer["queries"], attention.heatmap(attention.queries), atol=1e-5)
    np.testing.assert_allclose(answer["itm_map"], attention.heatmap(attention.itm_maps.sum(0)), atol=1e-5)
    assert len(answer["words"]) == len(answer["word_maps"])


def test_a_stage_1_captions_and_answers_nothing(serve: Serve, stage1_only: Blip2) -> None:
    client = serve(model=stage1_only)
    captions = client.post("/caption", json={"image": url(), "max_tokens": 5}).json()["captions"]
    assert captions[0]["text"] == stage1_only.caption([encoded()], min_tokens=5, max_tokens=5)[0]
    assert "stage 1" in assert_refused(client.post("/ask", json={"image": url(), "question": "what?"}), 400)["message"]


def test_several_models_each_answer_by_their_name(serve: Serve, both: Blip2, stage1_only: Blip2) -> None:
    client = serve(others=[("second", stage1_only, None)])
    listed = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["blip2"]["ask"]) for model in listed] == [("tiny", True), ("second", False)]
    short = {"image": url(), "max_tokens": 5}
    models = {"tiny": both, "second": stage1_only, None: both, "blip2": both}
    for name, model in models.items():
        answer = client.post("/caption", json={**short, "model": name}).json()
        assert answer["model"] == ("tiny" if name in (None, "blip2") else name)
        assert answer["captions"][0]["text"] == model.caption([encoded()], min_tokens=5, max_tokens=5)[0]
    form = {"files": {"image": encoded()}, "data": {"model": "second", "max_tokens": "5"}}
    assert client.post("/caption", **form).json()["model"] == "second"
    assert client.post("/attend", json={"image": url(), "model": "second"}).json()["caption"] is None
    assert client.post("/v1/embeddings", json={"model": "second", "input": "a dog"}).json()["model"] == "second"
    question = {"image": url(), "question": "what?", "model": "second"}
    assert "stage 1" in assert_refused(client.post("/ask", json=question), 400)["message"]
    assert "'second'" in assert_refused(client.post("/ask", json={**question, "model": "third"}), 404)["message"]


def test_names_of_several_models() -> None:
    from blip2.cli.serve import model_names

    assert model_names(["a/blip", "b/blip", "org/other"]) == ["a/blip", "b/blip", "org/other"]  # hub ids stay
    assert model_names([".", "..", "."])[0] != model_names([".", "..", "."])[2]


def test_search_serves_thumbnails_of_its_hits_only(
    serve: Serve, stage1_only: Blip2, photos: Path, tmp_path: Path
) -> None:
    from blip2.search.build import Builder, list_samples
    from blip2.search.model_id import identify
    from blip2.search.query import Index
    from blip2.search.store import Store

    store = Store.create(tmp_path / "index", identify(stage1_only, "tiny"), "exact", "data")
    Builder(store, stage1_only, progress=False).add(list_samples([str(photos)]).samples)
    index = Index(store, stage1_only)
    client = serve(model=stage1_only, index=index)
    digest = next(row.digest for _, row in store.items())
    assert_refused(client.get(f"/thumbnails/{digest}"), 404)  # not found yet
    answer = client.post("/search", json={"text": "a dog on the grass", "k": 12}).json()
    hits = index.search("a dog on the grass", k=12, rerank=0)
    assert [hit["name"] for hit in answer["hits"]] == [Path(hit.path).name for hit in hits]
    assert str(photos) not in json.dumps(answer)
    small = client.get(answer["hits"][0]["thumbnail"])
    assert small.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(small.content)).size == (60, 48)
    for name in ("%2e%2e%2f%2e%2e%2fmanifest.json", "..%2fmanifest.json", "0" * 32, "%2fetc%2fpasswd", "%00", "//etc"):
        assert_refused(client.get(f"/thumbnails/{name}"))
    Path(hits[0].path).write_bytes(b"another file in its place")
    assert_refused(client.get(answer["hits"][0]["thumbnail"]), 404)
    by_image = client.post("/search", files={"image": encoded(kind="PNG")}, data={"k": "3"})
    assert len(by_image.json()["hits"]) == 3
    assert_refused(client.post("/search", json={}), 400)


# -- what is refused ---------------------------------------------------------------------------------------

BAD_BODIES: list[tuple[str, Any]] = [
    ("/caption", {}),
    ("/caption", []),
    ("/caption", {"image": None}),
    ("/caption", {"image": "x", "num": 99}),
    ("/caption", {"image": url(), "temperature": float("1e99")}),
    ("/caption", {"image": url(), "beams": 0}),
    ("/caption", {"image": "http://127.0.0.1/a.jpg"}),
    ("/caption", {"image": "https://example.com/a.jpg"}),
    ("/caption", {"image": "upload:"}),
    ("/ask", {"image": url()}),
    ("/ask", {"image": url(), "question": "  "}),
    ("/ask", {"image": url(), "question": "x" * 5000}),
    ("/ask", {"image": url(), "question": "what?", "history": "none"}),
    ("/attend", {"text": "a dog"}),
    ("/search", {"text": "a dog"}),
    ("/v1/embeddings", {"model": "tiny", "input": []}),
    ("/v1/embeddings", {"model": "tiny", "input": [[1, 2, 3]]}),
    ("/v1/embeddings", {"model": "tiny", "input": ""}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a dog", " "]}),
    ("/v1/embeddings", {"model": "tiny", "input": "a dog", "dimensions": 3}),
    ("/v1/embeddings", {"model": "tiny", "input": [url()] * 40}),
    ("/v1/chat/completions", {"model": "tiny", "messages": []}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "tool", "content": "a"}, user("a", url())]}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [user("a", "file:///etc/passwd")]}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [user("a", url())], "n": 0}),
]


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages), "max_tokens": 4, **fields}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "x" * 50_000}, user("what?", url())],
        [{"role": "developer", "content": [{"type": "input_audio"}]}, user("what?", url())],
        [user("x" * 50_000), {"role": "assistant", "content": "y" * 50_000}, user("what?", url())],
        [user("what?", url()), {"role": "assistant", "content": "y" * 50_000}, user("where?")],
        [
            user("what?", url()),
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            user("where?"),
        ],
        [{"role": "user", "content": [{"type": "file", "file": {}}]}, user("what?", url())],
        [{**user("a", url()), "content": user("a", url())["content"] * 2}, user("what?", url())],
        [user("what?", url()), *[{"role": "assistant", "content": "a"}, user("where?")] * 200],
        [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": url()}],
            }
        ],
        [
            {**user("what?", url()), "name": "me"},
            {"role": "assistant", "content": None, "refusal": "no"},
            user("where?"),
        ],
    ],
)
def test_histories_that_clients_replay(serve: Serve, messages: list[dict[str, Any]]) -> None:
    answer = serve().post("/v1/chat/completions", json=chat(*messages))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_what_would_make_the_answer_wrong_is_refused_by_name(serve: Serve, fields: dict[str, Any], name: str) -> None:
    answer = serve().post("/v1/chat/completions", json=chat(user("what?", url()), **fields))
    assert_refused(answer, 400)
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["message"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "logprobs": False, "top_logprobs": None, "logit_bias": {}},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "modalities": ["text"]},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "reasoning_effort": "low", "unheard_of": 1},
    ],
)
def test_what_loses_nothing_is_ignored(serve: Serve, fields: dict[str, Any]) -> None:
    assert serve().post("/v1/chat/completions", json=chat(user("what?", url()), **fields)).status_code == 200


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([1, 2, 3], "token ids are those of another model: send text (with LangChain, set check_embedding_ctx_length"),
        ([[1, 2], [3]], "token ids"),
        ([], "an empty list: send one text or more"),
        (["a"] * 300, "300 inputs: send at most 256 at a time"),
        (["a", "b" * 5000], "input 1 is 5000 characters long: at most 4000"),
        ("b" * 5000, "it is 5000 characters long"),
        (["a", ""], "input 1 is empty"),
        (["a", None], "input 1 is no text"),
        ({"a": 1}, "it is no text"),
        ("a \ud800", "text is not valid Unicode"),
        (["a", "\udfff"], "text is not valid Unicode"),
    ],
)
def test_what_is_wrong_with_inputs_of_embeddings_is_said(serve: Serve, given: Any, told: str) -> None:
    data = json.dumps({"model": "tiny", "input": given})
    answer = serve().post("/v1/embeddings", content=data, headers={"content-type": "application/json"})
    assert_refused(answer, 400)
    message = answer.json()["error"]["message"]
    assert message.startswith("input: ")
    assert told in message
    assert "\n" not in message


def test_a_text_that_begins_with_an_address_is_a_text(serve: Serve, both: Blip2) -> None:
    text = "https://example.com/dog.jpg shows a dog"
    data = serve().post("/v1/embeddings", json={"model": "tiny", "input": [text]}).json()["data"]
    torch.testing.assert_close(torch.tensor(data[0]["embedding"]), both.embed_texts([text])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (chat({"role": "user", "content": 5}), "messages.0.content: must be a string or a list"),
        (chat({"role": "user", "content": [{"text": "a"}]}), "messages.0.content.0.type: Field required"),
        (chat(user("what?", url()), stop=5), "stop: must be a string or a list"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": 5}]}), "image_url: must be "),
        (chat(user("x" * 5000, url())), "the question is 5000 characters long: at most 4000"),
        (chat(user("a \ud83d", url())), "text is not valid Unicode"),
        (chat({"role": "user", "content": [*user("a", url())["content"], {"type": "input_audio"}]}), "'input_audio'"),
    ],
)
def test_messages_about_unions_say_what_is_expected(serve: Serve, body: dict[str, Any], told: str) -> None:
    headers = {"content-type": "application/json"}
    answer = serve().post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert_refused(answer, 400)
    assert told in answer.json()["error"]["message"]


def test_bad_bodies_are_refused_in_openais_shape(serve: Serve) -> None:
    client = serve()
    for path, body in BAD_BODIES:
        assert_refused(client.post(path, json=body))
    headers = {"content-type": "application/json"}
    for data in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"image": "\\ud800"}', b"NaN", b'{"image": NaN}'):
        for path in ("/caption", "/v1/chat/completions"):
            assert_refused(client.post(path, content=data, headers=headers))
    for kind in ("text/plain", "multipart/form-data", "multipart/form-data; boundary=x", "image/jpeg"):
        assert_refused(client.post("/caption", content=encoded(), headers={"content-type": kind}))
    assert_refused(client.post("/caption", files={"other": encoded()}), 400)
    assert_refused(client.post("/caption", files={"image": b"<svg/>"}), 415)
    assert_refused(client.get("/no/such/page"), 404)
    assert_refused(client.get("/caption"), 405)
    assert client.get("/healthz").status_code == 200


def test_a_large_body_is_refused_before_it_is_read(serve: Serve) -> None:
    client = serve(max_body=10_000)
    assert_refused(client.post("/caption", files={"image": bytes(20_000)}), 413)

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(1000)

    assert_refused(client.post("/caption", content=pieces()), 413)  # no length declared


def test_the_key_is_asked_for(serve: Serve) -> None:
    client = serve(api_key="secret", host="0.0.0.0")
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/thumbnails/x"):
        assert_refused(client.get(path), 401)
    for header in ("Bearer wrong", "Basic secret", "secret", "Bearer", "Bearer \u00e9"):
        assert_refused(client.get("/v1/models", headers={"authorization": header.encode("latin-1")}), 401)
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get("/").status_code == client.get("/healthz").status_code == 200


def test_without_a_key_other_names_and_pages_are_refused(serve: Serve) -> None:
    client = serve()
    for host in ("evil.example", "127.0.0.1.evil.example", "192.168.1.5:8000", ""):
        assert_refused(client.get("/v1/models", headers={"host": host}), 403)
    for host in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9999"):
        assert_refused(client.post("/caption", json={"image": url()}, headers={"origin": origin}), 403)
    same = {"origin": "http://127.0.0.1:8000"}
    assert client.post("/caption", json={"image": url()}, headers=same).status_code == 200


def test_every_answer_has_the_security_headers(serve: Serve) -> None:
    client = serve()
    answers = [client.get(path) for path in ("/", "/docs", "/healthz", "/none", "/static/page.js", "/openapi.json")]
    answers.append(client.get("/", headers={"host": "evil.example"}))
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
    for path in ("/", "/docs"):
        assert not re.findall(r'(?:src|href|action)="(?!/|data:,)', client.get(path).text)  # nothing from elsewhere


def test_what_cannot_be_served_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from blip2.cli.main import main

    for arguments, word in (
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "example.com"], "--api-key"),
        (["--queue", "0"], "--queue"),
        (["--timeout", "0"], "--timeout"),
        (["--port", "99999"], "--port"),
    ):
        assert main(["serve", *arguments]) == 2
        said = capsys.readouterr().err.strip()
        assert word in said
        assert "\n" not in said


# -- under load ----------------------------------------------------------------------------------------------


def test_batched_answers_equal_those_one_at_a_time(both: Blip2, listening: Any) -> None:
    import httpx

    questions = ["what is it?", "where?", "what is the dog on the grass doing?", "a bird?"]
    work = [(seed, questions[seed % 4]) for seed in range(12)]
    expected = [both.ask([encoded(seed)], [question])[0] for seed, question in work]
    with listening(both) as (address, _, app), ThreadPoolExecutor(12) as pool:

        def ask(job: tuple[int, str]) -> str:
            body = {"image": url(job[0]), "question": job[1]}
            return str(httpx.post(f"{address}/ask", json=body, timeout=60).json()["answer"])

        batcher = app.state.server.models[0].batcher
        with held(app):
            first = pool.submit(ask, work[0])
            while not (batcher.alive and app.state.server.metrics.registry.get_sample_value("blip2_batch_size_count")):
                time.sleep(0.01)
            rest = [pool.submit(ask, job) for job in work[1:]]
            while batcher.waiting < 11:
                time.sleep(0.01)
        assert [answer.result() for answer in (first, *rest)] == expected
        metrics = httpx.get(f"{address}/metrics").text
    assert "blip2_batch_size_count 2.0" in metrics
    assert "blip2_batch_size_sum 12.0" in metrics
    assert 'blip2_requests_total{path="/ask",status="200"} 12.0' in metrics


def test_overload_and_time_limit(both: Blip2, listening: Any) -> None:
    import httpx

    with listening(both, queue=2, max_batch=1, timeout=4) as (address, _, app), ThreadPoolExecutor(8) as pool:

        def caption(seed: int) -> httpx.Response:
            return httpx.post(f"{address}/caption", json={"image": url(seed)}, timeout=60)

        with held(app):
            answers = [each.result() for each in [pool.submit(caption, seed) for seed in range(8)]]
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {429, 504}
        assert statuses.count(504) >= 3  # one with the model, two in the queue
        for answer in answers:
            assert answer.json()["error"]["message"]
            assert (answer.status_code == 429) == ("retry-after" in answer.headers)
        assert 200 in (caption(0).status_code for _ in range(10))  # it goes on


def test_a_client_that_leaves_frees_its_place(both: Blip2, listening: Any) -> None:
    import httpx

    with listening(both) as (address, _, app), ThreadPoolExecutor(1) as pool:
        batcher = app.state.server.models[0].batcher
        with held(app):
            first = pool.submit(httpx.post, f"{address}/caption", json={"image": url()}, timeout=60)
            while not app.state.server.metrics.registry.get_sample_value("blip2_batch_size_count"):
                time.sleep(0.01)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/caption", json={"image": url(1)}, timeout=httpx.Timeout(60, read=0.5))
            for _ in range(1000):
                if not batcher.waiting:
                    break
                time.sleep(0.01)
            assert batcher.waiting == 0
        assert first.result().status_code == 200
        assert app.state.server.metrics.registry.get_sample_value("blip2_batch_size_sum") == 1


def test_shutdown_answers_what_was_taken(both: Blip2, listening: Any) -> None:
    import httpx

    with listening(both) as (address, server, app), ThreadPoolExecutor(4) as pool:
        with held(app) as begun:
            answers = [
                pool.submit(httpx.post, f"{address}/caption", json={"image": url(seed)}, timeout=60)
                for seed in range(4)
            ]
            batcher = app.state.server.models[0].batcher
            while batcher.waiting + sum(begun) < 4:
                time.sleep(0.01)
            server.should_exit = True
            time.sleep(0.3)
        assert [answer.result().status_code for answer in answers] == [200] * 4
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/healthz")
