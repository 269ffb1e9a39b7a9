"""Python and the server give a model the same tokens for the same conversation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import serve_models
from tiny_model import CONTEXT, TEMPLATE, write_model

from tercet.errors import ContextOverflow
from tercet.model.reference import parse_reference
from tercet.prompt.local import LocalModel
from tercet.serve.models import Models, Served
from tercet.serve.worker import Worker

TEMPLATES = {
    "plain": TEMPLATE,
    "developers": TEMPLATE.replace(
        "{{ m['role'] }}", "{{ 'dev' if m['role'] == 'developer' else m['role'] }}"
    ),
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
ROLES = ("system", "developer", "user", "assistant")
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.text(max_size=12)}),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    directory = write_model(tmp_path_factory.mktemp(request.param) / "model", chat=True)
    (directory / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return LocalModel(parse_reference(str(directory)), device="cpu", quantize="none", threads=1)


@pytest.fixture(scope="module")
def http(model: LocalModel) -> Iterator[Any]:
    with (
        serve_models(Models([Served("tiny", local=Worker(model.engine))])) as running,
        running.http() as client,
    ):
        yield client


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=CONVERSATIONS)
def test_python_and_the_server_read_a_conversation_alike(
    model: LocalModel, http: Any, messages: list[dict[str, str]]
) -> None:
    tokens = model.encode(messages)
    answer = http.post("/tokenize", json={"messages": messages})
    body = {"model": "tiny", "messages": messages, "max_tokens": 1, "add_generation_prompt": True}
    counted = http.post("/v1/chat/completions", json=body)
    if len(tokens) <= CONTEXT:
        assert answer.json()["tokens"] == tokens
        assert counted.json()["usage"]["prompt_tokens"] == len(tokens)
    else:
        assert [answer.status_code, counted.status_code] == [400, 400]


def test_python_and_the_server_agree_where_the_context_ends(model: LocalModel, http: Any) -> None:
    room = CONTEXT - model.count_tokens([{"role": "user", "content": ""}])
    for size in (room, room + 1):
        messages: list[dict[str, Any]] = [{"role": "user", "content": "x" * size}]
        answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        if size == room:
            assert answer.status_code == 200 and model.read(messages, 0)
        else:
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert f"maximum context length is {CONTEXT} tokens" in answer.json()["error"]["message"]
            with pytest.raises(ContextOverflow) as overflow:
                model.read(messages, 0)
            assert (overflow.value.tokens, overflow.value.limit) == (CONTEXT + 1, CONTEXT)


def test_a_prompt_that_the_cache_cannot_hold_is_too_long_in_python_too(model: LocalModel) -> None:
    pool = model.engine.pool
    pages, pool.num_pages = pool.num_pages, 1
    try:
        assert model.context_length == pool.page_size < CONTEXT
        with pytest.raises(ContextOverflow, match=f"takes at most {model.context_length}"):
            model.read("x" * model.context_length, 0)
    finally:
        pool.num_pages = pages
