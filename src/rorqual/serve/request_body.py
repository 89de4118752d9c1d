"""Parse and validate request bodies: one JSON object, strict types, no unknown fields."""

import difflib
import json
from collections.abc import Callable, Coroutine
from email.message import Message
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from rorqual.data.tool_formats import DEEPEST, too_deep
from rorqual.serve.api_errors import ApiError
from rorqual.serve.background import kind_of, run_in_background
from rorqual.unicode_checks import whole_inside

ModelT = TypeVar("ModelT", bound=BaseModel)
# The parser holds the GIL, and so the engine: a quarter of a second for 8 MiB of short numbers.
MAX_VALUES = 1 << 18
SYNC_BYTES = 1 << 15  # parsed in the event loop; longer bodies in a thread
REMEDIES = {
    "audio": "this server returns text only",
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
    """A route whose body is JSON whatever its Content-Type (curl -d sends that of a form), parsed by `parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        model = self.body_field.field_info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)

        async def handle(request: Request) -> Response:
            try:
                raw = await request.body()
            except ClientDisconnect:
                return Response(status_code=499)
            headers = request.headers
            if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
                raise ApiError(415, f"Content-Encoding {encoding}: send the body as it is", "Content-Encoding")
            work = partial(parse_body, raw, model, headers.get("content-type", ""))
            body = work() if len(raw) <= SYNC_BYTES else await run_in_background(work, kind_of(len(raw)))
            return await answer(ParsedRequest(request, body))

        return handle


class ParsedRequest(Request):
    """A request whose body is parsed: its JSON is the model's instance, which FastAPI accepts unchanged."""

    def __init__(self, request: Request, body: BaseModel) -> None:
        others = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        headers = [*others, (b"content-type", b"application/json")]
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._instance = body

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> BaseModel:
        return self._instance


def parse_body(raw: bytes, model: type[ModelT], content_type: str = "") -> ModelT:
    """Parse and validate a body. Raises ApiError, which names the field and the values allowed."""
    parsed = _parse_object(raw, content_type)
    try:
        return model.model_validate(parsed)
    except ValidationError as e:
        raise _validation_error(e, model, parsed) from None


def _parse_object(raw: bytes, content_type: str) -> dict[str, Any]:
    about = Message()
    about["Content-Type"] = content_type
    charset = str(about.get_param("charset") or "utf-8").lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, f"Content-Type has charset {charset}; send JSON in UTF-8", "Content-Type")
    if not raw.strip():
        raise ApiError(400, "the body is empty; send a JSON object")
    try:
        _check_size(raw)
        parsed = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
    except UnicodeDecodeError as e:
        raise ApiError(400, f"the body is not UTF-8 (byte {e.start})") from None
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {DEEPEST} deep") from None
    except ValueError as e:
        kind = about.get_content_type()
        form = f" (Content-Type: {kind})" if content_type and not kind.endswith("json") else ""
        raise ApiError(400, f"the body is not valid JSON{form}: {e}") from None
    if not isinstance(parsed, dict):
        raise ApiError(400, "the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and too_deep(parsed):
        raise ApiError(400, f"the body is nested more than {DEEPEST} deep")
    if b"\\u" in raw:
        _check_characters(parsed)
    return parsed


def _check_size(raw: bytes) -> None:
    """Raises ApiError for too many values, estimated by the commas and brackets outside strings."""
    if raw.count(b",") + raw.count(b"[") <= MAX_VALUES:
        return
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    letters = np.frombuffer(raw, dtype=np.uint8)
    outside = np.bitwise_xor.accumulate((letters == ord('"')).view(np.uint8)) == 0
    if int(((letters == ord(",")) | (letters == ord("[")))[outside].sum()) > MAX_VALUES:
        raise ApiError(413, f"the body has more than {MAX_VALUES} values; send less at a time, or texts for token ids")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"{twice}: the field is given twice; leave one out", twice)
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_characters(parsed: dict[str, Any]) -> None:
    """Raises ApiError for lone surrogates, which cannot be encoded."""
    for name, value in parsed.items():
        if not whole_inside([name, value]):
            raise ApiError(400, f"{name} holds half a character (a lone surrogate); send whole ones", name)


def _validation_error(error: ValidationError, model: type[BaseModel], parsed: object) -> ApiError:
    """The first error, with its field and every alternative allowed there."""
    found = error.errors(include_url=False)
    paths = [_field_path(e, parsed) for e in found]
    # Of a union's members, the one that fits the deepest is the one that was meant.
    meant = max((p for p in paths if p[: len(paths[0])] == paths[0]), key=len)
    here = [e for e, path in zip(found, paths, strict=True) if path == meant]
    param = ".".join(meant) or None
    if here[0]["type"] == "extra_forbidden":
        return _unknown_field(meant, model)
    message = "; or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in here))
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _unknown_field(path: list[str], model: type[BaseModel]) -> ApiError:
    remedy = ""
    if len(path) == 1:
        similar = difflib.get_close_matches(path[0], model.model_fields, n=1)
        remedy = REMEDIES.get(path[0]) or (f"did you mean {similar[0]}?" if similar else "")
    param = ".".join(path)
    return ApiError(400, f"{param}: this server knows no such field; {remedy or 'leave it out'}", param)


def _field_path(error: ErrorDetails, body: object) -> list[str]:
    """The path of the field in the body, without pydantic's names of the union members that it tried."""
    path: list[str] = []
    value = body
    for part in error["loc"]:
        match value, part:
            case dict(), _ if part in value:
                value = value[part]
            case list(), int():
                value = value[part]
            case _ if error["type"] == "missing" and part == error["loc"][-1]:
                pass
            case _:
                continue
        path.append(str(part))
    return path
