"""A model that writes scripted answers with tokens and probabilities, at a given speed.

`python page_models.py PORT DATABASE DELAY` serves the page with three such models: a chat model, its tuned version and
a base model.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

from tercet.engine.engine import Engine
from tercet.engine.request import Completion, Delta, Request, TokenLogprob, Usage
from tercet.engine.text import TextStream, TokenBytes
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer
from tercet.serve.models import Models, Served

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGIN = "<|im_start|>assistant\n"
CONTEXT = 4096

SKY = """The sky is blue because air scatters **short** waves more than long ones: *Rayleigh scattering*.

1. Sunlight holds every colour.
2. Molecules are far smaller than a wavelength, so the share that is scattered goes as `1 / wavelength ** 4`.
3. Blue light is therefore spread over the whole sky, and the evening sun, seen through more air, is red.

```python
def scattered(wavelength: float) -> float:
    "Relative to blue light, at 450 nanometres."
    return (450 / wavelength) ** 4

print(f"red: {scattered(700):.2f}")
```

| colour | wavelength | scattered |
|:-------|-----------:|----------:|
| blue   |        450 |      1.00 |
| green  |        530 |      0.52 |
| red    |        700 |      0.17 |
"""
ATTACK = """Hello <script>window.stolen = 1</script> <img src=x onerror="window.stolen = 2">

[click](javascript:window.stolen=3) ![pixel](http://127.0.0.1:1/pixel.png)

```<img src=x onerror=window.stolen=4>
<svg onload="window.stolen = 5">
```
"""
SLOW = " ".join(f"word{number}" for number in range(300))  # a browser stops it long before its end
TEXT = " a ship came in from the sea, and nobody knew whose flag it flew. It lay there, still, until the evening bells."


def train_tokenizer(template: str | None) -> Tokenizer:
    """Train a small tokenizer whose tokens are the words of the scripts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    backend.train_from_iterator(
        [SKY * 3, TEXT * 3, ATTACK, SLOW[:500], "Why is the sky blue? system user assistant"], trainer
    )
    return Tokenizer.from_backend(backend, eos="<|im_end|>", chat_template=template)


def reply(question: str) -> str:
    """Return the models' answer to a message."""
    known = {
        "sky": SKY,
        "long": f"{SKY}\n{SLOW}",
        "attack": ATTACK,
        "slow": SLOW,
        "emoji": "A fish: 🐟, done.",
    }
    return next((text for word, text in known.items() if word in question), f"You said: {question}")


class ScriptedWorker:
    """The part of a Worker that the page uses. ``say(prompt)`` returns the whole answer to a prompt's text.

    ``delay`` is the time between two tokens in seconds; ``requests`` holds every request so far.
    """

    def __init__(
        self, say: Callable[[str], str], delay: float = 0.0, template: str | None = TEMPLATE
    ) -> None:
        tokenizer = train_tokenizer(template)
        stop = {tokenizer.eos_id}
        backend: Any = SimpleNamespace(
            vocab_size=tokenizer.vocab_size, max_positions=CONTEXT, page_size=16, num_pages=CONTEXT // 16
        )
        self.engine = Engine(backend, tokenizer, sorted(stop))  # for its properties; it computes nothing
        self.say, self.delay = say, delay
        self.requests: list[Request] = []
        self.cancelled = 0
        self.problem: Exception | None = None
        self._bytes_of = TokenBytes(tokenizer)

    load = SimpleNamespace(running=0, waiting=0)
    alive, meter = True, None

    async def drain(self, seconds: float) -> bool:
        return True

    def close(self) -> None:
        pass

    async def stream(self, requests: Sequence[Request]) -> AsyncIterator[Delta]:
        (request,) = requests
        self.requests.append(request)
        ended = False
        try:
            async for delta in self._stream(request):
                ended = ended or delta.completion is not None
                yield delta
        finally:
            self.cancelled += not ended

    async def _stream(self, request: Request) -> AsyncIterator[Delta]:
        if len(request.tokens) > CONTEXT:
            raise UserError("the prompt is too long")
        tokenizer, sampling = self.engine.tokenizer, request.sampling
        prompt = tokenizer.decode(list(request.tokens), skip_special=False)
        question, _, prefix = prompt.rpartition(BEGIN) if BEGIN in prompt else (prompt, "", "")
        answer = self.say(question)
        rest = answer[len(prefix) :] if answer.startswith(prefix) else " and so on."
        tokens = [*tokenizer.encode(rest, special=False), *self.engine.stop_ids][: sampling.max_tokens]
        draw = random.Random(f"{rest}{sampling.seed}")
        stream, text, logprobs = TextStream(sampling.stop), "", list[TokenLogprob]()
        await asyncio.sleep(self.delay)
        if self.problem is not None:
            raise self.problem
        for number, token in enumerate(tokens):
            await asyncio.sleep(self.delay)
            stop = token in self.engine.stop_ids
            entry = self._logprob(token, stop, number == 0, draw)
            logprobs.append(entry)
            piece = stream.push(entry.bytes)
            last = stop or stream.stopped or number == len(tokens) - 1
            if last and not stream.stopped:
                piece += stream.finish()
            text += piece
            completion = None
            if last:
                usage = Usage(len(request.tokens), number + 1)
                reason: Any = "stop" if stop or stream.stopped else "length"
                completion = Completion(text, tokens[: number + 1], logprobs, usage, reason, 0.0)
            yield Delta(0, piece, [token], [entry], completion)
            if last:
                return

    def _logprob(self, token: int, stop: bool, first: bool, draw: random.Random) -> TokenLogprob:
        """Return random but plausible probabilities, some sharp, some flat."""
        rank = draw.choices(range(5), weights=[70, 15, 8, 4, 3])[0]
        spread = draw.choice([0.3, 1.0, 2.0, 4.0])
        candidates = draw.sample(range(258, self.engine.tokenizer.vocab_size), 9)
        order = [candidate for candidate in candidates if candidate != token][:9]
        order.insert(rank, token)
        weights = [math.exp(-place / spread) for place in range(len(order))]
        total = sum(weights) * (1 + 0.05 * spread)
        top = [
            (candidate, self._bytes_of.text(candidate), math.log(weight / total))
            for candidate, weight in zip(order, weights, strict=True)
        ]
        data = b"" if stop else self._bytes_of(token, first=first)
        logprob = next(value for candidate, _, value in top if candidate == token)
        entropy = -sum(math.exp(value) * value for _, _, value in top)
        return TokenLogprob(token, self._bytes_of.text(token), logprob, data, top, entropy)


def reply_to_prompt(prompt: str) -> str:
    """Return the answer to the last user message of a rendered conversation."""
    return reply(prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0])


def scripted_models(delay: float = 0.0) -> Models:
    """Return a chat model, a tuned version of it with shorter answers, and a base model."""
    chat: Any = ScriptedWorker(reply_to_prompt, delay)
    tuned: Any = ScriptedWorker(
        lambda prompt: reply_to_prompt(prompt).split("\n\n")[0] + " That is all.", delay
    )
    base: Any = ScriptedWorker(lambda prompt: prompt + TEXT, delay, template=None)
    base.say = lambda prompt: TEXT
    return Models(
        [Served("tiny-chat", local=chat), Served("tiny-tuned", local=tuned), Served("tiny-base", local=base)]
    )


def main(port: int, database: str, delay: float) -> None:
    from tercet.serve.launch import bind, run
    from tercet.serve.settings import Settings
    from tercet.serve.web.store import Store

    run(scripted_models(delay), Settings(port=port), Store(database), bind("127.0.0.1", port))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
