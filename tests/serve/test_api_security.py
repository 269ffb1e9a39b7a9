"""Attacks from the network, from a web page on the same machine, and through a request's text."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from running_server import Running, client_of, local_model, serve_models, slow_model
from tool_templates import PLAIN, tokenizer_with

from tercet.serve.models import Models
from tercet.serve.settings import Settings, hash_key

HI: Any = [{"role": "user", "content": "hi"}]
KEY, OTHER = "sesame-open-1234", "another-key-5678"
ASK = {"model": "tiny", "messages": HI, "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(tiny_directory: Path) -> Iterator[Running]:
    """Start a server with two keys."""
    settings = Settings(keys=(hash_key(KEY), hash_key(OTHER)))
    with serve_models(Models([local_model("tiny", tiny_directory)]), settings) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(tiny_directory: Path) -> Iterator[Running]:
    """Start a server that accepts 2,000 bytes within half a second; one other origin may call it."""
    settings = Settings(
        max_body=2000,
        read_timeout=0.5,
        allowed_hosts=("models.lan",),
        allowed_origins=("https://mine.example",),
    )
    with serve_models(Models([local_model("tiny", tiny_directory)]), settings) as running:
        yield running


def raw(url: str, data: bytes, *more: bytes, wait: float = 0.0) -> bytes:
    """Send these bytes; return the answer up to the end of the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        for part in more:
            time.sleep(wait)
            try:
                connection.sendall(part)
            except OSError:
                break
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except (ConnectionResetError, TimeoutError):
            pass
        return received


# API keys


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_each_key_opens_the_server(locked: Running, key: str) -> None:
    assert locked.client(api_key=key).models.list().data
    assert locked.http(headers={"x-api-key": key}).get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"authorization": "Bearer wrong-key-0000"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY},
        {"authorization": "Bearer"}, {"x-api-key": KEY + "x"}, {"x-api-key": hash_key(KEY).hex()},
        {"cookie": f"tercet_session={KEY}"}, {"cookie": f"tercet_session={hash_key(KEY).hex()}"},
    ],
)  # fmt: skip
def test_without_a_valid_key_nothing_is_revealed(locked: Running, headers: dict[str, str]) -> None:
    http = locked.http(headers=headers)
    for method, path in (
        ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/nothing"),
        ("POST", "/tokenize"), ("GET", "/openapi.json"), ("GET", "/page/api/conversations"),
    ):  # fmt: skip
        answer = http.request(method, path)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer" and "tiny" not in answer.text


def test_openais_client_takes_a_wrong_key_for_what_it_is(locked: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        locked.client().models.list()


def test_health_needs_no_key(locked: Running) -> None:
    assert locked.http().get("/health").json() == {"status": "ok"}


def test_the_page_gets_a_cookie_for_the_key_that_no_script_and_no_other_site_can_use(locked: Running) -> None:
    with locked.http() as http:
        assert http.get("/page/login").json() == {"needed": True, "given": False}
        assert http.post("/page/login", json={"key": "wrong-key-0000"}).status_code == 401
        answer = http.post("/page/login", json={"key": KEY})
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and KEY not in cookie
        assert hash_key(KEY).hex() not in cookie
        assert http.get("/v1/models").status_code == 200
        assert http.get("/page/login").json() == {"needed": True, "given": True}
        http.post("/page/logout")
        assert http.get("/v1/models").status_code == 401


# The browser of a user who visits a malicious page


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.example", "", "a b"],
)
def test_dns_rebinding_is_refused(tiny_url: str, host: str) -> None:
    for path in ("/v1/models", "/", "/page/api/conversations", "/health"):
        answer = httpx.get(tiny_url + path, headers={"host": host})
        assert answer.status_code in (400, 403)
        if host != "a b":
            error = answer.json()["error"]
            assert error["code"] == "host_not_allowed" and "`allow_host`" in error["message"]


def test_names_of_this_machine_addresses_and_allowed_names_are_hosts(narrow: Running) -> None:
    for host in (
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:1",
        "[::1]:8000",
        "192.168.3.4",
        "models.lan",
        "Models.Lan:5",
    ):
        assert narrow.http(headers={"host": host}).get("/v1/models").status_code == 200, host


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"},
        {"origin": "http://localhost"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
        {"origin": "https://mine.example.evil.example"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/page/api/conversations", "/page/login"])
def test_csrf_a_page_of_another_origin_can_change_nothing(
    narrow: Running, path: str, headers: dict[str, str]
) -> None:
    for kind in ("application/json", "text/plain"):
        answer = narrow.http(headers=headers | {"content-type": kind}).post(path, content=json.dumps(ASK))
        error = answer.json()["error"]
        assert answer.status_code == 403 and error["code"] == "origin_not_allowed"
        assert "`allow_origin`" in error["message"]
        assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_page_may_send_requests(narrow: Running) -> None:
    headers = {"origin": narrow.url, "sec-fetch-site": "same-origin"}
    assert narrow.http(headers=headers).post("/v1/chat/completions", json=ASK).status_code == 200


def test_cors_is_off_but_for_the_origin_that_was_allowed(tiny_url: str, narrow: Running) -> None:
    mine = {"origin": "https://mine.example"}
    preflight = mine | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    closed = httpx.options(f"{tiny_url}/v1/chat/completions", headers=preflight)
    assert closed.status_code == 405 and "access-control-allow-origin" not in closed.headers
    assert "access-control-allow-origin" not in httpx.get(f"{tiny_url}/v1/models", headers=mine).headers
    http = narrow.http()
    opened = http.options("/v1/chat/completions", headers=preflight)
    assert opened.status_code == 200 and opened.headers["access-control-allow-origin"] == mine["origin"]
    answer = http.post("/v1/chat/completions", json=ASK, headers=mine)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == mine["origin"]
    evil = http.options("/v1/chat/completions", headers=preflight | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in evil.headers


# Requests that exceed a limit


def test_an_oversized_body_is_413_with_and_without_a_content_length(narrow: Running) -> None:
    body = json.dumps({**ASK, "user": "x" * 3000}).encode()
    headers = {"content-type": "application/json"}

    def chunks() -> Iterator[bytes]:
        yield from (body[:1000], body[1000:])

    for content in (body, chunks()):
        answer = narrow.http().post("/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    with pytest.raises(openai.APIStatusError) as problem:
        client_of(narrow.url).chat.completions.create(**ASK, user="x" * 3000)
    assert problem.value.status_code == 413


def test_a_body_of_a_claimed_terabyte_is_refused(narrow: Running) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1099511627776\r\n\r\n"
    began = time.monotonic()
    assert raw(narrow.url, head, b"x" * 100_000).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - began < 3


def test_a_slow_client_is_not_waited_for(narrow: Running) -> None:
    """The server waits neither for its headers (slowloris) nor for its body, though a byte arrives now and then."""
    began = time.monotonic()
    header = [b"X: y\r\n"] * 20
    assert raw(narrow.url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n", *header, wait=0.1) == b""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    answer = raw(narrow.url, head, *[b"x"] * 20, wait=0.1)
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
    assert raw(narrow.url, b"") == b""  # nor for a client that sends nothing
    assert time.monotonic() - began < 8


def test_a_kept_connection_has_the_same_time_for_every_request(narrow: Running) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    began = time.monotonic()
    answer = raw(narrow.url, request, request[:20], *[b"a"] * 15, wait=0.1)
    assert answer.count(b"200 OK") == 1 and time.monotonic() - began < 4


def test_headers_without_end_are_400(tiny_url: str) -> None:
    answer = raw(tiny_url, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000)
    assert answer.startswith(b"HTTP/1.1 400") or answer == b""


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
)
def test_invalid_http_is_refused_with_the_errors_shape(tiny_url: str, data: bytes) -> None:
    answer = raw(tiny_url, data + b"\r\n\r\n")
    status = answer.split(b" ")[1]
    assert status in (b"400", b"403")
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


# The content of a request


@pytest.mark.parametrize(
    "name",
    [
        "http://169.254.169.254/latest#x", "http://127.0.0.1:1/v1#m", "openai:gpt-4o", "anthropic:claude",
        "/etc/passwd", "../../etc", "file:///etc/passwd", "org/name", "transformers:org/name", "runs/mine",
    ],
)  # fmt: skip
def test_a_reference_over_http_is_a_name_that_does_not_exist(
    tiny_url: str, name: str, tiny_directory: Path
) -> None:
    with httpx.Client(base_url=tiny_url) as http:
        for model in (name, str(tiny_directory)):
            for path, body in (
                ("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "a"}),
                ("/v1/embeddings", {"input": "a"}), ("/tokenize", {"prompt": "a"}),
            ):  # fmt: skip
                answer = http.post(path, json={"model": model, **body})
                assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../../etc/passwd", "/page/..%2f..%2fpyproject.toml",
        "/page/%2e%2e/store.py", "/v1/models/..%2f..%2fetc%2fpasswd", "/page//etc/passwd", "/page/..\\..\\store.py",
        "/page/%00", "/v1/models/%ff%fe",
    ],
)  # fmt: skip
def test_path_traversal_finds_nothing(tiny_url: str, path: str) -> None:
    answer = raw(tiny_url, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] == b"404" and b"root:" not in answer and b"sqlite" not in answer


def test_header_injection_by_what_a_request_names_is_not_possible(tiny_url: str) -> None:
    nasty = "x\r\nset-cookie: a=b\r\n\r\n<script>"
    answer = httpx.post(f"{tiny_url}/v1/chat/completions", json={**ASK, "model": nasty})
    assert answer.status_code == 404 and "set-cookie" not in answer.headers
    assert answer.headers["content-type"] == "application/json"
    encoded = "x%0d%0aset-cookie:%20a=b"
    response = raw(
        tiny_url,
        f"GET /v1/models/{encoded} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(),
    )
    assert b"set-cookie" not in response.partition(b"\r\n\r\n")[0].lower()
    with_id = httpx.get(f"{tiny_url}/health", headers={"x-request-id": "mine"})
    assert with_id.headers["x-request-id"].startswith("req_")


def test_headers_that_claim_another_address_are_ignored(locked: Running) -> None:
    headers = {"x-forwarded-for": "127.0.0.1", "x-forwarded-host": "localhost", "forwarded": "host=localhost"}
    assert locked.http(headers=headers).get("/v1/models").status_code == 401
    assert locked.http(headers=headers | {"host": "evil.example"}).get("/health").status_code == 403


def test_special_tokens_that_a_message_spells_are_text(tiny_url: str) -> None:
    body = {"messages": [{"role": "user", "content": "<|end|>"}]}
    tokens = httpx.post(f"{tiny_url}/tokenize", json=body).json()["tokens"]
    assert tokens.count(1) == 1  # the template's own


def test_a_server_without_a_page_has_none(tiny_url: str) -> None:
    model, _ = slow_model("slow", tokenizer_with(PLAIN))
    with serve_models(Models([model])) as running:
        assert running.http().get("/").headers["content-type"].startswith("text/plain")
        for path in ("/page/api/conversations", "/page/page.css"):
            assert running.http().get(path).status_code == 404
