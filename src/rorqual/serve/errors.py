"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """What a client did, or what became of its request, in a status and a sentence."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        # A client's own words may hold half characters, which no answer could be sent with.
        self.message, self.param = _sendable(message), None if param is None else _sendable(param)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def on_invalid(_: Request, error: Exception) -> JSONResponse:
    """The first thing wrong with a body, by name, and all that could have stood there instead."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        why = found[0].get("ctx", {}).get("error", found[0]["msg"])
        return ApiError(400, f"the body is not valid JSON: {why}").response()
    places = [_place(e, error.body) for e in found]
    # Of the kinds of value that may stand there, that which fits the deepest is the one that was meant.
    meant = max((p for p in places if p[: len(places[0])] == places[0]), key=len)
    messages = dict.fromkeys(
        e["msg"].removeprefix("Value error, ") for e, place in zip(found, places, strict=True) if place == meant
    )
    param, message = ".".join(meant) or None, "; or ".join(messages)
    return ApiError(400, f"{param}: {message}" if param else message, param=param).response()


async def on_http(_: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such path, no such method, a body that could not be read to its end."""
    if isinstance(error.__cause__, ApiError):
        return error.__cause__.response()
    status = getattr(error, "status_code", 500)
    return ApiError(status, str(getattr(error, "detail", error)), **(getattr(error, "headers", None) or {})).response()


async def on_bug(_: Request, error: Exception) -> JSONResponse:
    """What nobody foresaw; the log has the rest."""
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says how").response()


def _place(error: dict[str, Any], body: Any) -> list[str]:
    """Where in the body an error lies, without pydantic's names for the kinds of value that it tried there."""
    place, value = [], body
    for part in (part for part in error["loc"] if part != "body"):
        if part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int):
            value = value[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        place.append(str(part))
    return place


def _sendable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
