"""What goes wrong, as OpenAI's protocol says it: ``{"error": {message, type, param, code}}``.

Raise `APIError` anywhere below a route; what the engine and the tokenizer raise as UserError becomes a 400.
Nothing that a client sends may end as a 500: those are our own mistakes, logged and told without details.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tercet.engine.engine import QueueFull
from tercet.errors import ContextOverflow, UserError

log = logging.getLogger("tercet.serve")

INVALID = "invalid_request_error"
RETRY_AFTER = 1  # seconds; a queue that was full a second ago has usually moved on


class ErrorObject(BaseModel):
    """What is wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorObject


# For the OpenAPI document: the errors that any route may give.
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


class APIError(Exception):
    """An answer that is an error. ``headers``: more of them, for the HTTP answer."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """All four keys, as the contract wants them."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP answer."""
        # ASCII: a message may quote what no UTF-8 can express.
        return Response(
            json.dumps(self.body()), self.status, headers=self.headers, media_type="application/json"
        )


# Codes of a 400
BAD_SCHEMA = "invalid_function_parameters"
UNSUPPORTED = "unsupported_parameter"


def invalid_value(param: str, problem: str, code: str = "invalid_value") -> APIError:
    """Return the 400 for a parameter with a wrong value: ``problem`` completes the sentence "PARAM ..."."""
    return APIError(400, f"{param} {problem}", param=param, code=code)


def missing_parameter(param: str) -> APIError:
    """Return the 400 for a parameter that is missing."""
    return APIError(400, f"{param} is missing", param=param, code="missing_required_parameter")


def unknown_parameter(param: str) -> APIError:
    """Return the 400 for a parameter that this server does not know."""
    return APIError(400, f"{param} is not a known parameter", param=param, code="unknown_parameter")


def unsupported(param: str, reason: str) -> APIError:
    """Return the 400 for a parameter that would change the output and is not supported."""
    return APIError(400, f"{param} is not supported: {reason}", param=param, code=UNSUPPORTED)


def check_keys(entry: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise APIError 400 for the first key of ``entry`` that is not ``known``."""
    for name in entry:
        if name not in known:
            raise unknown_parameter(f"{where}.{name}")


class Disconnected(Exception):
    """The client has gone; nobody reads an answer."""


def from_user_error(problem: UserError, param: str | None = None) -> APIError:
    """The API's form of a mistake that the engine, the tokenizer or a model's server found."""
    if isinstance(problem, QueueFull):
        return queue_full(str(problem))
    if not isinstance(problem, ContextOverflow):
        return APIError(400, str(problem), param=param, code="invalid_value")
    message = str(problem)
    if problem.limit is not None and param is not None:  # OpenAI's words: some clients search for them
        message = (
            f"This model's maximum context length is {problem.limit} tokens. However, your {param} resulted in "
            f"{problem.tokens} tokens. Please reduce the length of the {param}."
        )
    return APIError(400, message, param=param, code="context_length_exceeded")


def queue_full(message: str) -> APIError:
    """429: come back in a moment."""
    headers = {"retry-after": str(RETRY_AFTER)}
    return APIError(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=headers)


def server_error() -> APIError:
    """500, for what is our own mistake."""
    return APIError(500, "the server failed on this request; its log says more", "server_error")


def api_error(problem: BaseException) -> APIError:
    """Any exception as an error of the API; what is unexpected is logged."""
    if isinstance(problem, APIError):
        return problem
    if isinstance(problem, UserError):
        return from_user_error(problem)
    log.error("unexpected %s", type(problem).__name__, exc_info=problem)
    return server_error()


def add_error_handlers(app: FastAPI) -> None:
    """Every error of every route in one shape."""

    def ours(request: Request, problem: Exception) -> Response:
        return api_error(problem).response()

    def gone(request: Request, problem: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for it; only the metrics see it

    def framework(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        return _of_framework(request, problem).response()

    def invalid(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError)
        return from_validation(problem.errors(), problem.body).response()

    app.add_exception_handler(APIError, ours)
    app.add_exception_handler(UserError, ours)
    app.add_exception_handler(Disconnected, gone)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, invalid)


def _of_framework(request: Request, problem: HTTPException) -> APIError:
    """What the router and the reader of bodies raise."""
    method, path = request.method, request.url.path
    if problem.status_code == 404:
        return APIError(404, f"there is no {method} {path} here", code="unknown_url")
    if problem.status_code == 405:
        allowed = (problem.headers or {}).get("Allow", "")
        return APIError(
            405,
            f"{path} does not take {method}; it takes {allowed or 'another method'}",
            code="method_not_allowed",
            headers=problem.headers,
        )
    message = str(problem.detail)
    if problem.status_code == 400:  # nested too deeply, a number too long, not UTF-8
        message = "the body can't be read as JSON"
    return APIError(problem.status_code, message, code="invalid_json", headers=problem.headers)


# What pydantic found

_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """The one of pydantic's errors that tells most, with the place as ``messages[0].role``."""
    placed = [(_place(error, body), error) for error in errors]
    # Of a union every member complains; the one that came furthest is the one that was meant, and one
    # that takes the type at all rather than another.
    place, error = max(placed, key=lambda one: (len(one[0]), not str(one[1]["type"]).endswith("_type")))
    param = _path(place)
    kind = str(error["type"])
    if kind == "json_invalid":
        why = str(error.get("ctx", {}).get("error", "")).lower()
        return APIError(400, f"the body is not JSON: {why}", code="invalid_json")
    if not param:
        if isinstance(body, bytes):
            message = "the body must be JSON, sent with the header content-type: application/json"
        else:
            message = "the body must be a JSON object"
        return APIError(400, message, code="invalid_json")
    if kind == "missing":
        return APIError(400, f"{param} is missing", param=param, code=_CODES[kind])
    if kind == "extra_forbidden":
        message = f"{param} is not a parameter of this endpoint"
        return APIError(400, message, param=param, code=_CODES[kind])
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return APIError(400, f"{param} {message[:1].lower()}{message[1:]}"[:1000], param=param, code=code)


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Keys and indices down to the error, without the names that pydantic gives to members of unions."""
    found: list[str | int] = []
    kind, *path = error["loc"]
    if kind != "body":
        return [*path]
    if error["type"] == "json_invalid":
        return []
    here: Any = body
    for number, step in enumerate(path):
        last = number == len(path) - 1
        if isinstance(here, dict) and (step in here or (last and error["type"] == "missing")):
            found.append(step)
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            found.append(step)
            here = here[step]
    return found


def _path(place: Sequence[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")
