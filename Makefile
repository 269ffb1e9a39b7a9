# Everything happens in .venv; nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo install test test-clients lint docs docs-generated release-check clean

demo: install
	$(BIN)/tercet climb builtin:docs-routing --model builtin:smollm2 --minutes 11 --out runs/demo

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tercet needs Python 3.11 or newer: make install PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

# Two workers: many tests wait for a subprocess or use one core. Python stores compiled modules even where the
# environment says otherwise: every worker and every subprocess would compile the tests and plugins again.
test: export PYTHONDONTWRITEBYTECODE :=
test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Real clients (Claude Code, Codex, litellm and others), each in an environment of its own; needs a network the
# first time. MODEL=REF is a small chat model (default: builtin:smollm2). Writes the
# table of docs/reference/clients.md.
test-clients: install
	$(BIN)/python scripts/test-clients --write $(if $(MODEL),--model $(MODEL))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/. Any warning (a dead link, an unknown name) is an error.
docs: install
	$(BIN)/python scripts/generate_docs.py --check
	$(BIN)/zensical build --clean --strict

# What the documentation takes from the code: the command reference and parts of docs/architecture.md.
docs-generated: install
	$(BIN)/python scripts/generate_docs.py

# Builds sdist and wheel, installs the wheel into an empty environment and runs it there.
release-check: install
	scripts/release-check $(BIN)/python

clean:
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache
