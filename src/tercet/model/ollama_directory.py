"""A model of Ollama as a checkpoint directory: that of its GGUF file, with the parameters that Ollama stores.

========================================================  ====================================================
``temperature``, ``top_k``, ``top_p``, ``min_p``          as in ``generation_config.json``
``repeat_penalty``                                        ``repetition_penalty``, which counts the whole text,
                                                          not Ollama's last 64 tokens
``stop``                                                  stop tokens; a text of several tokens is not honoured
``num_ctx``, ``num_gpu``, ``num_thread`` and the like     have no effect: they are about Ollama's memory
others, the ``system`` layer                              not honoured, and named on stderr
========================================================  ====================================================

The chat template is the GGUF file's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tercet.files import atomic_directory, cache_directory, fingerprint, read_json, write_json
from tercet.model.ollama_store import OllamaModel
from tercet.model.tokenizer import Tokenizer
from tercet.progress import say

_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}
_MEMORY = {
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "num_keep",
    "use_mmap",
    "use_mlock",
    "numa",
}
_MEMORY |= {"low_vram", "f16_kv", "vocab_only", "draft_num_predict"}
_GENERATION = "generation_config.json"


def ollama_directory(model: OllamaModel, directory: Path) -> Path:
    """Return a checkpoint directory with a model's parameters; ``directory`` is that of its GGUF file."""
    if not model.parameters and model.system is None:
        return directory
    name = fingerprint([directory.name, model.name, model.parameters, model.system])
    own = cache_directory() / "ollama" / name
    if (own / _GENERATION).is_file() and all((own / file.name).exists() for file in directory.iterdir()):
        return own
    content, ignored = _generation(model, directory)
    if ignored:
        say(f"ollama:{model.name}: of what Ollama stores with it, not used here: {', '.join(ignored)}")
    with atomic_directory(own) as temporary:
        for file in sorted(directory.iterdir()):
            if file.name != _GENERATION:
                (temporary / file.name).symlink_to(file)
        write_json(temporary / _GENERATION, content)
    return own


def _generation(model: OllamaModel, directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the content of generation_config.json, and what is not honoured."""
    path = directory / _GENERATION
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    ignored = [] if model.system is None else ["its system message"]
    stops: list[str] = []
    for key, value in model.parameters.items():
        if key in _SAMPLING:
            content[_SAMPLING[key]] = value
        elif key == "stop":
            stops = [value] if isinstance(value, str) else list(value)
        elif key not in _MEMORY:
            ignored.append(key)
    if content.get("temperature") == 0:
        content = {key: value for key, value in content.items() if key not in _SAMPLING.values()}
        content["do_sample"] = False
    if stops:
        tokenizer = Tokenizer.load(directory)
        ids = {text: tokenizer.id_of(text) for text in stops}
        ignored += [f"stop {text!r}" for text, id in ids.items() if id is None]
        published = content.get("eos_token_id")
        ends = published if isinstance(published, list) else [] if published is None else [published]
        content["eos_token_id"] = list(dict.fromkeys([*ends, *(id for id in ids.values() if id is not None)]))
    return content, ignored
