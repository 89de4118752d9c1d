"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from typing import TypedDict

from fastapi import Request
from fastapi.responses import JSONResponse

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorJson(TypedDict):
    error: ErrorFields


class ApiError(Exception):
    """An HTTP status and an error message of one sentence."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        # A client's text may hold lone surrogates, which cannot be encoded.
        self.message, self.param = _escaped(message), None if param is None else _escaped(param)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> ErrorJson:
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def on_http(_: Request, error: Exception) -> JSONResponse:
    """Starlette's own errors: unknown path or method."""
    status = getattr(error, "status_code", 500)
    return ApiError(status, str(getattr(error, "detail", error)), **(getattr(error, "headers", None) or {})).response()


async def on_bug(_: Request, error: Exception) -> JSONResponse:
    """Unexpected exceptions; the log has the traceback."""
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says how").response()


def _escaped(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
