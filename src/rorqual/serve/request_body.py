"""From a request's bytes to what they say: one JSON object, read strictly, every field of it known."""

import difflib
import json
from collections.abc import Awaitable, Callable
from email.message import Message
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from rorqual.data.tool_formats import DEEPEST, too_deep
from rorqual.serve.api_errors import ApiError
from rorqual.serve.background import kind_of, run_in_background
from rorqual.unicode_checks import whole_inside

M = TypeVar("M", bound=BaseModel)
# The parser keeps the interpreter to itself, and the engine waiting: a quarter of a second for 8 MiB of short numbers.
MOST_VALUES = 1 << 18
SHORT = 1 << 15  # bytes that are read at once; longer bodies are read aside
REMEDIES = {
    "audio": "only text is spoken here",
    "chat_template": "the template is the model's own; chat_template_kwargs sets what it reads",
    "enable_thinking": "send chat_template_kwargs",
    "function_call": "send tool_choice",
    "functions": "send tools",
    "grammar": "send structured_outputs",
    "guided_choice": "send structured_outputs",
    "guided_grammar": "send structured_outputs",
    "guided_json": "send structured_outputs",
    "guided_regex": "send structured_outputs",
    "json_schema": "send response_format",
    "n_predict": "send max_tokens",
    "regex": "send structured_outputs",
    "thinking": "send chat_template_kwargs, or thinking_budget",
}


class JsonRoute(APIRoute):
    """Its body is JSON whatever Content-Type says (curl -d says that it is a form), and checked by `checked`."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]

        async def read(request: Request) -> Response:
            try:
                raw = await request.body()
            except ClientDisconnect:
                return Response(status_code=499)
            headers = request.headers
            if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
                raise ApiError(415, f"Content-Encoding {encoding}: send the body as it is", "Content-Encoding")
            work = partial(checked, raw, model, headers.get("content-type", ""))
            body = work() if len(raw) <= SHORT else await run_in_background(work, kind_of(len(raw)))
            return await answer(Read(request, body))

        return read


class Read(Request):
    """A request whose body has been read: FastAPI finds the model's instance as its JSON, and takes it as it is."""

    def __init__(self, request: Request, body: BaseModel) -> None:
        others = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        super().__init__(request.scope | {"headers": [*others, (b"content-type", b"application/json")]},
                         request.receive)  # fmt: skip
        self._instance = body

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Any:
        return self._instance


def checked(raw: bytes, model: type[M], content_type: str = "") -> M:
    """What a body says. Raises ApiError, which names the field and what may stand there."""
    said = _object(raw, content_type)
    try:
        return model.model_validate(said)
    except ValidationError as e:
        raise _refusal(e, model, said) from None


def _object(raw: bytes, content_type: str) -> dict[str, Any]:
    about = Message()
    about["Content-Type"] = content_type
    charset = str(about.get_param("charset") or "utf-8").lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, f"Content-Type says charset {charset}; JSON is sent in UTF-8", "Content-Type")
    if not raw.strip():
        raise ApiError(400, "the body is empty; send a JSON object")
    try:
        _check_size(raw)
        said = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as e:
        raise ApiError(400, f"the body is not UTF-8 (byte {e.start})") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {DEEPEST} deep") from None
    except ValueError as e:
        kind = about.get_content_type()
        form = f" (Content-Type: {kind})" if content_type and not kind.endswith("json") else ""
        raise ApiError(400, f"the body is not valid JSON{form}: {e}") from None
    if not isinstance(said, dict):
        raise ApiError(400, "the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and too_deep(said):
        raise ApiError(400, f"the body is nested more than {DEEPEST} deep")
    if b"\\u" in raw:
        _check_characters(said)
    return said


def _check_size(raw: bytes) -> None:
    """Raises ApiError for too many values. Commas tell how many there are, but for those within texts."""
    if raw.count(b",") + raw.count(b"[") <= MOST_VALUES:
        return
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    letters = np.frombuffer(raw, dtype=np.uint8)
    outside = np.bitwise_xor.accumulate((letters == ord('"')).view(np.uint8)) == 0
    if int(((letters == ord(",")) | (letters == ord("[")))[outside].sum()) > MOST_VALUES:
        raise ApiError(413, f"the body has more than {MOST_VALUES} values; send less at a time, or texts for token ids")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"{twice}: the field is there twice; leave one out", twice)
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_characters(said: dict[str, Any]) -> None:
    """Raises ApiError for half a character, which no text holds."""
    for name, value in said.items():
        if not whole_inside([name, value]):
            raise ApiError(400, f"{name} holds half a character (a lone surrogate); send whole ones", name)


def _refusal(error: ValidationError, model: type[BaseModel], said: Any) -> ApiError:
    """The first thing wrong, by name, and all that could have stood there instead."""
    found = error.errors(include_url=False)
    places = [_place(e, said) for e in found]
    # Of the kinds of value that may stand there, that which fits the deepest is the one that was meant.
    meant = max((p for p in places if p[: len(places[0])] == places[0]), key=len)
    here = [e for e, place in zip(found, places, strict=True) if place == meant]
    param = ".".join(meant) or None
    if here[0]["type"] == "extra_forbidden":
        return _unknown(meant, model)
    message = "; or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in here))
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _unknown(place: list[str], model: type[BaseModel]) -> ApiError:
    remedy = ""
    if len(place) == 1:
        alike = difflib.get_close_matches(place[0], model.model_fields, n=1)
        remedy = REMEDIES.get(place[0]) or (f"did you mean {alike[0]}?" if alike else "")
    param = ".".join(place)
    return ApiError(400, f"{param}: this server knows no such field; {remedy or 'leave it out'}", param)


def _place(error: Any, body: Any) -> list[str]:
    """Where in the body an error lies, without pydantic's names for the kinds of value that it tried there."""
    place, value = [], body
    for part in error["loc"]:
        if part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int):
            value = value[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        place.append(str(part))
    return place
