"""Reasoning in answers: the markers around it, and whether a prompt has opened it.

Models think in their answer, between markers, before they answer or call a function. What stands there is no
answer: a call that the model only considers must not be executed.
"""

from __future__ import annotations

from collections.abc import Sequence

from tercet.model.tokenizer import Tokenizer

# The text that ends the reasoning by the text that begins it.
REASONING = {
    "<think>": "</think>",  # DeepSeek R1, Qwen 3, GLM 4.5, MiniMax M2, SmolLM3, Nemotron
    "[THINK]": "[/THINK]",  # Magistral, Ministral 3
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",  # EXAONE Deep
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command R7B, Command A
    "<|begin_of_thought|>": "<|end_of_thought|>",  # Sky-T1, OpenThinker
    "<|channel>": "<channel|>",  # Gemma 4
    "◁think▷": "◁/think▷",  # Kimi-VL
}
REASONING_MARKERS = (*REASONING, *REASONING.values())


def reasoning_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the markers that a tokenizer or its chat templates have, as `REASONING`."""
    templates = "\n".join(tokenizer.templates.values())
    return {
        begin: end
        for begin, end in REASONING.items()
        if begin in templates or tokenizer.id_of(begin) is not None
    }


def open_reasoning(tokenizer: Tokenizer, prompt: Sequence[int]) -> str | None:
    """Return the marker that ends the reasoning which a prompt leaves open; None where it opens none.

    Only the text behind the last special token counts, which begins the assistant's message: markers in earlier
    messages are text. Where the template has no special tokens for roles (those that begin and end a text are
    none), only a marker at the very end counts.

    Args:
        tokenizer: of the model.
        prompt: the tokens of the conversation, up to where the model continues.
    """
    markers = {tokenizer.id_of(marker): marker for marker in REASONING_MARKERS}
    special = {tokenizer.id_of(token) for token in tokenizer.special_tokens}
    special -= {*markers, tokenizer.bos_id, tokenizer.eos_id}
    start = next((place for place in range(len(prompt), 0, -1) if prompt[place - 1] in special), None)
    text = tokenizer.decode(list(prompt[start or 0 :]), skip_special=False)
    ended = text.rstrip()
    for begin, end in REASONING.items():
        opened = begin in text.rpartition(end)[2] if start is not None else ended.endswith(begin)
        if opened:
            return end
    return None
