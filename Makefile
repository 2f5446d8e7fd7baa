# Every target works from a fresh clone: the environment is made on demand from Python 3.11+ alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOOPS := $(VENV)/.loops
# A worker for each processor, of one thread each.
PYTEST := $(BIN)/python -m pytest -n logical
# Each worker, and each process that a test starts, would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE
PACKAGES := geminifx.compiler geminifx.models geminifx.passes geminifx.runtime

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-loops campaigns lint golden clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "geminifx needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(LOOPS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,loops]'
	touch $@

train: $(READY)  ## train a small OPT inside a budget its training state does not fit in
	$(BIN)/geminifx train

test: $(READY)  ## run the tests, but for the slow ones
	$(PYTEST) tests

test-all: $(READY)  ## run the slow tests, and a twentieth of each campaign
	$(PYTEST) tests -m "slow or campaign"

test-loops: $(LOOPS)  ## run the tests of Trainer, accelerate, PEFT, TRL and Lightning, the slow ones too
	$(PYTEST) tests/loops -m "slow or not slow"

campaigns: $(READY)  ## run the campaigns whole: up to 20,000 random cases each, and every mode on eight ranks
	$(PYTEST) tests -m campaign --whole

lint: $(READY)  ## formatting, lint rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p build/types && ln -sfn ../.. build/types/geminifx
	MYPYPATH=build/types $(BIN)/mypy --explicit-package-bases $(foreach package,$(PACKAGES),-p $(package))

golden: $(READY)  ## rewrite the golden programs after an intended change; review the diff
	ACCEPT=1 $(BIN)/python -m pytest tests/passes

clean:  ## remove everything that was generated
	rm -rf $(VENV) build *.egg-info runs .mypy_cache .pytest_cache .ruff_cache
