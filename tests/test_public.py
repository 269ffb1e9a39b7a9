"""The public names: small, typed, and instant to import."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tercet
from tercet import BuildSettings, ClimbSettings, CurateSettings, TuneSettings, UserError
from tercet.cli.command import in_options
from tercet.settings import keyword_form, options_of, setting, settings

FUNCTIONS = {"build": BuildSettings, "tune": TuneSettings, "climb": ClimbSettings, "curate": CurateSettings}
RESULTS = {"build": "Built", "tune": "Tuned", "climb": "Report", "curate": "Curated"}


@pytest.mark.parametrize("name", tercet.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name: str) -> None:
    value = getattr(tercet, name)
    if name != "__version__":
        assert inspect.getdoc(value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_signature_of_its_settings(name: str) -> None:
    signature = inspect.signature(getattr(tercet, name))
    fields = inspect.signature(FUNCTIONS[name])
    assert list(signature.parameters.values()) == list(fields.parameters.values())
    assert signature.return_annotation == RESULTS[name] and hasattr(tercet, RESULTS[name])
    assert getattr(tercet, name).__name__ == name


@pytest.mark.parametrize("settings_class", FUNCTIONS.values())
def test_every_setting_says_what_it_is_for(settings_class: type) -> None:
    documentation = inspect.getdoc(settings_class) or ""
    for name, option in options_of(settings_class).items():
        assert option.help.endswith("."), name
        assert f"    {name}: {option.help}" in documentation


def test_the_public_names_come_without_heavy_imports() -> None:
    program = (
        "import sys, tercet\n"
        "assert set(tercet.__all__) <= set(dir(tercet))\n"
        "assert tercet.UserError.__module__ == 'tercet.errors'\n"
        "assert tercet.Sampling(max_tokens=3).max_tokens == 3\n"
        "assert tercet.LLM.__name__ == 'LLM'\n"
        "tercet.BuildSettings, tercet.TuneSettings, tercet.ClimbSettings, tercet.CurateSettings, tercet.build\n"
        "assert tercet.__version__[0].isdigit()\n"
        "heavy = {'torch', 'sklearn', 'matplotlib', 'openai', 'transformers', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_a_name_that_does_not_exist_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        _ = tercet.LLMs


def test_the_package_is_typed() -> None:
    assert Path(tercet.__file__).with_name("py.typed").is_file()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_setting_is_answered_with_the_nearest(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} has no setting `sed`; did you mean `seed`"):
        getattr(tercet, name)(tmp_path, sed=1)


@settings
class Example:
    model: str = setting(help="A model.", argument=True, kw_only=False)
    rank: int = setting(default=4, help="A rank.")


def test_the_keyword_form_calls_the_function_with_the_settings() -> None:
    form = keyword_form(Example, lambda example: (example.model, example.rank), "example")
    assert form("m") == ("m", 4)
    assert form(model="m", rank=5) == ("m", 5)
    with pytest.raises(TypeError, match="model"):
        form()  # type: ignore[call-arg]


class FakeParameter:
    def __init__(self, name: str, *opts: str, kind: str = "option", metavar: str | None = None) -> None:
        self.name: str | None = name
        self.opts = [opt for opt in opts if not opt.startswith("--no-")]
        self.secondary_opts = [opt for opt in opts if opt.startswith("--no-")]
        self.param_type_name, self.metavar = kind, metavar


PARAMETERS = [
    FakeParameter("model", "model", kind="argument", metavar="REF"),
    FakeParameter("rank_stabilised", "--rslora"),
    FakeParameter("method", "--method"),
    FakeParameter("near_duplicates", "--near-duplicates", "--no-near-duplicates"),
]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("`model` is a hosted model", "REF is a hosted model"),
        ("`rank_stabilised` needs `method=lora`", "--rslora needs --method lora"),
        ("leave `near_duplicates=False` out", "leave --no-near-duplicates out"),
        ("`near_duplicates=True`", "--near-duplicates"),
        ("`unknown` and `a b` stay", "unknown and `a b` stay"),
    ],
)
def test_the_command_line_names_settings_as_its_options(message: str, line: str) -> None:
    assert in_options(message, PARAMETERS) == line


def test_progress_lines_name_no_settings() -> None:
    """The command line translates the settings in errors only."""
    source = Path(tercet.__file__).parent
    lines = [
        f"{file.relative_to(source)}:{call.lineno}"
        for file in source.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "say"
        if "`" in ast.unparse(call)
    ]
    assert not lines
