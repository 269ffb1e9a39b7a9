"""Errors in the shape of OpenAI's protocol: ``{"error": {message, type, param, code}}``.

Below ``/api/`` they have Ollama's shape: ``{"error": message}``.

Raise `APIError` anywhere below a route; a UserError of the engine or the tokenizer becomes a 400. No input of
a client may end as a 500: those are defects of the server, which are logged and answered without details.
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

OLLAMA_PATHS = "/api/"
INVALID = "invalid_request_error"
RETRY_AFTER = 1  # seconds; a full queue usually has a free place after this time


class ErrorObject(BaseModel):
    """The description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorObject


class ErrorText(BaseModel):
    """The body of an error in Ollama's shape."""

    error: str


# For the OpenAPI document: the errors of every route.
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


class APIError(Exception):
    """An error that becomes the HTTP answer. ``headers``: further headers of that answer."""

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
        """Return the JSON body, always with all four keys."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body_of(self, path: str) -> dict[str, Any]:
        """Return the JSON body in the shape of the protocol of ``path``."""
        return {"error": self.message} if path.startswith(OLLAMA_PATHS) else self.body()

    def response(self, path: str = "") -> Response:
        """Return the HTTP answer to a request of ``path``, whose protocol decides its shape."""
        # ASCII: a message may quote characters that UTF-8 cannot express.
        return Response(
            json.dumps(self.body_of(path)), self.status, headers=self.headers, media_type="application/json"
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
    return APIError(
        400, f"{param} is not a parameter of this endpoint", param=param, code="unknown_parameter"
    )


def unsupported(param: str, reason: str) -> APIError:
    """Return the 400 for a parameter that would change the output and is not supported."""
    return APIError(400, f"{param} is not supported: {reason}", param=param, code=UNSUPPORTED)


def check_keys(entry: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise APIError 400 for the first key of ``entry`` that is not ``known``."""
    for name in entry:
        if name not in known:
            raise unknown_parameter(f"{where}.{name}")


class Disconnected(Exception):
    """The client has disconnected, so nobody reads the answer."""


def from_user_error(problem: UserError, param: str | None = None) -> APIError:
    """Return the APIError for a UserError of the engine, the tokenizer or a hosted model.

    param: the parameter of the request that caused it.
    """
    if isinstance(problem, QueueFull):
        return queue_full(str(problem))
    if not isinstance(problem, ContextOverflow):
        return APIError(400, str(problem), param=param, code="invalid_value")
    message = str(problem)
    if problem.limit is not None and param is not None:  # OpenAI's words: clients match on them
        message = (
            f"This model's maximum context length is {problem.limit} tokens. However, your {param} resulted in "
            f"{problem.tokens} tokens. Please reduce the length of the {param}."
        )
    return APIError(400, message, param=param, code="context_length_exceeded")


def invalid_answer(reason: str) -> APIError:
    """Return the 400 for an answer that violates its schema in a way that no grammar can prevent."""
    return APIError(
        400,
        f"{reason}; no grammar can hold this part of the schema, so send the request again, or change the schema",
        code="json_validate_failed",
    )


def queue_full(message: str) -> APIError:
    """Return the 429 that invites the client to try again in a moment."""
    headers = {"retry-after": str(RETRY_AFTER)}
    return APIError(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=headers)


def server_error() -> APIError:
    """Return the 500 for a defect of the server."""
    return APIError(500, "the server failed on this request; see its log for details", "server_error")


def api_error(problem: BaseException) -> APIError:
    """Return the APIError for any exception; unexpected ones are logged."""
    if isinstance(problem, APIError):
        return problem
    if isinstance(problem, UserError):
        return from_user_error(problem)
    log.error("unexpected %s", type(problem).__name__, exc_info=problem)
    return server_error()


def add_error_handlers(app: FastAPI) -> None:
    """Give all errors of all routes the same shape."""

    def from_tercet(request: Request, problem: Exception) -> Response:
        return api_error(problem).response(request.url.path)

    def disconnected(request: Request, problem: Exception) -> Response:
        return Response(status_code=499)  # nginx's status for it; only the metrics record it

    def framework(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        error, near = _of_framework(request, problem)
        # An address of another protocol that is nearly right: its clients read its shape.
        return error.response(near or request.url.path)

    def invalid(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError)
        return from_validation(problem.errors(), problem.body).response(request.url.path)

    app.add_exception_handler(APIError, from_tercet)
    app.add_exception_handler(UserError, from_tercet)
    app.add_exception_handler(Disconnected, disconnected)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, invalid)


def _of_framework(request: Request, problem: HTTPException) -> tuple[APIError, str | None]:
    """Return the APIError for an exception of the router or of the parser of bodies, and the route that was meant."""
    method, path = request.method, request.url.path
    if problem.status_code == 404:
        near = right_route(path, list(request.app.openapi()["paths"]))
        hint = "" if near is None else f"; send it to {near}"
        return APIError(404, f"this server has no route {method} {path}{hint}", code="unknown_url"), near
    if problem.status_code == 405:
        allowed = (problem.headers or {}).get("Allow", "")
        error = APIError(
            405,
            f"{path} does not accept {method}; it accepts {allowed or 'another method'}",
            code="method_not_allowed",
            headers=problem.headers,
        )
        return error, None
    message = str(problem.detail)
    if problem.status_code == 400:  # nested too deeply, a number too long, not UTF-8
        message = "the body is not valid JSON"
    return APIError(problem.status_code, message, code="invalid_json", headers=problem.headers), None


def right_route(path: str, routes: Sequence[str]) -> str | None:
    """Return the route that a path without ``/v1``, or with too much before it, means; None for no such route."""
    steps = [step for step in path.split("/") if step]
    for begin in range(len(steps)):
        rest = "/".join(steps[begin:])
        for candidate in (f"/v1/{rest}", f"/{rest}"):
            if candidate in routes and candidate != path:
                return candidate
    return None


# Errors of pydantic


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """Return the most specific of pydantic's errors, with its place as ``messages[0].role``."""
    placed = [(_place(error, body), error) for error in errors]
    # Every member of a union reports an error. The deepest one belongs to the member that was meant; at equal
    # depth prefer a member that accepts the type.
    place, error = max(placed, key=lambda pair: (len(pair[0]), not str(pair[1]["type"]).endswith("_type")))
    param = _path(place)
    kind = str(error["type"])
    if kind == "json_invalid":
        reason = str(error.get("ctx", {}).get("error", "")).lower()
        return APIError(400, f"the body is not JSON: {reason}", code="invalid_json")
    if not param:
        if isinstance(body, bytes):
            message = "the body must be JSON, sent with the header content-type: application/json"
        else:
            message = "the body must be a JSON object"
        return APIError(400, message, code="invalid_json")
    if kind == "missing":
        return missing_parameter(param)
    if kind == "extra_forbidden":
        return unknown_parameter(param)
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return APIError(400, f"{param} {message[:1].lower()}{message[1:]}"[:1000], param=param, code=code)


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return keys and indices down to the error, without pydantic's names of the members of unions."""
    place: list[str | int] = []
    kind, *path = error["loc"]
    if kind != "body":
        return [*path]
    if error["type"] == "json_invalid":
        return []
    value: Any = body
    for number, step in enumerate(path):
        last = number == len(path) - 1
        if isinstance(value, dict) and (step in value or (last and error["type"] == "missing")):
            place.append(step)
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            place.append(step)
            value = value[step]
    return place


def _path(place: Sequence[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")
