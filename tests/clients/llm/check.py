"""llm, with a model of extra-openai-models.yaml: whole, streamed, and as a conversation."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def main(base_url: str, model_name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LLM_USER_PATH"] = directory
        entry = f"- model_id: ours\n  model_name: {model_name}\n  api_base: {base_url}/v1\n"
        (Path(directory) / "extra-openai-models.yaml").write_text(entry)
        import llm

        model = llm.get_model("ours")
        text = model.prompt("Say hello.", stream=False, temperature=0, max_tokens=40).text()
        streamed = "".join(model.prompt("Say hello.", stream=True, temperature=0, max_tokens=40))
        assert text and text == streamed, (text, streamed)
        talk = model.conversation()
        assert talk.prompt("Say hello.", system="Be brief.", max_tokens=40).text()
        assert talk.prompt("Once more.", max_tokens=40).text()
    checked = ["prompt", "streamed", "conversation"]
    print(json.dumps({"client": "llm", "version": version("llm"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
