"""docs/serve.md names every existing route and metric, and docs/reference/fields.md every field."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2 as httpx
import typer

from tercet.cli.serve import serve
from tercet.serve.api.field_table import Body, FieldClass, OpenBody, class_of
from tercet.serve.field_reference import ENDPOINTS, TYPES

DOCS = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def test_every_field_of_every_body_has_a_class() -> None:
    def check(body: type[Body], where: str) -> None:
        for name, info in body.model_fields.items():
            assert class_of(info) is not None, f"{where}.{name}"

    for path, body in ENDPOINTS.items():
        check(body, path)
        for inner in [*Body.__subclasses__(), *OpenBody.__subclasses__()]:
            check(inner, inner.__name__)
    for kinds in TYPES.values():
        assert all(isinstance(kind, FieldClass) for kind in kinds.values())


def test_every_body_of_the_api_is_in_the_page_of_fields(tiny_url: str) -> None:
    paths = httpx.get(f"{tiny_url}/openapi.json").json()["paths"]
    with_body = {path for path, methods in paths.items() if "requestBody" in methods.get("post", {})}
    assert with_body == set(ENDPOINTS)


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
