"""A build with a chat stage: the answers of the chat model, and resuming."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import forked
from tercet.compose import build
from tercet.engine.load import load_engine
from tercet.engine.request import Request, Sampling
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer
from tercet.pretrain.chat import conversation_texts, read_conversations

SMALL = {"layers": 2, "width": 64, "vocab_size": 300, "context": 64, "batch_tokens": 512}
QUESTIONS = {"colour": "red", "animal": "cat", "number": "two"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    said = [
        f"the {kind} of line {line} is {answer}." for line in range(60) for kind, answer in QUESTIONS.items()
    ]
    path.write_text("".join(json.dumps({"text": " ".join(said[i % 50 :])}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"which {kind}?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for _ in range(40)
        for kind, answer in QUESTIONS.items()
    ]
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def built(text: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "run"
    build(text, out, tokens=20_000, chat=conversations, chat_epochs=40, **SMALL)
    return out


def test_the_chat_model_answers_and_stops(built: Path) -> None:
    tokenizer, engine = Tokenizer.load(built / "model"), load_engine(built / "model")
    for kind, answer in QUESTIONS.items():
        ids = tokenizer.encode_chat(
            [{"role": "user", "content": f"which {kind}?"}], add_generation_prompt=True
        )
        [completion] = engine.generate([Request(tuple(ids), Sampling(max_tokens=20, temperature=0.0))])
        assert (completion.text, completion.finish_reason) == (answer, "stop")


def test_transformers_gives_the_same_answer_with_the_saved_template(built: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(built / "model")
    theirs = AutoModelForCausalLM.from_pretrained(built / "model")
    prompt = tokens.apply_chat_template(
        [{"role": "user", "content": "which animal?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokens.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True) == "cat"


def test_the_base_model_is_saved_without_a_template(built: Path) -> None:
    assert Tokenizer.load(built / "base").chat_template is None
    result = json.loads((built / "result.json").read_text())
    assert result["model"] == str(built / "model")
    assert result["chat"]["base"] == str(built / "base")
    # A twentieth of 120 rows is held out.
    assert result["chat"]["examples"] == 114
    assert "114 rows gave 114 examples" in (built / "report.html").read_text()


def test_a_build_killed_in_the_chat_stage_resumes_with_the_same_weights(
    built: Path, text: Path, conversations: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code = (
        "import dataclasses, sys, time; import tercet.train.calibrate as calibrate\n"
        "import tercet.train.loop as loop, tercet.train.state as state, tercet.train.supervised as supervised\n"
        "from tercet import build\n"
        "calibrate._measure = lambda *a: calibrate.Speed(3_000.0, 'float32', 1)\n"
        "train, save = loop.train, state.save_state\n"
        "supervised.train = lambda model, recipe, *a, **k: train(\n"
        "    model, dataclasses.replace(recipe, save_seconds=0), *a, **k)\n"
        "def slow(path, progressed, *rest):\n"
        "    save(path, progressed, *rest)\n"
        "    if path.parent.name == 'chat' and progressed.step > 30:\n"
        "        print('saved', flush=True); time.sleep(60)\n"
        "state.save_state = slow\n"
        f"build(sys.argv[1], sys.argv[2], tokens=20_000, chat=sys.argv[3], chat_epochs=40, **{SMALL!r})"
    )
    child = forked.Program(code, str(text), str(out), str(conversations))
    deadline = time.monotonic() + 120
    while "saved" not in child.stdout:
        assert time.monotonic() < deadline and child.returncode is None, child.stderr
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    # The base model is not trained again.
    weights = (out / "base" / "model.safetensors").stat().st_mtime_ns
    build(text, out, tokens=20_000, chat=conversations, chat_epochs=40, **SMALL)
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == weights
    for part in ("base", "model"):
        assert (out / part / "model.safetensors").read_bytes() == (
            built / part / "model.safetensors"
        ).read_bytes()


def test_rows_without_conversations_are_refused(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"row 1: a conversation needs messages.*it has prompt, completion"):
        build(text, tmp_path / "run", tokens=20_000, chat=path, **SMALL)
    with pytest.raises(UserError, match="`chat_epochs` needs `chat`"):
        build(text, tmp_path / "run", tokens=20_000, chat_epochs=2, **SMALL)


def test_conversations_may_have_any_form_of_a_training_row(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        {"instruction": "e", "input": "f", "output": "g", "id": 1},
    ]
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert conversation_texts(read_conversations(path)) == ["c", "d", "e\nf", "g"], "the first row is dropped"
    path.write_text(json.dumps({"conversations": [{"from": "narrator", "value": "c"}]}))
    with pytest.raises(UserError, match=r"rows\.json, row 1: messages\[0\]\.from is 'narrator'"):
        read_conversations(path)


def test_a_build_can_clean_its_data_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("ba", "ko", "li", "mu", "ne") for b in ("ra", "so", "ti", "vu")]
    texts = [" ".join(rng.choice(words, 200)) for _ in range(50)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:10]]))
    made = build(path, tmp_path / "run", tokens=4_000, curate="none", **SMALL)
    assert made.corpus.documents == 50
    report = json.loads((tmp_path / "run" / "curated" / "report.json").read_text())
    assert (report["read"]["documents"], report["written"]["documents"]) == (60, 50)
    with pytest.raises(UserError, match="`curate` is 'fine'; choose none, light, web"):
        build(path, tmp_path / "other", tokens=4_000, curate="fine", **SMALL)
