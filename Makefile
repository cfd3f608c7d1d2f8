# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs, beginning with .venv in this folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo
# the versions that CI installs; they need Python 3.11 or newer, older Pythons take what the bounds allow
CONSTRAINTS ?= $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: help install demo test lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

install: $(VENV)/.installed  ## make .venv and install the package with its native library

$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(CONSTRAINTS) setuptools wheel cmake ninja torch torchvision
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

demo: install  ## train, evaluate and map on synthetic scenes; results in ./demo (OUT=... for another folder)
	$(BIN)/drseg demo --out $(OUT)

test: install  ## all tests, on the CPU
	$(BIN)/python -m pytest -q --durations=15

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, but not .venv
	rm -rf build drseg_core/_lib *.egg-info .pytest_cache .mypy_cache .ruff_cache
