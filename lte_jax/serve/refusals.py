"""What is refused before it is answered, and how: all errors in the form of OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from lte_jax.errors import UserError
from lte_jax.serve.protocol import refusal

_KINDS = {"str", "int", "float"}  # as pydantic names the alternatives of a union


class Refused(HTTPException):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "")
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        super().__init__(status, refusal(message, param, code or None, kind), headers)


def tell(app: FastAPI) -> None:
    """All errors in the form of OpenAI's."""

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> Response:
        body = error.detail if isinstance(error.detail, dict) else refusal(str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(_wrong(error.errors()), 400)


def _wrong(errors: Sequence[Any]) -> dict[str, Any]:
    """The refusal of a body: of what pydantic finds wrong, the deepest, as unions find more."""
    worst = max(errors, key=lambda e: len(e["loc"]))
    # Of a union, pydantic names the alternative as well: "list[str]", "function-after[...]".
    names = [str(part) for part in worst["loc"][1:]]
    place = ".".join(n for n in names if n.isidentifier() and n not in _KINDS or n.isdigit())
    message = f"{place or 'body'}: {worst['msg']}"
    if worst["type"] == "extra_forbidden":
        message = f"{place}: unknown, or not supported"
    return refusal(str(UserError(message)), place.partition(".")[0] or None)


class Bounded:
    """Refuses bodies that are too long, before they are read."""

    def __init__(self, app, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send) -> None:
        """As ASGI calls an application."""
        seen = 0

        async def bounded():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise self._refused()
            return message

        if scope["type"] == "http":
            said = dict(scope["headers"]).get(b"content-length", b"0")
            if said.isdigit() and int(said) > self.most:
                refused = self._refused()
                await JSONResponse(refused.detail, 413)(scope, receive, send)
                return
        await self.app(scope, bounded, send)

    def _refused(self) -> Refused:
        return Refused(413, f"the body is too long: expected at most {self.most} bytes")
