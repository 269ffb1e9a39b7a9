"""The guard before every route: authentication, origins, and limits on size and time.

- The Host header must be a name of this server, so that a web page whose name an attacker points to
  127.0.0.1 (DNS rebinding) is refused. IP addresses need no DNS and are accepted.
- A request from a web page of another origin (Origin, Sec-Fetch-Site) may change nothing, unless that
  origin is allowed: a page elsewhere must not use a model here without its reader's knowledge.
- Where there are API keys, every request must carry one of them: as a bearer token, as x-api-key
  (Anthropic's clients), or as the cookie that the chat page received for it. Only hashes are stored, and
  they are compared in constant time.
- A body has a maximum length and a time limit for its arrival. The protocol class does the same for headers.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Body, Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tercet.serve.errors import APIError, Disconnected, queue_full
from tercet.serve.settings import Settings, hash_key

COOKIE = "tercet_session"
OPEN = ("/", "/health", "/page/login")  # paths that need no key
HEADER_BYTES = 32 << 10  # of a request's first line and headers together
CHANGES = ("POST", "PUT", "PATCH", "DELETE")
_LOOPBACK = ("localhost", "localhost.localdomain")

router = APIRouter(include_in_schema=False)


class Guard:
    """Middleware that passes a request on with its whole body, or answers it with an error."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI event."""
        if scope["type"] == "websocket":
            return  # there are no websocket routes
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._inside += 1
        try:
            self._check(scope)
            body = await self._read(scope, receive)
        except APIError as problem:
            await problem.response(scope["path"])(scope, receive, send)
        except Disconnected:
            pass
        else:
            await self.app(scope, _replay(body, receive), send)
        finally:
            self._inside -= 1

    def _check(self, scope: Scope) -> None:
        headers, settings = Headers(scope=scope), self.settings
        if self._inside > settings.max_requests:
            raise queue_full(
                f"{settings.max_requests} requests are being answered; send this one again later"
            )
        host = _host(headers)
        if not host_allowed(host, settings):
            raise APIError(
                403,
                f"{host:.100} is not a host name of this server; add it to the server's setting `allow_host`",
                "permission_error",
                code="host_not_allowed",
            )
        if scope["method"] in CHANGES and not same_site(headers, settings):
            raise APIError(
                403,
                "web pages of other origins may not use this server; add the origin to its setting `allow_origin`",
                "permission_error",
                code="origin_not_allowed",
            )
        if settings.keys and not _is_open(scope["path"]) and not key_given(headers, settings):
            raise APIError(
                401,
                "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Read the whole body, so that nothing behind this guard waits for a slow client."""
        limit = self.settings.max_body
        length = Headers(scope=scope).get("content-length", "0")
        too_long = length.isdigit() and int(length) > limit
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    part = message.get("body", b"")
                    size += len(part)
                    too_long = too_long or size > limit
                    if not too_long:
                        parts.append(part)
                    # Most clients read no answer before they have sent everything, so read on, up to a limit.
                    if not message.get("more_body") or size > 4 * limit:
                        break
        except TimeoutError:
            raise APIError(
                408,
                f"the body did not arrive within {self.settings.read_timeout:g} s",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None
        if too_long:
            raise APIError(
                413,
                f"the body is longer than the {limit} bytes that this server accepts (its setting `max_body`)",
                code="request_too_large",
                headers={"connection": "close"},
            )
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    replayed = False

    async def again() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()  # the disconnect, when it comes
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(headers: Headers) -> str:
    """Return the Host header's name, in lower case without its port; "" where there is none or several."""
    values = headers.getlist("host")
    if len(values) != 1:
        return ""
    try:
        return urlsplit(f"//{values[0]}").hostname or ""
    except ValueError:
        return ""


def host_allowed(host: str, settings: Settings) -> bool:
    """Return whether ``host`` can only mean this server."""
    if host in _LOOPBACK or host == settings.host or host in settings.allowed_hosts:
        return bool(host)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def same_site(headers: Headers, settings: Settings) -> bool:
    """Return whether a request comes from no web page, or from one of this server or an allowed origin."""
    origin = headers.get("origin")
    if origin is not None:
        allowed = settings.allowed_origins
        return origin in allowed or "*" in allowed or _same_origin(origin, headers)
    return headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def _same_origin(origin: str, headers: Headers) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""
    except ValueError:
        return False


def _is_open(path: str) -> bool:
    """Return whether a path needs no key; the page's own files contain nothing secret."""
    return path in OPEN or (path.startswith("/page/") and not path.startswith("/page/api"))


def key_given(headers: Headers, settings: Settings) -> bool:
    """Return whether the request carries one of the server's keys, as itself or as the page's cookie."""
    candidates = []
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        candidates.append(token.strip())
    if "x-api-key" in headers:
        candidates.append(headers["x-api-key"])
    # Every key is compared, so that the time reveals nothing about which of them matched.
    matches = [
        hmac.compare_digest(hash_key(candidate), key) for candidate in candidates for key in settings.keys
    ]
    session = _session(headers)
    if session is not None:
        matches += [hmac.compare_digest(session, session_of(key).encode()) for key in settings.keys]
    return any(matches)


def session_of(key: bytes) -> str:
    """Return the value of the page's cookie for a key; the key cannot be derived from it."""
    return hmac.new(key, b"tercet page session", sha256).hexdigest()


def _session(headers: Headers) -> bytes | None:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return None if cookie is None else cookie.value.encode("utf-8", "surrogateescape")


@router.get("/page/login")
async def login_state(request: Request) -> dict[str, bool]:
    """Return whether a key is needed, and whether this browser has sent one."""
    settings: Settings = request.app.state.settings
    needed = bool(settings.keys)
    return {"needed": needed, "given": not needed or key_given(request.headers, settings)}


@router.post("/page/login")
async def login(
    request: Request, response: Response, key: Annotated[str, Body(embed=True)]
) -> dict[str, bool]:
    """Accept a key and set the cookie that stands for it from now on."""
    settings: Settings = request.app.state.settings
    matches = [known for known in settings.keys if hmac.compare_digest(hash_key(key), known)]
    if settings.keys and not matches:
        raise APIError(
            401, "this is not a key of this server", "authentication_error", code="invalid_api_key"
        )
    for known in matches:
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, session_of(known), max_age=30 * 86400, httponly=True, samesite="strict", secure=secure
        )
    return {"given": True}


@router.post("/page/logout")
async def logout(response: Response) -> dict[str, bool]:
    """Delete the cookie."""
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return {"given": False}


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """Return a class of uvicorn's HTTP protocol with a time limit for headers.

    uvicorn's own `timeout_keep_alive` ends with their first byte.
    """

    class TimedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm()
            elif not self.transport.is_closing():
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Answer a request that h11 cannot parse with an error in the API's shape."""
            body = json.dumps(APIError(400, "the request is not valid HTTP").body()).encode()
            _write_400(self, body)

        def _arm(self) -> None:
            """Start the time limit at the first byte of a request; later bytes do not extend it."""
            if self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self._give_up)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            idle = self.cycle is None or self.cycle.response_complete
            if idle and not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol


def _write_400(protocol: H11Protocol, body: bytes) -> None:
    import h11

    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    events: list[Any] = [
        h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
        h11.Data(data=body),
        h11.EndOfMessage(),
    ]
    if protocol.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
        for event in events:
            protocol.transport.write(protocol.conn.send(event))
    protocol.transport.close()
