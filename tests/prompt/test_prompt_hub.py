"""Names on the Hub, in separate processes that use the address of a small fake Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import Hub

FETCH = (
    "import sys\n"
    "from tercet.errors import UserError\n"
    "from tercet.model.reference import parse_reference\n"
    "from tercet.model.source import files_of\n"
    "for text in sys.argv[1:]:\n"
    "    try: print(files_of(parse_reference(text)))\n"
    "    except UserError as problem: print('error:', problem)\n"
)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def fetch(endpoint: str, home: Path, *references: str, **environment: str) -> str:
    """Return the files of each reference, or the error, of a process that uses this Hub."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    variables = {**ours, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *references], env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_weights_and_configuration_are_fetched_once_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    directory = Path(fetch(hub.url, tmp_path, "org/small@v1"))
    assert sorted(path.name for path in directory.rglob("*") if path.is_file()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert sorted(hub.downloaded) == ["chat_template.jinja", "config.json", "model.safetensors"]
    hub.close()
    # Without the Hub, cached files still work, whether the Hub is unreachable or HF_HUB_OFFLINE is set.
    assert fetch(hub.url, tmp_path, "org/small@v1") == str(directory)
    assert fetch(hub.url, tmp_path, "org/small@v1", HF_HUB_OFFLINE="1") == str(directory)


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    assert f"error: no model org/none on {hub.url}" in fetch(hub.url, tmp_path, "org/none")
    assert "org/small has no revision 'v9'" in fetch(hub.url, tmp_path, "org/small@v9")
    assert "org/pickled holds no .safetensors" in fetch(hub.url, tmp_path, "org/pickled")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    message = fetch("http://127.0.0.1:9", tmp_path, "org/small")
    assert message.startswith(
        "error: org/small is neither a directory here nor in the cache, and http://127.0.0.1:9 "
    )
    assert "cannot be reached" in message
    assert "\n" not in message
    assert "HF_HUB_OFFLINE forbids" in fetch("http://127.0.0.1:9", tmp_path, "org/small", HF_HUB_OFFLINE="1")


def test_a_gguf_file_is_fetched_by_its_quantisation(hub: Hub, tmp_path: Path) -> None:
    files = fetch(
        hub.url, tmp_path, "org/small-GGUF:q8_0", "org/small-GGUF@v1:BF16", "org/small-GGUF/small-Q4_0.gguf"
    ).split("\n")
    assert [Path(file).name for file in files] == [
        "small-Q8_0.gguf",
        "small-BF16-00001-of-00002.gguf",
        "small-Q4_0.gguf",
    ]
    assert (Path(files[1]).parent / "small-BF16-00002-of-00002.gguf").read_bytes() == b"GGUF b2"
    assert sorted(hub.downloaded) == [
        "BF16/small-BF16-00001-of-00002.gguf",
        "BF16/small-BF16-00002-of-00002.gguf",
        "small-Q4_0.gguf",
        "small-Q8_0.gguf",
    ]
    messages = {
        "org/small-GGUF:Q5_K_M": "org/small-GGUF has no Q5_K_M; it has",
        "org/small-GGUF@v9:Q8_0": "org/small-GGUF has no revision 'v9'",
        "org/none:Q8_0": f"no model org/none on {hub.url}",
        "org/small:Q8_0": "org/small contains no GGUF files",
        "org/small-GGUF": "contains GGUF files, so add a quantisation to its name: it has BF16, Q4_0, Q8_0; write, "
        "for example, org/small-GGUF:BF16",
    }
    lines = fetch(hub.url, tmp_path, *messages).split("\n")
    for line, message in zip(lines, messages.values(), strict=True):
        assert message in line
    hub.close()
    # Without the Hub, what has been fetched still works, and the rest is refused in one line.
    present, missing = fetch(hub.url, tmp_path, "org/small-GGUF:Q8_0", "org/other:Q8_0").split("\n")
    assert present == files[0]
    assert missing.startswith("error: org/other is not in the cache, and http")
    present, missing = fetch(
        hub.url, tmp_path, "org/small-GGUF:Q8_0", "org/other:Q8_0", HF_HUB_OFFLINE="1"
    ).split("\n")
    assert present == files[0] and "HF_HUB_OFFLINE forbids" in missing


def test_a_data_set_is_read_through_the_cache(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tercet.data.documents import read_documents\n"
        "from tercet.errors import UserError\n"
        "try: print([(d.text, d.licence) for d in read_documents(sys.argv[1:])])\n"
        "except UserError as problem: print('error:', problem)\n"
    )

    def read(source: str, **more: str) -> str:
        # Other tests set HF_HUB_OFFLINE for this process.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**ours, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **more}
        done = subprocess.run(
            [sys.executable, "-c", code, source], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert read("hub:org/texts#data/train-*") == "[('one', 'CC0')]"
    assert hub.downloaded == ["data/train-0.jsonl"]
    assert read("hub:org/texts@v1") == "[('about', None), ('two', None), ('one', 'CC0')]"
    assert "weights.bin" not in hub.downloaded
    # Cached files need no connection; files fetched by other patterns are not read.
    assert read("hub:org/texts#data/train-*", HF_HUB_OFFLINE="1") == "[('one', 'CC0')]"
    assert "no dataset org/none on" in read("hub:org/none")
    assert "the data set org/texts holds no file data/dev-*" in read("hub:org/texts#data/dev-*")
