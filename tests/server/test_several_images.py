"""Several images and films in one message, by OpenAI's client and by hand."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.data.test_film import needs_av, write_gif, write_video
from tests.server.test_api import assert_refused, encoded, url

from blip2.inference import Blip2

Serve = Callable[..., Any]


def film_url(path: Path) -> str:
    kind = "image/gif" if path.suffix == ".gif" else f"video/{path.suffix[1:]}"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def message(text: str, *media: str) -> dict[str, Any]:
    kinds = ["image_url" if link.startswith("data:image/jpeg") else "video_url" for link in media]
    parts = [{"type": kind, kind: {"url": link}} for kind, link in zip(kinds, media, strict=True)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ask(http: Any, *messages: dict[str, Any]) -> Any:
    body = {"model": "tiny", "messages": list(messages), "max_tokens": 10}
    return http.post("/v1/chat/completions", json=body)


def test_three_images_by_openais_client(both: Blip2, listening: Any, tmp_path: Path) -> None:
    package = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    film = write_gif(tmp_path / "film.gif", 8)
    with listening(both) as (address, _, _):
        client = package.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for media, sample in (
            ([url(0), url(1), url(2)], [encoded(0), encoded(1), encoded(2)]),
            ([film_url(film)], film),
            ([url(1), film_url(film)], [encoded(1), film]),
        ):
            messages = [message("what is it?", *media)]
            answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=10)
            assert answer.choices[0].message.content == both.answer(sample, "what is it?")
            images = 3 if len(media) == 3 else 4 + len(media) - 1
            prompt = both.config.language.question.format("what is it?")
            read = int(both.language_tokenizer.prompts([prompt])[1].sum())
            assert answer.usage.prompt_tokens == 5 * images + read
        # the next question is about the images of the last message that has any
        replayed = [message("what?", url(0), url(1)), {"role": "assistant", "content": "a bird"}, message("where?")]
        answer = client.chat.completions.create(model="tiny", messages=replayed, max_tokens=10)
        assert isinstance(answer.choices[0].message.content, str)
        caption = client.chat.completions.create(model="tiny", messages=[message("", url(0), url(1))], max_tokens=10)
        assert (
            caption.choices[0].message.content
            == both.caption([[encoded(0), encoded(1)]], min_tokens=8, max_tokens=10)[0]
        )


@needs_av
def test_a_video(serve: Serve, both: Blip2, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12)
    answer = ask(serve(), message("what is it?", film_url(path)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == both.answer(path, "what is it?")
    path.write_bytes(path.read_bytes()[:60] + bytes(200))
    error = assert_refused(ask(serve(), message("what?", film_url(path))), 400)
    assert (error["code"], "truncated or damaged" in error["message"]) == ("invalid_video", True)


def test_limits_and_errors(serve: Serve, tmp_path: Path) -> None:
    http = serve(max_images=5)
    film = film_url(write_gif(tmp_path / "film.gif", 8))
    assert ask(http, message("what?", url(0), film)).status_code == 200
    for media in ([film, url(0), url(1)], [film, film], [url(n) for n in range(6)]):
        error = assert_refused(ask(http, message("what?", *media)), 400)
        assert error["code"] == "too_many_images"
        assert "at most 5" in error["message"]
    # 20 images of 5 tokens are more than the 96 positions of the language model
    error = assert_refused(ask(serve(max_images=30), message("what?", *[url(n) for n in range(20)])), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == "20 images are 100 tokens: this model reads 96 in all"
    broken = "data:video/mp4;base64," + base64.b64encode(b"no film at all").decode()
    error = assert_refused(ask(http, message("what?", broken)), 400)
    assert (error["code"], error["message"]) == ("invalid_video", "video is no MP4, WebM, AVI or GIF")
    cut = "data:image/gif;base64," + base64.b64encode(base64.b64decode(film.split(",")[1])[:50]).decode()
    error = assert_refused(ask(http, message("what?", cut)), 400)
    assert error["code"] == "invalid_video"
    error = assert_refused(ask(http, message("what?", "https://example.org/a.mp4")), 400)
    assert error["code"] == "url_refused"
    assert_refused(ask(serve(max_images=1), message("what?", url(0), url(1))), 400)
