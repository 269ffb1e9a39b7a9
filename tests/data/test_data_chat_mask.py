"""Training covers the assistant's text and its stop token, and no other text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tercet.data.chat_mask import encode_spans, mask_conversation
from tercet.data.prompt_tokens import conversation_text
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# As for reasoning models, earlier turns are rendered without the thinking block.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
OTHER_PREFIX = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TWICE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.content if m.role == 'assistant' }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "user system assistant",
    "Hello world 12345",
    "née café 北京 🙂",
]


def make_tokenizer(template: str, trim_offsets: bool = True) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # GPT-2's post-processor trims spaces from offsets: a token's span must cover them nevertheless.
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    special = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(WORDS * 5, trainer)
    return Tokenizer.from_backend(
        backend, bos="<s>", eos="<|endoftext|>", pad="<|endoftext|>", chat_template=template
    )


def trained_on(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[list[str]]:
    """Return the decoded runs of supervised tokens of each training text."""
    result = []
    for rendered in mask_conversation(tokenizer, messages):
        example = encode_spans(tokenizer, rendered.text, [(s.start, s.end) for s in rendered.spans])
        runs: list[list[int]] = []
        inside = False
        for token, supervised in zip(example.ids.tolist(), example.supervised.tolist(), strict=True):
            if supervised and not inside:
                runs.append([])
            if supervised:
                runs[-1].append(token)
            inside = supervised
        result.append([tokenizer.decode(run, skip_special=False) for run in runs])
    return result


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]


@pytest.mark.parametrize("trim", [True, False])
def test_every_answer_and_its_stop_token_is_trained_on_and_nothing_else(trim: bool) -> None:
    tokenizer = make_tokenizer(CHATML, trim)
    messages = [
        {"role": "system", "content": "be kind"},
        *talk("hi there", "Hello world", "and now", " the fox "),
    ]
    assert trained_on(tokenizer, messages) == [["Hello world<|im_end|>", " the fox <|im_end|>"]]


def test_a_developer_message_is_trained_on_as_the_model_reads_it_at_inference() -> None:
    tokenizer = make_tokenizer(CHATML)
    [developer], [system] = (
        mask_conversation(tokenizer, [{"role": role, "content": "S"}, *talk("hi", "yes")])
        for role in ("developer", "system")
    )
    assert developer == system
    prompt = conversation_text(tokenizer, [{"role": "developer", "content": "S"}, *talk("hi")])
    assert developer.text.startswith(prompt)


def test_a_template_that_trims_answers() -> None:
    tokenizer = make_tokenizer(LLAMA3)
    assert trained_on(tokenizer, talk("hi", "  Hello ", "so", "bye")) == [
        ["Hello<|im_end|>", "bye<|im_end|>"]
    ]


def test_a_template_that_ends_answers_with_the_end_of_text_token() -> None:
    tokenizer = make_tokenizer(MISTRAL)
    assert trained_on(tokenizer, talk("hi", "Hello", "so", "bye")) == [
        [" Hello<|endoftext|>", " bye<|endoftext|>"]
    ]


def test_a_template_that_renders_the_last_turn_differently_gives_one_text_a_turn() -> None:
    tokenizer = make_tokenizer(THINKING)
    assert trained_on(tokenizer, talk("a", "one", "b", "two")) == [
        ["<think>\n\n</think>\n\none<|im_end|>"],
        ["<think>\n\n</think>\n\ntwo<|im_end|>"],
    ]


def test_the_text_before_an_answer_is_the_prompt_at_inference() -> None:
    for template in (CHATML, LLAMA3, MISTRAL, THINKING):
        tokenizer = make_tokenizer(template)
        messages = talk("hi", "Hello", "so", "bye")
        for turn, rendered in zip(
            (1, 3), [r for r in mask_conversation(tokenizer, messages) for _ in r.spans], strict=True
        ):
            span = rendered.spans[min(len(rendered.spans) - 1, turn // 2)]
            prompt = tokenizer.render(messages[:turn], add_generation_prompt=True)
            assert rendered.text[: span.start] == prompt


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NO_STOP, "no special token, so the model would never learn to stop"),
        (OTHER_PREFIX, "is prompted with .* at inference but rendered as"),
        (TWICE, "renders the assistant's message 2 2 times"),
    ],
)
def test_a_template_that_fails_a_check_is_refused_with_the_reason(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        mask_conversation(make_tokenizer(template), talk("hi", "Hello"))


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(UserError, match="no assistant message"):
        mask_conversation(make_tokenizer(CHATML), talk("hi"))


def test_earlier_answers_can_be_context_only() -> None:
    tokenizer = make_tokenizer(CHATML)
    [rendered] = mask_conversation(tokenizer, talk("a", "one", "b", "two"), supervised=range(2, 4))
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == ["two<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_only_the_named_answers_are_trained_on(template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = talk("a", "one", "b", "two", "c", "three")
    rendered = mask_conversation(tokenizer, messages, supervised={0, 1, 5})
    trained = [text.text[span.start : span.end] for text in rendered for span in text.spans]
    assert [answer.removeprefix("<think>\n\n</think>\n\n") for answer in trained] == [
        "one<|im_end|>",
        "three<|im_end|>",
    ]
    with pytest.raises(UserError, match="no assistant message"):
        mask_conversation(tokenizer, messages, supervised={0, 2})


CONTENT = st.text(
    alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20
).filter(lambda text: "<|" not in text)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), st.sampled_from([CHATML, MISTRAL]))
def test_the_supervised_tokens_of_any_conversation_spell_its_answers(
    exchanges: list[tuple[str, str]], template: str
) -> None:
    tokenizer = make_tokenizer(template)
    messages = talk(*(text for exchange in exchanges for text in exchange))
    for rendered in mask_conversation(tokenizer, messages):
        example = encode_spans(tokenizer, rendered.text, [(s.start, s.end) for s in rendered.spans])
        supervised_ids = [
            token
            for token, supervised in zip(example.ids.tolist(), example.supervised.tolist(), strict=True)
            if supervised
        ]
        answers = "".join(rendered.text[s.start : s.end] for s in rendered.spans)
        text = tokenizer.decode(supervised_ids, skip_special=False)
        # A token may hold the last character before an answer together with its first.
        assert answers in text and len(text) - len(answers) <= 8 * len(rendered.spans)
