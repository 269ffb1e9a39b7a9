from __future__ import annotations

from pathlib import Path

import pytest

from tercet.engine.request import Usage
from tercet.errors import UserError
from tercet.prompt.prices import Price, as_price, known_price, parse_price, prices_file


def write_prices(text: str) -> Path:
    path = prices_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_cost_is_tokens_times_the_price_of_a_million() -> None:
    assert Price(0.15, 0.60).cost(Usage(2_000_000, 500_000)) == pytest.approx(0.30 + 0.30)


def test_a_server_that_counts_nothing_costs_an_unknown_amount() -> None:
    assert Price(1, 1).cost(Usage(0, 0)) is None


def test_the_command_lines_price() -> None:
    assert parse_price("0.15,0.6") == Price(0.15, 0.6)


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1", ""])
def test_a_price_that_is_not_two_amounts_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"0\.15,0\.60"):
        parse_price(text)


def test_the_users_file_maps_references_to_prices(tmp_path: Path) -> None:
    assert known_price("openai:x") is None
    path = write_prices("openai:x: [0.5, 2]\nhttp://h/v1#m: [1, 1, 1]\n")
    assert path == tmp_path / "config" / "tercet" / "prices.yaml"
    assert known_price("openai:x") == Price(0.5, 2.0)
    assert known_price("openai:y") is None
    with pytest.raises(UserError, match=r"prices\.yaml: http://h/v1#m is \[1, 1, 1\]"):
        known_price("http://h/v1#m")


@pytest.mark.parametrize("text", ["a: [1", "- 1", "just text"])
def test_a_prices_file_that_is_wrong_is_named(text: str) -> None:
    path = write_prices(text)
    with pytest.raises(UserError) as caught:
        known_price("openai:x")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_prices_file_knows_nothing() -> None:
    write_prices("# nothing yet\n")
    assert known_price("openai:x") is None


def test_true_is_not_an_amount() -> None:
    with pytest.raises(UserError):
        as_price([True, 1])
