"""Constrained answers: schema, regex, choices and grammar, for local and hosted models."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from fake_openai_server import FakeServer, completion, error, spoken
from pydantic import BaseModel, Field, field_validator
from tiny_model import write_model

from tercet.engine.constraint import Constraints
from tercet.engine.engine import Engine
from tercet.engine.grammar import GrammarError
from tercet.engine.request import Completion, Delta, FinishReason, Request, Usage
from tercet.errors import UserError
from tercet.prompt.errors import BatchError, OutputError
from tercet.prompt.llm import LLM
from tercet.prompt.local import LocalModel

HELLO = [{"role": "user", "content": "hi"}]


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)


PET = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


class MaskedEngine:
    """An engine that samples all allowed tokens uniformly, so that only the constraint shapes its outputs."""

    def __init__(self, engine: Engine) -> None:
        self.tokenizer, self.stop_ids = engine.tokenizer, engine.stop_ids
        self.context_length = engine.context_length
        self.sampling_defaults = engine.sampling_defaults
        self.constraints = Constraints(engine.tokenizer, engine.backend.vocab_size, sorted(engine.stop_ids))
        self.random = random.Random(0)
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    def stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        (request,) = requests
        completion = self._complete(request)
        yield Delta(0, completion.text, completion.tokens, None)
        yield Delta(0, "", [], None, completion)

    def _complete(self, request: Request) -> Completion:
        self.requests.append(request)
        assert request.constraint is not None
        matcher, tokens = self.constraints.matcher(request.constraint), list[int]()
        while not matcher.ended and len(tokens) < request.sampling.max_tokens:
            allowed = [int(token) for token in matcher.mask().nonzero()[0]]
            step = matcher.forced() or [self.random.choice(allowed)]
            for token in step:
                matcher.accept(token)
            tokens += step
        limit = request.sampling.max_tokens
        reason: FinishReason = "stop" if matcher.ended and len(tokens) <= limit else "length"
        text, usage = self.tokenizer.decode(tokens[:limit]), Usage(len(request.tokens), len(tokens[:limit]))
        return Completion(text, tokens[:limit], None, usage, reason, 0.0)


def mask(llm: LLM) -> MaskedEngine:
    """Replace the model's engine by a MaskedEngine."""
    assert isinstance(llm._model, LocalModel)
    engine = MaskedEngine(llm._model.engine)
    llm._model.engine = engine  # type: ignore[assignment]
    return engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model", chat=True)


@pytest.fixture(params=["any tokens", "engine"])
def llm(request: pytest.FixtureRequest, directory: Path) -> LLM:
    llm = LLM(directory, device="cpu")
    if request.param == "any tokens":
        mask(llm)
    return llm


@pytest.fixture
def hosted(server: FakeServer) -> LLM:
    return LLM(server.reference, retries=0)


def one_line(problem: pytest.ExceptionInfo[UserError]) -> str:
    message = str(problem.value)
    assert "\n" not in message
    return message


# Local models


def test_a_class_gives_its_instance(llm: LLM) -> None:
    for seed in range(4):
        answer = llm.generate("a pet: ", schema=Pet, seed=seed, max_tokens=60)
        assert isinstance(answer.parsed, Pet)
        assert json.loads(answer.text) == answer.parsed.model_dump()
        assert answer.finish_reason == "stop"
    assert isinstance(llm.chat(HELLO, schema=Pet, max_tokens=60).parsed, Pet)


def test_a_dict_gives_the_json(llm: LLM) -> None:
    answer = llm.chat(HELLO, schema=PET, seed=1, max_tokens=60)
    assert answer.parsed == json.loads(answer.text)
    assert Pet.model_validate(answer.parsed).legs == answer.parsed["legs"]


def test_the_other_forms_give_text_and_nothing_parsed(llm: LLM) -> None:
    for seed in range(4):
        date = llm.generate("on ", regex=r"\d{4}-[01]\d", seed=seed)
        assert re.fullmatch(r"\d{4}-[01]\d", date.text)
        assert date.parsed is None
        assert llm.generate("is it? ", choices=["yes", "no", "né"], seed=seed).text in ("yes", "no", "né")
        assert llm.chat(HELLO, grammar='start: "a" start? "b"', seed=seed, max_tokens=40).text[:1] == "a"


def test_a_stream_gives_the_instance_at_its_end(llm: LLM) -> None:
    with llm.stream("a pet: ", schema=Pet, seed=2, max_tokens=60) as stream:
        text = "".join(stream)
    assert stream.completion.parsed == Pet.model_validate_json(text)


def test_a_batch_has_one_form_for_all(llm: LLM) -> None:
    answers = llm.batch(["a pet: ", HELLO, "p"], schema=Pet, seed=3, max_tokens=60)
    assert all(isinstance(answer.parsed, Pet) for answer in answers)
    assert llm.batch([], schema=Pet) == []


def test_the_error_for_an_answer_that_was_cut_off_names_max_tokens_and_holds_the_answer(llm: LLM) -> None:
    for schema in (Pet, PET):
        with pytest.raises(OutputError, match=r"cut off after 8 tokens.*raise `max_tokens`") as problem:
            llm.generate("a pet: ", schema=schema, max_tokens=8)
        one_line(problem)
        assert problem.value.completion.text.startswith('{"kind":')
        assert problem.value.completion.parsed is None
        assert problem.value.completion.finish_reason == "length"
    with llm.stream("a pet: ", schema=Pet, max_tokens=8) as stream, pytest.raises(OutputError):
        list(stream)
    assert stream.completion.text == stream.text
    with pytest.raises(BatchError, match=r"2 of 2 requests failed; .* cut off") as batch:
        llm.batch(["a", "b"], schema=Pet, max_tokens=8)
    assert all(answer is not None and answer.text for answer in batch.value.completions)
    assert llm.generate("on ", regex=r"[0-9]{9}", max_tokens=4).finish_reason == "length"  # plain text


def test_a_validator_that_rejects_the_answer_is_reported(llm: LLM) -> None:
    class Legless(Pet):
        @field_validator("legs")
        @classmethod
        def none(cls, legs: int) -> int:
            raise ValueError("has legs")

    with pytest.raises(OutputError, match="the answer is not a Legless: legs: Value error, has legs"):
        llm.generate("a pet: ", schema=Legless, max_tokens=60)


def test_the_prompt_is_as_it_was_written(directory: Path) -> None:
    llm = LLM(directory, device="cpu")
    engine = mask(llm)
    llm.generate("a pet: ", schema=Pet, max_tokens=60)
    assert list(engine.requests[0].tokens) == engine.tokenizer.encode("a pet: ")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"schema": {"properties": {"a": {"type": "integr"}}}}, "schema.properties.a: Invalid type: integr"),
        ({"regex": "(?=a)b"}, r"regex '\(\?=a\)b' can't be used: look-around"),
        ({"choices": "yes"}, "`choices` must be a list"),
        ({"grammar": "start: x"}, "grammar: line 1, column 8: unknown name"),
        ({"schema": '{"type": "string"}'}, "must be a pydantic BaseModel class or a JSON Schema as a dict"),
        ({"schema": Pet(kind="cat", legs=4)}, "must be a pydantic BaseModel class"),
        ({"schema": int}, "`schema` is the class int; it must be a subclass of pydantic's BaseModel"),
        (
            {"schema": Pet, "regex": "a"},
            "`schema` and `regex` contradict each other; .* at most one of `schema`, `regex`",
        ),
        ({"shema": Pet}, "there is no sampling setting 'shema'; did you mean schema"),
    ],
)
def test_a_wrong_form_is_reported_before_anything_is_generated(
    directory: Path, form: dict[str, Any], message: str
) -> None:
    llm = LLM(directory, device="cpu")
    for call in (llm.generate, llm.stream):
        with pytest.raises(UserError, match=message) as problem:
            call("a", **form)
        one_line(problem)
    with pytest.raises(UserError, match=message):
        llm.batch(["a"], **form)


def test_a_class_without_a_schema_is_reported(directory: Path) -> None:
    class Odd(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        engine: MaskedEngine

    with pytest.raises(GrammarError, match="Odd has no JSON schema: Cannot generate"):
        LLM(directory, device="cpu").generate("a", schema=Odd)


# Hosted models


def test_a_class_is_sent_as_a_strict_schema(server: FakeServer, hosted: LLM) -> None:
    class Toy(BaseModel):
        name: str
        owner: Pet | None = None

    server.script.append(completion('{"name": "ball", "owner": {"kind": "dog", "legs": 4}}'))
    answer = hosted.chat(HELLO, schema=Toy)
    assert answer.parsed == Toy(name="ball", owner=Pet(kind="dog", legs=4))
    body = server.bodies()[0]
    assert body["messages"] == HELLO
    sent = body["response_format"]
    assert (sent["type"], sent["json_schema"]["name"], sent["json_schema"]["strict"]) == (
        "json_schema",
        "Toy",
        True,
    )
    schema = sent["json_schema"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["name", "owner"], False)
    # The same as the openai client's own parse() sends.
    server.script.append(completion('{"name": "ball", "owner": null}'))
    client = openai.OpenAI(base_url=server.url, api_key="none")
    client.chat.completions.parse(
        model="small", messages=[{"role": "user", "content": "hi"}], response_format=Toy
    )
    assert server.bodies()[1]["response_format"] == sent


def test_a_dict_is_sent_as_it_is(server: FakeServer, hosted: LLM) -> None:
    for schema, name in ((PET, "answer"), (PET | {"title": "a pet!"}, "a_pet_")):
        server.script.append(completion('{"kind": "cat", "legs": 3}'))
        assert hosted.generate("hi", schema=schema).parsed == {"kind": "cat", "legs": 3}
        expected = {"name": name, "schema": schema, "strict": True}
        assert server.bodies()[-1]["response_format"] == {"type": "json_schema", "json_schema": expected}


def test_a_hosted_stream_is_parsed_too(server: FakeServer, hosted: LLM) -> None:
    server.script.append(spoken('{"kind": "c', 'at", "legs": 3}'))
    stream = hosted.stream("hi", schema=Pet)
    list(stream)
    assert stream.completion.parsed == Pet(kind="cat", legs=3)


def test_a_hosted_answer_that_is_something_else(server: FakeServer, hosted: LLM) -> None:
    answers = [
        (completion('{"kind": "c', finish_reason="length"), Pet, "cut off after 3 tokens.*max_tokens"),
        (completion("Sorry, no."), Pet, r"not a Pet: Invalid JSON: .*; it begins 'Sorry, no\.'"),
        (completion('{"kind": "cow", "legs": 3}'), Pet, "not a Pet: kind: Input should be 'cat' or 'dog'"),
        (completion("Sorry, no."), PET, "the answer is not JSON: Expecting value"),
        (completion("[NaN]"), PET, "the answer is not JSON: NaN is not JSON"),
        (completion("[1e999]"), PET, "the answer is not JSON: 1e999 is too large a number"),
    ]
    for answer, schema, message in answers:
        server.script.append(answer)
        with pytest.raises(OutputError, match=message) as problem:
            hosted.chat(HELLO, schema=schema)
        one_line(problem)
        assert problem.value.completion.text


def test_a_hosted_batch_keeps_what_came(server: FakeServer) -> None:
    llm = LLM(server.reference, retries=0, price=(1, 1))
    prompts: list[Any] = ['{"kind": "cat", "legs": 1}', "no", '{"kind": "dog", "legs": 2}']
    with pytest.raises(
        BatchError, match=r"1 of 3 requests failed; the first, number 2: .* not a Pet"
    ) as problem:
        llm.batch(prompts, schema=Pet)
    first, second, third = problem.value.completions
    assert first is not None and second is not None and third is not None
    assert (first.parsed, second.parsed, third.parsed) == (
        Pet(kind="cat", legs=1),
        None,
        Pet(kind="dog", legs=2),
    )
    assert second.text == "no"
    assert first.usage.cost is not None
    server.script.append(error(400, "not this one"))
    with pytest.raises(BatchError, match="2 of 2") as both:
        llm.batch(["no", "no"], schema=Pet)
    assert sum(answer is None for answer in both.value.completions) == 1


@pytest.mark.parametrize("form", [{"regex": "a"}, {"choices": ["a"]}, {"grammar": 'start: "a"'}])
def test_hosted_models_take_a_schema_only(server: FakeServer, hosted: LLM, form: dict[str, Any]) -> None:
    for call in (hosted.generate, lambda text, **form: list(hosted.stream(text, **form))):
        with pytest.raises(UserError, match=f"supports only `schema`, not `{next(iter(form))}`") as problem:
            call("hi", **form)
        one_line(problem)
    assert server.seen == []


def test_a_server_that_ignores_schemas_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    with pytest.raises(UserError, match="its OpenAI-compatible endpoint ignores schemas; leave out `schema`"):
        LLM("anthropic:x", retries=0).chat(HELLO, schema=Pet)


# What a grammar can't hold, and answers without end


class Fixed:
    """An engine whose answer is given."""

    def __init__(self, text: str, reason: FinishReason = "stop") -> None:
        self.text, self.reason = text, reason

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        usage = Usage(1, 9)
        return [Completion(self.text, [], None, usage, self.reason, 0.0) for _ in requests]


def answering(directory: Path, text: str, reason: FinishReason = "stop") -> LLM:
    llm = LLM(directory, device="cpu")
    assert isinstance(llm._model, LocalModel)
    fixed: Any = Fixed(text, reason)
    engine = llm._model.engine
    fixed.tokenizer, fixed.context_length = engine.tokenizer, engine.context_length
    fixed.sampling_defaults = engine.sampling_defaults
    llm._model.engine = fixed
    return llm


def test_what_the_grammar_cannot_hold_is_validated(directory: Path) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    assert answering(directory, "[2, 1]").generate("a", schema=schema).parsed == [2, 1]
    with pytest.raises(
        OutputError, match=r"not valid under the schema: \[1,1\] has non-unique elements"
    ) as problem:
        answering(directory, "[1, 1]").generate("a", schema=schema)
    one_line(problem)
    assert problem.value.completion.parsed is None


def test_an_answer_that_repeats_itself_is_not_told_to_be_longer(directory: Path) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
    for tail, unit in (("0" * 60, "0"), ("ha " * 20, "ha ")):
        with pytest.raises(OutputError, match=f"repeats '{unit}' without end.*maxLength") as problem:
            answering(directory, '{"x": "' + tail, "length").generate("a", schema=schema)
        assert "raise `max_tokens`" not in one_line(problem)
    with pytest.raises(OutputError, match="raise `max_tokens`"):
        answering(directory, '{"x": "once there was 0000', "length").generate("a", schema=schema)
