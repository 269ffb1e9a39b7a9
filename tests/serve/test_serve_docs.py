"""docs/serve.md names every existing field, route, code and metric, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2 as httpx
import typer

from tercet.cli.serve import serve
from tercet.serve.api.chat_completions import ChatBody

DOCS = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return DOCS.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_field_of_chat_completions_is_in_its_table() -> None:
    fields = set(re.findall(r"`([a-z_]+)`", section("Chat completions")))
    assert set(ChatBody.model_fields) <= fields


def test_every_field_that_the_table_names_is_taken() -> None:
    rows = [line for line in section("Chat completions").splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])}
    assert named <= set(ChatBody.model_fields)


def test_every_option_is_in_the_table() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    command = typer.main.get_command(app)
    options = {option for option in command.params for option in option.opts if option.startswith("--")} - {
        "--help"
    }
    assert options == set(re.findall(r"`(--[a-z-]+)", DOCS)) | {"--adapter"}


def test_every_route_and_metric_is_named(tiny_url: str) -> None:
    for path in httpx.get(f"{tiny_url}/openapi.json").json()["paths"]:
        if "{response_id}" not in path:
            assert path.replace("{model}", "NAME") in DOCS, path
    text = httpx.get(f"{tiny_url}/metrics").text
    metrics = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    metrics = {name for name in metrics if not name.endswith("_created")}
    assert metrics == set(re.findall(r"`(tercet_[a-z_]+)", DOCS))
