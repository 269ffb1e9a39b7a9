"""EleutherAI's lm-evaluation-harness on Tercet's engine: its tasks, its scores, our forward passes.

``tercet eval REF --lm-eval TASK`` runs it. From Python, importing this module registers the model type
``tercet`` with the harness::

    import lm_eval, tercet.evaluate.lm_eval
    lm_eval.simple_evaluate(model="tercet", model_args={"model": "runs/mine"}, tasks=["arc_easy"])

Requests are encoded, cut and windowed as the harness's own ``HFLM`` does it, by the harness's own
functions, so that scores are those of ``--model hf`` (github.com/EleutherAI/lm-evaluation-harness).

Importing this needs the extra ``lm-eval``.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tercet.engine.continuations import Continuation, score_continuations
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError, nearest
from tercet.model.reference import parse_reference
from tercet.progress import Progress
from tercet.prompt.local import LocalModel

CALL = (
    512  # continuations in one call of the engine: enough to fill its batches, few enough for a bar to move
)
MAX_GEN_TOKS = 256  # the harness's default where a task names no length
CONTINUED = "<<continued>>"  # stands in a rendered conversation where its last message ends

# What a request for log-probabilities is to the harness: (context, continuation) as text or None, then as tokens.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("tercet")
class TercetLM(TemplateLM):
    """A local model for the harness.

    Args:
        model: a model reference, or one that is loaded.
        quantize, device, threads, dtype: as for `tercet.LLM`; for a reference only.

    Raises:
        UserError: a hosted reference, or one that can't be loaded.
    """

    def __init__(self, model: str | Path | LocalModel, **options: Any) -> None:
        super().__init__()
        if isinstance(model, LocalModel):
            if options:
                raise UserError(f"{', '.join(options)} can't change a model that is loaded already")
            self.local = model
        else:
            self.local = load_local(str(model), **options)
        self.tokenizer = self.local.tokenizer

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        if self.tokenizer.eos_id is None:
            raise UserError(f"{self.local.reference.text} has no end-of-text token, which lm-eval needs")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without a context is predicted from."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return self.local.context_length

    @cached_property
    def _prefix(self) -> str:
        return self.tokenizer.decode([self.prefix_token_id], skip_special=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. By default with what the tokenizer puts around a text, unless it is written there."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._prefix)
        return self.tokenizer.encode(string, special=add_special_tokens)

    # Log-probabilities

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pieces: list[Continuation] = []
        before: list[int] = []
        for number, (_text, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise UserError(
                    f"lm-eval asks for the log-probability of {len(continuation)} tokens at once; "
                    f"{self.local.reference.text} can give 1 to {self.max_length}"
                )
            # Too long a context is cut from the left; the last token is scored, not fed.
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            # The choices of one question come one after the other; what they share is computed once.
            same = pieces and len(context) > 1 and context == before
            group = pieces[-1].group if same else number
            pieces.append(Continuation(group, tokens, len(tokens) - len(continuation)))
            before = context
        engine = self.local.engine
        with Progress("lm-eval: log-probabilities", len(pieces), "requests") as bar:
            for start in range(0, len(pieces), CALL):
                some = pieces[start : start + CALL]
                score_continuations(engine.backend, engine.pool, some)
                bar.advance(len(some))
        answers = [(math.fsum(one.logprobs), one.is_greedy) for one in pieces]
        for (text, *_tokens), answer in zip(requests, answers, strict=True):
            if text is not None:  # the windows of a longer text are no requests of their own
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the model's context that don't overlap."""
        windows: list[Scored] = []
        counts: list[int] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            own = [make_disjoint_window(window) for window in cut]
            windows += [(None, context, continuation) for context, continuation in own]
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        sums = [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # Text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context up to the first of its stop strings, which is left out."""
        asked = [self._request(*request.args) for request in requests]
        texts = [""] * len(asked)
        with Progress("lm-eval: generating", len(asked), "requests") as bar:
            for delta in self.local.engine.stream(asked):
                if delta.completion is not None:
                    texts[delta.index] = delta.completion.text
                    bar.advance()
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        given = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
        stop = [given.pop("until")] if isinstance(given["until"], str) else given.pop("until")
        most = given.pop("max_gen_toks")
        if not given.pop("do_sample"):
            given["temperature"] = 0.0
        given.setdefault("temperature", 1.0)
        known = {field.name for field in fields(Sampling)} - {"stop", "max_tokens", "logprobs"}
        for name in given:
            if name not in known:
                raise UserError(
                    f"the task's generation_kwargs have {name}, which Tercet's engine does not know"
                )
        if most >= self.max_length:
            raise UserError(
                f"the task asks for {most} tokens; {self.local.reference.text} takes {self.max_length} "
                "with the prompt; lower max_gen_toks in the task"
            )
        tokens = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        sampling = Sampling(max_tokens=most, stop=tuple(text for text in stop if text), **given)
        return Request(tuple(tokens), sampling)

    # Conversations

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and templates in the keys of the harness's caches."""
        return self.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses; None where the harness wants none."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt it breaks off where the last message ends."""
        if add_generation_prompt:
            return self.tokenizer.render(chat_history, add_generation_prompt=True)
        last = chat_history[-1]
        marked = {**last, "content": f"{last['content']}{CONTINUED} "}
        text = self.tokenizer.render([*chat_history[:-1], marked])
        begun, found, rest = text.rpartition(CONTINUED)
        if not found:
            raise UserError(
                "the chat template leaves out the last message, so an answer can't be begun for it"
            )
        # A template that trims messages has cut the space behind the mark; so it would the end of this one.
        return begun if rest.startswith(" ") else begun.rstrip()


def load_local(reference: str, **options: Any) -> LocalModel:
    """The model of a local reference. UserError for a hosted one."""
    parsed = parse_reference(reference)
    if not parsed.is_local:
        raise UserError(
            f"{reference} is hosted, and lm-eval needs the log-probabilities of given texts, which servers don't "
            "tell; use a model that runs here"
        )
    return LocalModel(parsed, **options)


def evaluate_lm_eval(
    model: LocalModel,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Run tasks of the harness; its own results in plain values.

    Args:
        tasks: names of tasks, groups or tags, or paths of task files.
        include_path: a directory with task files of your own.
        limit: so many documents of each task at most; None: all.
        shots: solved examples in the prompt; None: as each task says.
        chat: put every prompt into the model's chat template.

    Returns:
        ``model``, ``seconds``, and the harness's ``results`` (by task: ``"acc,none"``,
        ``"acc_stderr,none"``, ...; null where it has no number), ``n-samples``, ``n-shot``, ``versions``.

    Raises:
        UserError: an unknown task, data that can't be read, a template that isn't there.
    """
    for value, name in ((limit, "--limit"), (shots, "--shots")):
        if value is not None and value < (name == "--limit"):
            raise UserError(f"{name} is {value}; it must be {'1' if name == '--limit' else '0'} or more")
    if chat and not model.has_chat_template:
        raise UserError(f"{model.reference.text} has no chat template; leave out --chat-template")
    began = time.monotonic()
    # Standard output belongs to the result, and the harness and its metrics may print.
    with contextlib.redirect_stdout(sys.stderr):
        manager = _task_manager(tasks, include_path)
        try:
            found = simple_evaluate(
                model=TercetLM(model),
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat,
                log_samples=False,
            )
        except Exception as problem:
            if _is_ours(problem):
                raise
            # The harness runs what a task file says, so anything may go wrong in it: a path, a field, a template.
            what = " ".join(f"{type(problem).__name__}: {problem}".split())
            raise UserError(f"lm-eval can't run {', '.join(tasks)}: {what}") from problem
    kept = ("results", "groups", "n-samples", "n-shot", "versions")
    return {
        "kind": "lm_eval",
        "model": model.reference.text,
        "seconds": time.monotonic() - began,
        **{name: _plain(found[name]) for name in kept if name in found},
    }


def _is_ours(problem: Exception) -> bool:
    """Whether an error was raised by Tercet's code, not by the harness or what it calls."""
    frames = [frame for frame, _ in traceback.walk_tb(problem.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).startswith("tercet.")


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    if not tasks:
        raise UserError("--lm-eval names no task")
    path = None
    if include_path is not None:
        path = str(include_path)
        if not Path(path).is_dir():
            raise UserError(f"--include-path {path} is not a directory")
        # The harness's own 14,000 tasks take seconds to read; where none is asked for, they are left out.
        own = TaskManager(include_path=path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=path)
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            near = nearest(task, manager.all_tasks, limit=3)
            hint = (
                f"did you mean {', '.join(near)}?" if near else "--include-path names a directory of your own"
            )
            raise UserError(f"lm-eval has no task {task!r}; {hint}")
    return manager


def _plain(value: Any) -> Any:
    """JSON values: numpy's numbers as Python's, and null for what is no finite number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return None if value == "N/A" else value
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    if isinstance(value, int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
