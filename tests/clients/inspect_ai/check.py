"""inspect_ai: an evaluation with a tool, over chat completions and over responses."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, tool


@tool
def read_note() -> Tool:
    async def execute(path: str) -> str:
        """Read a file.

        Args:
            path: where it is.
        """
        return Path(path).read_text()

    return execute


def main(base_url: str, model_name: str) -> None:
    os.environ["OPENAI_API_KEY"] = "none"
    with tempfile.TemporaryDirectory() as directory:
        note = Path(directory) / "note.txt"
        note.write_text("The colour is teal.\n")
        task = Task(
            dataset=[Sample(input=f"Which colour is in {note}?", target="The note says teal")],
            solver=[use_tools(read_note()), generate()],
            scorer=includes(),
        )
        checked = []
        for responses in (False, True):
            model = get_model(
                f"openai/{model_name}", base_url=f"{base_url}/v1", api_key="none", responses_api=responses
            )
            (log,) = eval(task, model=model, log_dir=directory, display="none")
            assert log.status == "success" and log.results is not None, log.error
            assert log.results.scores[0].metrics["accuracy"].value == 1.0, log.samples
            checked.append("responses" if responses else "chat completions")
    print(json.dumps({"client": "inspect_ai", "version": version("inspect-ai"), "checked": checked}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
