"""Shapes of requests and answers; OpenAI's where they are its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from blip2.server.errors import bad

TEXT = 4000  # characters of a text
Text = Annotated[str, Field(max_length=TEXT)]
Image = Annotated[str, Field(description="data:image/jpeg;base64,... (PNG and WebP too), or an allowed https URL")]
BEAMS = 10
INPUTS = 256  # of one request for embeddings


class Given(BaseModel):
    """A request; fields that are not known are left alone, as OpenAI's clients send many."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @field_validator("*", mode="after")
    @classmethod
    def _unicode(cls, value: Any) -> Any:
        """JSON can spell half of a surrogate pair, which no tokenizer takes."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError("text is not valid Unicode (half of a surrogate pair)")
        return value


class Problem(BaseModel):
    """What went wrong, in one line."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's shape of an error."""

    error: Problem


class Chosen(Given):
    """A request that one of the served models answers."""

    model: str | None = Field(default=None, max_length=200, description="default: the first one")


class Decoding(Chosen):
    """How text is generated; beam search unless `sample`."""

    beams: int = Field(default=5, ge=1, le=BEAMS)
    min_tokens: int | None = Field(default=None, ge=0, le=128)
    max_tokens: int | None = Field(default=None, ge=1, description="longer than the server allows is cut to that")
    length_penalty: float | None = Field(default=None, ge=-10, le=10)
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=10)
    sample: bool = False
    top_p: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=1.0, ge=0.01, le=10)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)


class CaptionRequest(Decoding):
    """An image to caption; `num` captions, best first."""

    image: Image
    prompt: Text | None = Field(None, description="text that the caption continues; default: the model's")
    num: int = Field(1, ge=1, le=BEAMS)


class Caption(BaseModel):
    """A caption; `score` is the ITM probability that it describes the image, where the model learned ITM.

    `similarity` is its ITC cosine with the image, where the model has a stage 1.
    """

    text: str
    score: float | None
    similarity: float | None


class CaptionResponse(BaseModel):
    """Captions, best first."""

    model: str
    captions: list[Caption]


class Turn(Given):
    """An earlier question and its answer."""

    question: Text
    answer: Text


class AskRequest(Decoding):
    """A question about an image, perhaps after others."""

    image: Image
    question: Annotated[str, Field(min_length=1, max_length=TEXT)]
    history: list[Turn] = Field([], max_length=64)


class AskResponse(BaseModel):
    """An answer."""

    model: str
    question: str
    answer: str


class SearchRequest(Given):
    """Text, image, or both to search the server's index for."""

    text: Text | None = None
    image: Image | None = None
    k: int = Field(20, ge=1, le=200)
    rerank: int = Field(0, ge=0, le=256, description="best candidates of a text re-ranked by ITM; slower")
    within: Literal["images", "captions", "both"] = "images"


class SearchHit(BaseModel):
    """A found image; `thumbnail` is a path on this server, None where the file is gone or changed."""

    id: str
    name: str
    score: float
    parts: dict[str, float]
    captions: list[str]
    state: str
    thumbnail: str | None


class SearchResponse(BaseModel):
    """Images found, best first."""

    hits: list[SearchHit]
    images: int


class AttendRequest(Chosen):
    """An image to look into; with a text, what ITC and ITM make of it."""

    image: Image
    text: Text | None = None


class ImageUrl(Given):
    """OpenAI's image part."""

    url: str


class Part(Given):
    """A part of a message: `text`, `image_url` or `video_url`; others may lie in turns that are left out."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None
    video_url: ImageUrl | str | None = None


class Message(Given):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class StreamOptions(Given):
    """OpenAI's."""

    include_usage: bool | None = False


class ChatRequest(Given):
    """OpenAI's chat completion. Without `temperature` (or at 0) beam search, else nucleus sampling."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=BEAMS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    beams: int = Field(5, ge=1, le=BEAMS, description="not OpenAI's: width of the beam search")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        """Refuse by name what would change the answer; what would not is ignored."""
        if isinstance(values, dict):
            for name, reason in _unsupported(values):
                raise bad(f"{name}: {reason}: leave it out", name, "unsupported_parameter")
        return values


def is_data_url(text: str) -> bool:
    """Whether an input of embeddings is an image; an address is not, it may stand in front of a text."""
    return text[:40].lstrip().lower().startswith("data:image/")


def _unsupported(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields of a chat request that cannot be followed, with the reason."""
    if values.get("tool_choice") != "none" and values.get("function_call") != "none":
        for name in ("tools", "functions"):
            if values.get(name):
                yield name, "this model calls no tools"
        if values.get("tool_choice") not in (None, "auto"):
            yield "tool_choice", "this model calls no tools"
    form = values.get("response_format")
    if form and (not isinstance(form, dict) or form.get("type") != "text"):
        yield "response_format", "this model writes plain text"
    for name in ("logprobs", "top_logprobs"):
        if values.get(name):
            yield name, "log-probabilities are not given"
    if values.get("logit_bias"):
        yield "logit_bias", "probabilities cannot be changed"
    if values.get("audio") or values.get("modalities") not in (None, ["text"], []):
        yield "modalities", "this model writes text alone"


class EmbeddingRequest(Given):
    """OpenAI's embeddings; an input that is a data URL is an image.

    `pooling` (not OpenAI's): an image's query vectors as their mean, of unit norm, or `all` of them one
    behind the other (`shape` says how many).
    """

    model: str
    input: str | list[str] = Field(description=f"at most {INPUTS} at a time")
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "all"] = "mean"

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, given: Any) -> Any:
        """Say what was sent in place of texts."""
        inputs = given if isinstance(given, list) else [given]
        if not inputs:
            raise ValueError("an empty list: send one text or more")
        if any(
            isinstance(item, int) or (isinstance(item, list) and item and isinstance(item[0], int)) for item in inputs
        ):
            raise ValueError(
                "token ids are those of another model: send text (with LangChain, set check_embedding_ctx_length=False)"
            )
        if len(inputs) > INPUTS:
            raise ValueError(f"{len(inputs)} inputs: send at most {INPUTS} at a time")
        for number, item in enumerate(inputs):
            which = f"input {number} is" if isinstance(given, list) else "it is"
            if not isinstance(item, str):
                raise ValueError(f"{which} no text")
            if not item.strip():
                raise ValueError(f"{which} empty")
            if len(item) > TEXT and not is_data_url(item):
                raise ValueError(f"{which} {len(item)} characters long: at most {TEXT}")
        return given
