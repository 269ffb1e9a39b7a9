"""Run tasks of EleutherAI's lm-evaluation-harness on Tercet's engine.

``tercet eval`` does so. From Python, importing this module registers the model
type ``tercet`` with the harness::

    import lm_eval, tercet.evaluate.lm_eval
    lm_eval.simple_evaluate(model="tercet", model_args={"model": "runs/mine"}, tasks=["arc_easy"])

The harness's own functions encode, cut and window the requests, as in its ``HFLM``, so that scores
equal those of its model ``hf`` (github.com/EleutherAI/lm-evaluation-harness).

This module needs the extra ``lm-eval``.
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

from tercet.data.conversation import read_messages
from tercet.data.prompt_tokens import PromptEnding, conversation_text
from tercet.engine.continuations import Continuation, score_continuations
from tercet.engine.engine import Engine
from tercet.engine.load import load_reference
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError, nearest
from tercet.model.reference import parse_reference
from tercet.model.source import directory_of
from tercet.progress import Progress

CALL = 512  # continuations in one call of the engine: fills its batches, and the progress bar still moves
MAX_GEN_TOKS = 256  # the harness's default if a task names no length
# The parts of the harness's results that are returned.
RESULTS = ("results", "groups", "n-samples", "n-shot", "versions")

# The harness's form of a request for log-probabilities: (context, continuation) as text or None, then as tokens.
Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("tercet")
class TercetLM(TemplateLM):
    """A local model for the harness.

    Args:
        model: a local model reference, or an engine.
        name: what messages and results call the model; default the reference.
        quantize, device, threads, dtype: as for `tercet.LLM`; for a reference only.

    Raises:
        UserError: a hosted reference, or a model that cannot be loaded.
    """

    def __init__(self, model: str | Path | Engine, name: str | None = None, **options: Any) -> None:
        super().__init__()
        if isinstance(model, Engine):
            if options:
                raise UserError(f"{', '.join(options)} cannot change a model that is already loaded")
            self.engine = model
        else:
            self.engine = _load(str(model), **options)
        self.name = name or ("the model" if isinstance(model, Engine) else str(model))
        self.tokenizer = self.engine.tokenizer

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        if self.tokenizer.eos_id is None:
            raise UserError(f"{self.name} has no end-of-text token, which lm-eval needs")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token from which the first token of a text without a context is predicted."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """The number of tokens that the model takes."""
        return self.engine.max_positions

    @cached_property
    def _prefix(self) -> str:
        return self.tokenizer.decode([self.prefix_token_id], skip_special=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids. By default special tokens are added unless the text begins with them."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._prefix)
        return self.tokenizer.encode(string, special=add_special_tokens)

    # Log-probabilities

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pieces: list[Continuation] = []
        previous_context: list[int] = []
        for number, (_text, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise UserError(
                    f"lm-eval requests the log-probability of {len(continuation)} tokens at once; "
                    f"{self.name} takes 1 to {self.max_length}"
                )
            # A context that is too long is cut from the left; the last token is scored, not fed.
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            # The choices of one question follow each other; their shared context is computed once.
            is_same = pieces and len(context) > 1 and context == previous_context
            group = pieces[-1].group if is_same else number
            pieces.append(Continuation(group, tokens, len(tokens) - len(continuation)))
            previous_context = context
        with Progress("lm-eval: log-probabilities", len(pieces), "requests") as bar:
            for start in range(0, len(pieces), CALL):
                batch = pieces[start : start + CALL]
                score_continuations(self.engine.backend, self.engine.pool, batch)
                bar.advance(len(batch))
        answers = [(math.fsum(piece.logprobs), piece.is_greedy) for piece in pieces]
        for (text, *_tokens), answer in zip(requests, answers, strict=True):
            if text is not None:  # None: a window of a longer text, not a request of its own
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in disjoint windows of the model's context."""
        windows: list[Scored] = []
        counts: list[int] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            overlapping = get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            )
            disjoint = [make_disjoint_window(window) for window in overlapping]
            windows += [(None, context, continuation) for context, continuation in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows))
        sums = [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # Text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to the first of its stop strings."""
        engine_requests = [self._request(*request.args) for request in requests]
        texts = [""] * len(engine_requests)
        with Progress("lm-eval: generating", len(engine_requests), "requests") as bar:
            for delta in self.engine.stream(engine_requests):
                if delta.completion is not None:
                    texts[delta.index] = delta.completion.text
                    bar.advance()
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        options = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
        stop = [options.pop("until")] if isinstance(options["until"], str) else options.pop("until")
        max_tokens = options.pop("max_gen_toks")
        if not options.pop("do_sample"):
            options["temperature"] = 0.0
        options.setdefault("temperature", 1.0)
        known = {field.name for field in fields(Sampling)} - {"stop", "max_tokens", "logprobs"}
        for name in options:
            if name not in known:
                raise UserError(
                    f"the task's generation_kwargs have {name}, which Tercet's engine does not know"
                )
        if max_tokens >= self.max_length:
            raise UserError(
                f"the task requests {max_tokens} tokens; {self.name} takes {self.max_length} with the prompt; "
                "lower max_gen_toks in the task"
            )
        tokens = self.tok_encode(context)[-(self.max_length - max_tokens) :] or [self.prefix_token_id]
        sampling = Sampling(max_tokens=max_tokens, stop=tuple(text for text in stop if text), **options)
        return Request(tuple(tokens), sampling)

    # Conversations

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer and its template for the keys of the harness's caches."""
        return self.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that `apply_chat_template` uses; None if the harness requests none."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; without a generation prompt the text stops at the end of the last message."""
        return conversation_text(
            self.tokenizer,
            read_messages(chat_history, "chat_history"),
            ending=PromptEnding(continue_final_message=not add_generation_prompt),
        )


def _load(reference: str, **options: Any) -> Engine:
    """Return an engine for a local reference. Raises UserError for a hosted one."""
    parsed = parse_reference(reference)
    if not parsed.is_local:
        raise UserError(
            f"{reference} is hosted, and lm-eval needs the log-probabilities of given texts, which servers do not "
            "report; use a local model"
        )
    return load_reference(parsed, directory_of(parsed), **options)


def evaluate_lm_eval(
    model: TercetLM,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """Run tasks of the harness and return its results in plain values.

    Args:
        model: the model.
        tasks: names of tasks, groups or tags, or paths of task files.
        include_path: a directory with your own task files.
        limit: the largest number of documents of each task; None: all.
        shots: solved examples in the prompt; None: the number that each task names.
        chat_template: whether every prompt is put into the model's chat template.

    Returns:
        ``model``, ``seconds``, and the harness's ``results`` (by task: ``"acc,none"``,
        ``"acc_stderr,none"``, ...; null if there is no number), ``n-samples``, ``n-shot``, ``versions``.

    Raises:
        UserError: an unknown task, data that cannot be read, or a missing chat template.
    """
    if limit is not None and limit < 1:
        raise UserError(f"`limit` is {limit}; it must be 1 or more")
    if shots is not None and shots < 0:
        raise UserError(f"`shots` is {shots}; it must be 0 or more")
    if chat_template and model.tokenizer.chat_template is None:
        raise UserError(f"{model.name} has no chat template; leave out `chat_template`")
    start = time.monotonic()
    # Standard output is for the result, and the harness and its metrics may print.
    with contextlib.redirect_stdout(sys.stderr):
        manager = _task_manager(tasks, include_path)
        try:
            results = simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat_template,
                log_samples=False,
            )
        except Exception as problem:
            if _is_ours(problem):
                raise
            # The harness runs what a task file says, so any error may come from it: a path, a field, a template.
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())
            raise UserError(f"lm-eval cannot run {', '.join(tasks)}: {reason}") from problem
    return {
        "kind": "lm_eval",
        "model": model.name,
        "seconds": time.monotonic() - start,
        **{name: _plain(results[name]) for name in RESULTS if name in results},
    }


def _is_ours(problem: Exception) -> bool:
    """Return whether Tercet's code raised an error, rather than the harness or what it calls."""
    frames = [frame for frame, _ in traceback.walk_tb(problem.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).startswith("tercet.")


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    if not tasks:
        raise UserError("`lm_eval` names no task")
    path = None
    if include_path is not None:
        path = str(include_path)
        if not Path(path).is_dir():
            raise UserError(f"`include_path` {path} is not a directory")
        # The harness's own 14,000 tasks take seconds to read; they are skipped if none of them is named.
        own = TaskManager(include_path=path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=path)
    for task in tasks:
        if task not in manager.all_tasks and not Path(task).is_file():
            near = nearest(task, manager.all_tasks, limit=3)
            hint = (
                f"did you mean {', '.join(near)}?" if near else "`include_path` adds a directory of your own"
            )
            raise UserError(f"lm-eval has no task {task!r}; {hint}")
    return manager


def _plain(value: Any) -> Any:
    """Return JSON values: Python's numbers for numpy's, and null for a number that is not finite."""
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
