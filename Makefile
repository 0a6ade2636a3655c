# make demo        install, compress the small DiT to INT8, say where the report is
# make test        install, run every test
# make test-fast   the tests that take no more than a few seconds each
# make lint        ruff and mypy
# make clean       remove what the others made
#
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal
INPUTS := pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.PHONY: help demo test test-fast lint clean

help:
	@sed -n '/^# /s/^# //p; /^$$/q' Makefile

demo: $(VENV)/.user
	@$(BIN)/diffpress run quickstart --output demo

test: $(VENV)/.dev
	$(PYTEST)

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); ok or sys.stderr.write("diffpress needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12\n" % sys.version_info[:2]); sys.exit(not ok)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch goes first: the rest is then resolved against the build (CPU or CUDA) that this machine gets.
$(VENV)/.user: $(INPUTS) | $(BIN)/python
	@echo "Installing diffpress into $(VENV) (minutes, once)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	@echo "Installing what lint and tests need"
	@$(PIP) --editable '.[dev,openvino]'
	@touch $@
