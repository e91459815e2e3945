"""The endpoint: OpenAI's chat and plain completions; the name of the model picks the client.

https://platform.openai.com/docs/api-reference/chat
"""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from pomona.data.row import Turn
from pomona.errors import PomonaError
from pomona.serving.answering import Answer, Answering, Served
from pomona.serving.asked import Asked, check_room, prompt_tokens

NEW_TOKENS = 256
"""Of an answer whose length nobody has given."""


class TextPart(BaseModel):
    """A part of a message: text, the only kind there is."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def turn(self) -> Turn:
        """Role and text as rows have them."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        return role, content if isinstance(content, str) else "".join(part.text for part in content)


class _Drawn(BaseModel):
    """What both kinds of requests say; what is not known here is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    n: Literal[1] = 1
    user: str | None = None

    def asked(self, prompt: Sequence[int], new_tokens: int) -> Asked:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Asked(
            tuple(prompt),
            new_tokens,
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            secrets.randbits(32) if self.seed is None else self.seed % (1 << 63),
            tuple(stop),
        )

    @property
    def counts(self) -> bool:
        """Whether a stream is to end with its number of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatRequest(_Drawn):
    """A request for /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionRequest(_Drawn):
    """A request for /v1/completions: `prompt` is taken as it is, without a template."""

    prompt: str


def endpoint(answering: Answering) -> FastAPI:
    """Return the application that serves every model of `answering`."""
    app = FastAPI(title="Pomona", openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _refused(400, f"{where}: {first['msg']}", where or None)

    @app.exception_handler(PomonaError)
    async def mistaken(_request: Request, error: PomonaError) -> Response:
        return _refused(400, str(error), None)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        listed = [_model(name) for name in answering.models]
        return {"object": "list", "data": listed}

    @app.get("/v1/models/{name}")
    def model(name: str) -> Response:
        unknown = _unknown(answering, name)
        return JSONResponse(_model(name)) if unknown is None else unknown

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        unknown = _unknown(answering, asked.model)
        if unknown is not None:
            return unknown
        served = answering.models[asked.model]
        new_tokens = asked.max_completion_tokens or asked.max_tokens or NEW_TOKENS
        turns = [message.turn for message in asked.messages]
        room = _room(served, new_tokens)
        prompt = prompt_tokens(turns, served.template, answering.tokenizer, room)
        return await _answered(answering, request, asked, asked.asked(prompt, new_tokens), _Chat())

    @app.post("/v1/completions")
    async def complete(request: Request, asked: CompletionRequest) -> Response:
        unknown = _unknown(answering, asked.model)
        if unknown is not None:
            return unknown
        new_tokens = asked.max_tokens or 16  # OpenAI's own default
        room = _room(answering.models[asked.model], new_tokens)
        prompt = check_room(answering.tokenizer(asked.prompt)["input_ids"], room)
        return await _answered(answering, request, asked, asked.asked(prompt, new_tokens), _Plain())

    return app


def _room(served: Served, new_tokens: int) -> int:
    if new_tokens >= served.context:
        raise PomonaError(
            f"{new_tokens} new tokens leave no room for a prompt in the model's context of "
            f"{served.context}; ask for fewer"
        )
    return served.context - new_tokens


class _Chat:
    """How answers of a conversation are written: whole, and in pieces."""

    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        """Return what a whole answer is."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def piece(self, text: str | None) -> dict[str, Any]:
        """Return what a piece is; None ends."""
        return {"delta": {} if text is None else {"role": "assistant", "content": text}}


class _Plain:
    """How a text is gone on with."""

    kind, piece_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        """Return what a whole answer is."""
        return {"text": text}

    def piece(self, text: str | None) -> dict[str, Any]:
        """Return what a piece is; None ends."""
        return {"text": text or ""}


_Form = _Chat | _Plain


def _choice(told: dict[str, Any], end: str | None) -> dict[str, Any]:
    return {"index": 0, **told, "finish_reason": end, "logprobs": None}


async def _answered(
    answering: Answering, request: Request, told: _Drawn, asked: Asked, form: _Form
) -> Response:
    answer = answering.ask(told.model, asked)
    about = {
        "id": form.prefix + secrets.token_hex(12),
        "created": int(time.time()),
        "model": told.model,
    }
    if told.stream:
        pieces = _stream(answer, about, form, told.counts)
        return StreamingResponse(pieces, media_type="text/event-stream")
    try:
        text = await to_thread.run_sync(lambda: "".join(answer), limiter=_whole_answers())
    except PomonaError as error:
        return _refused(503, str(error), None)
    whole = {**about, "object": form.kind, "choices": [_choice(form.whole(text), answer.end)]}
    return JSONResponse({**whole, "usage": _usage(answer)})


@cache
def _whole_answers() -> CapacityLimiter:
    """Threads that wait for whole answers, beside those of streams: neither starves the other."""
    return CapacityLimiter(256)


def _stream(answer: Answer, about: dict[str, Any], form: _Form, counts: bool) -> Iterator[str]:
    """Yield server-sent events; a client that goes away ends its answer."""
    about = {**about, "object": form.piece_kind}
    try:
        for piece in answer:
            yield _event({**about, "choices": [_choice(form.piece(piece), None)]})
        yield _event({**about, "choices": [_choice(form.piece(None), answer.end)]})
        if counts:
            yield _event({**about, "choices": [], "usage": _usage(answer)})
    except PomonaError as error:
        yield _event({"error": {"message": str(error), "type": "server_error"}})
    finally:
        answer.cancelled = True
    yield "data: [DONE]\n\n"


def _event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    asked, said = len(answer.asked.prompt), len(answer.tokens)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "pomona"}


def _unknown(answering: Answering, name: str) -> Response | None:
    if name in answering.models:
        return None
    known = ", ".join(answering.models)
    told = f'there is no model "{name}"; there are {known}'
    return _refused(404, told, "model", "model_not_found")


def _refused(status: int, message: str, param: str | None, code: str | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)
