"""Write the parts of the documentation that come from the code: the command reference and the architecture.

python scripts/generate_docs.py            writes docs/reference/cli.md, docs/reference/fields.md,
                                           docs/images/imports.svg and the list of modules in docs/architecture.md
python scripts/generate_docs.py --check    exits with 1 where they are not up to date
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path

import typer

import tercet
from tercet.cli.main import COMMANDS, application
from tercet.serve.api.field_table import FieldClass, Hint, Refused

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(tercet.__file__).parent
DOCS = ROOT / "docs"
FIELDS = DOCS / "reference/fields.md"
CLI, ARCHITECTURE, DIAGRAM = DOCS / "reference/cli.md", DOCS / "architecture.md", DOCS / "images/imports.svg"
# From the top. Packages on one floor never import each other; tests/test_layering.py holds that.
FLOORS = (
    ("cli",),
    ("serve", "ladder"),
    ("prompt", "finetune", "pretrain", "curation", "evaluate", "conversion"),
    ("engine", "train"),
    ("data",),
    ("model",),
)


def cli_reference() -> str:
    """Return a page with a section for each command: what it does, its arguments and options, an example."""
    group = typer.main.get_command(application())
    lines = [
        "# Command line",
        "",
        "<!-- Written by scripts/generate_docs.py from the code. -->",
        "",
        "Every command prints its result on standard output and its progress on standard error. With `--json` it "
        "prints one JSON object. A mistake gives one line and exit status 2; Ctrl-C exits with 130.",
        "",
    ]
    for name in COMMANDS:
        command = group.commands[name]  # type: ignore[attr-defined]
        module = importlib.import_module(f"tercet.cli.{name}")
        subcommands: dict[str, str] = getattr(module, "SUBCOMMANDS", {})
        if not subcommands:
            lines += _section(name, command, module.EXAMPLE)
        for subcommand, example in subcommands.items():
            lines += _section(f"{name} {subcommand}", command.commands[subcommand], example)
    return "\n".join(lines)


def _section(name: str, command: typer.core.TyperCommand, example: str) -> list[str]:
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    return [
        f"## tercet {name}",
        "",
        *(f"{paragraph}\n" for paragraph in paragraphs),
        *("```", example, "```", ""),
        *("| argument or option | meaning |", "|---|---|"),
        *(_row(parameter) for parameter in command.params if parameter.name != "help"),
        "",
    ]


def _row(parameter: typer.core.TyperArgument | typer.core.TyperOption) -> str:
    help_text = (parameter.help or "").replace("|", "\\|")
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar or parameter.name}`"
    else:
        spelled = max(parameter.opts, key=len)
        if parameter.secondary_opts:
            spelled += ", " + max(parameter.secondary_opts, key=len)
        value = "" if parameter.is_flag or not parameter.metavar else f" {parameter.metavar}"
        name = f"`{spelled}{value}`".replace("|", "\\|")
    notes = []
    if parameter.required:
        notes.append("Required.")
    elif parameter.default not in (None, False, ()) and not callable(parameter.default):
        notes.append(f"Default: {parameter.default}.")
    return f"| {name} | {' '.join([help_text, *notes])} |"


def fields_reference() -> str:
    """Return a page with the class of every field of every endpoint."""
    from tercet.serve.api.field_table import field_classes
    from tercet.serve.field_reference import ENDPOINTS, TYPES

    lines = [
        "# Fields of requests",
        "",
        "<!-- Written by scripts/generate_docs.py from the code. -->",
        "",
        "What would change the answer and cannot be honoured is **refused** with status 400. What is only a hint, or "
        "has no meaning for the model, is **ignored**: the request is answered, and the response header `x-ignored` "
        "names the field (`messages[0].cache_control`; `[]` stands for several places). `tercet serve --strict` "
        "refuses these too. Fields of `null` are as if they were left out. Unknown fields of messages, blocks, parts "
        "and tools are ignored and named; unknown fields of the request itself are refused.",
        "",
    ]
    for path, body in ENDPOINTS.items():
        lines += [f"## POST {path}", "", "| field | class | meaning |", "|---|---|---|"]
        lines += [_field_row(f"`{name}`", kind) for name, kind in field_classes(body)]
        lines.append("")
    for title, kinds in TYPES.items():
        lines += [f"## {title}", "", "| type | class | meaning |", "|---|---|---|"]
        lines += [_field_row(f"`{name}`", kind) for name, kind in kinds.items()]
        lines.append("")
    return "\n".join(lines)


def _field_row(name: str, kind: FieldClass) -> str:
    meaning = kind.reason if isinstance(kind, Hint | Refused) else kind.meaning
    if isinstance(kind, Hint | Refused) and kind.followed:
        values = ", ".join(f"`{json.dumps(value)}`" for value in kind.followed)
        meaning += f"; except {values}"
    return f"| {name} | {kind.label} | {meaning} |".replace("||", "| |")


def imports_between_packages() -> set[tuple[str, str]]:
    """Return the pairs (importing package, imported package), read from the source files."""
    packages = {package for floor in FLOORS for package in floor}
    pairs = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tercet."):
                imported = str(node.module).split(".")[1]
                if package in packages and imported in packages and imported != package:
                    pairs.add((package, imported))
    return pairs


def diagram() -> str:
    """Return an SVG of the packages, from the top floor down, with an arrow for each pair that imports."""
    width, height, row, box = 900, 620, 100, (120, 40)
    place = {
        package: (width * (column + 1) // (len(floor) + 1), 50 + row * number)
        for number, floor in enumerate(FLOORS)
        for column, package in enumerate(floor)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="16">',
        "<!-- Written by scripts/generate_docs.py from the imports. -->",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#0f766e"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="12" fill="#f8fafc"/>',
    ]
    for source, target in sorted(imports_between_packages()):
        (x, y), (u, v) = place[source], place[target]
        begin, end = y + box[1] // 2, v - box[1] // 2 - 2
        # An arrow that passes a floor bends outwards, so that it is not hidden behind a box.
        bend = 0 if v - y <= row else (90 if x >= width // 2 else -90)
        lines.append(
            f'<path d="M{x} {begin} C{x + bend} {begin + 40} {u + bend} {end - 40} {u} {end}" fill="none" '
            'stroke="#0f766e" stroke-opacity="0.45" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    for package, (x, y) in place.items():
        lines.append(
            f'<rect x="{x - box[0] // 2}" y="{y - box[1] // 2}" width="{box[0]}" height="{box[1]}" rx="8" '
            'fill="#ffffff" stroke="#0f766e" stroke-width="1.5"/>'
            f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="#0f172a">{package}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def modules() -> str:
    """Return a list of every module with the first line of its docstring, by package."""
    lines = []
    directories = sorted({path.parent for path in PACKAGE.rglob("*.py")}, key=_place)
    for directory in directories:
        name = directory.relative_to(PACKAGE).as_posix()
        lines += [f"### {'tercet' if name == '.' else name}/", ""]
        lines += [
            f"- `{path.name}`: {_first_line(path)}"
            for path in sorted(directory.glob("*.py"))
            if path.name not in ("__init__.py", "__main__.py")
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _place(directory: Path) -> tuple[int, str]:
    parts = directory.relative_to(PACKAGE).parts
    floors = [number for number, floor in enumerate(FLOORS) if parts and parts[0] in floor]
    return (floors[0] if floors else len(FLOORS), "/".join(parts))


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = docstring.split("\n\n")[0]
    return " ".join(first.split()).replace("``", "`")


def with_part(text: str, name: str, part: str) -> str:
    """Return ``text`` with ``part`` between the markers of ``name``."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"docs/architecture.md has no markers of {name}")
    return f"{before}{begin}\n{part}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Return the generated pages by their path."""
    architecture = ARCHITECTURE.read_text(encoding="utf-8")
    architecture = with_part(architecture, "modules", modules())
    return {CLI: cli_reference(), FIELDS: fields_reference(), ARCHITECTURE: architecture, DIAGRAM: diagram()}


def main() -> int:
    """Write or check the pages; return the exit status."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not up to date; run: make docs-generated")
        return bool(stale)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
