# make demo   the pocket model answers questions about a picture, greedy beside VCD
# make test   lint and tests
# make docs   the site of docs/, in site/
# Each makes .venv and installs what it needs and this folder itself (so that .venv/bin/lvlm runs what is here), the
# first time only. Another Python: make demo PYTHON=python3.12

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs clean

demo: $(VENV)/.run-installed
	$(BIN)/lvlm infer

test: lint
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs site build dist *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: apt install python3-venv); name one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-installed: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test-installed: requirements-test.txt $(VENV)/.run-installed
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	@touch $@

$(VENV)/.docs-installed: pyproject.toml $(VENV)/.run-installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@
