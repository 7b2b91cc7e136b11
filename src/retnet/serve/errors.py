"""Errors as OpenAI's API words them: one envelope for ours, the framework's and the unforeseen."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from retnet.settings import UserError

_log = logging.getLogger("retnet.serve")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told instead of a result.

    Args:
        status: of HTTP.
        message: one sentence: the value, what is allowed, what to do.
        param: the field that is wrong.
        code: a word for programs.
        retry_after: seconds after which it may work.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def envelope(self) -> bytes:
        """As JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        inner = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": inner})

    def response(self) -> Response:
        """As the answer to a request."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.envelope(), self.status, headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """Any error as one that a client may see: a user's mistake as it is, what nobody foresaw without its inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def install_handlers(app: FastAPI) -> None:
    """Lets an application answer every error with the envelope."""

    async def known(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def framework(request: Request, error: Any) -> Response:  # noqa: ANN401
        if error.status_code == 404:
            message = (
                f"there is nothing at {request.method} {request.url.path}; /openapi.json lists what there is"
            )
        elif error.status_code == 405:
            message = f"{request.url.path} has no method {request.method}"
        else:
            message = str(error.detail)
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    async def invalid(request: Request, error: Any) -> Response:  # noqa: ANN401
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return ApiError(400, f"{name}: {first['msg']}, got {first.get('input')!r:.80}", param=name).response()

    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (ApiError, UserError, Exception):
        app.add_exception_handler(kind, known)
